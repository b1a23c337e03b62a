"""Report page of a run, from the files in its directory. A run that is not over has a page too."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax import tree
from lora_jax.report import plots
from lora_jax.report.console import describe_share, name_metric
from lora_jax.report.page import charts, files, series
from lora_jax.report.page.parts import (
    Answer,
    Cell,
    Chart,
    Code,
    Facts,
    Note,
    Page,
    Part,
    Sample,
    Samples,
    Section,
    Table,
    cell,
    clip,
    counted_text,
    duration,
    is_number,
    number,
    size,
)
from lora_jax.report.scores import spread

_SAMPLES = 24
_FEW = 25  # up to this many points, a curve is not smoothed
_SMALL = 180  # height of a small chart
_SETS = {"task": "held-out task", "regression": "regression set"}
_LOSS = "loss (nats per token)"


def make(directory: Path) -> Page:
    """Return the page of a run.

    Raises:
        UserError: files that are no files of a run.
    """
    config, text = files.read_config(directory / "config.yaml")
    summary = files.read_object(directory / "summary.json")
    about = files.read_object(directory / "run.json")
    lines = files.read_steps(directory / "metrics.jsonl")
    sections = [
        Section("Result", _result(summary, config, lines)),
        Section("Curves", _curves(summary, lines)),
        Section("Answers before and after", _answers(directory, summary)),
        Section("Norms of the update", _norms(directory)),
        Section("Merge", _merge(directory)),
        Section("Memory and time", _memory(summary, about)),
        Section("Data", _data(summary, config)),
        Section("Config", _config(directory, text)),
    ]
    adapter, train = config.get("adapter", {}), config.get("train", {})
    method = adapter.get("method", "")
    rank = f" of rank {adapter['rank']}" if "rank" in adapter and method != "full" else ""
    lead = f"{config.get('model', '')} · {method}{rank} · {train.get('objective', '')}"
    return Page(directory.resolve().name, lead, [one for one in sections if one.parts])


def _result(
    summary: Mapping[str, Any], config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> list[Part]:
    parts: list[Part] = []
    if not summary:
        done, total = (lines[-1]["step"] if lines else 0), config.get("train", {}).get("steps")
        of = f" of {total:,}" if is_number(total) else ""
        parts.append(Note(f"The run is not over: step {done:,}{of}.", "warning"))
    parts += [Note(str(text), "warning") for text in summary.get("warnings") or ()]
    rows = []
    for name, label in _SETS.items():
        pair = summary.get(name) or {}
        for key in [key.removesuffix("_after") for key in pair if key.endswith("_after")]:
            before, after = pair.get(f"{key}_before"), pair[f"{key}_after"]
            rows.append([Cell(f"{label}: {name_metric(key, pair)}"), *_change(before, after)])
    if rows:
        columns = ["", "before", "after", "change"]
        parts.append(Table(columns, rows, frozenset((1, 2, 3)), sorts=False))
    elif lines:
        last = lines[-1]
        parts.append(Facts({"last step": last["step"], _LOSS: number(last.get("loss"))}))
    return parts


def _change(before: Any, after: Any) -> list[Cell]:
    known = is_number(before) and is_number(after)
    change = Cell(f"{after - before:+.4f}", after - before) if known else Cell("–")
    return [cell(before, 5), cell(after, 5), change]


def _curves(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[Part]:
    train = series.points(lines, "loss")
    if not train:
        return []
    rows, names = series.named("training", train), ["training"]
    caption = f"Loss of {len(train):,} logged steps"
    if len(train) > series.MOST:
        caption += "; a point is the mean of several, the band their lowest and highest"
    elif len(train) > _FEW:
        width = 2 * max(2, len(train) // 40) + 1
        mean = [float(x) for x in plots.smooth([loss for _, loss in train], width)]
        steps = [step for step, _ in train]
        name = f"training, mean of {width}"
        rows += series.named(name, list(zip(steps, mean, strict=True)))
        names.append(name)
    for name, label in _SETS.items():
        found = series.points(lines, f"{name}_loss")
        before = (summary.get(name) or {}).get("loss_before")
        if found and is_number(before):
            found = [(0, before), *found]
        if found:
            rows += series.named(label, found)
            names.append(label)
    faint = "training" if len(names) > 1 and names[1].startswith("training") else ""
    parts: list[Part] = [
        Chart(charts.curves(rows, _LOSS, names, faint=faint), f"{caption}."),
    ]
    metrics = _metric_names(lines)
    rows = [row for name in metrics for row in series.named(name, series.points(lines, name))]
    if rows:
        caption = "Metrics of generated answers on the held-out task."
        parts.append(Chart(charts.curves(rows, "metric", metrics, _SMALL), caption, small=True))
    for field, title, caption in (
        ("learning_rate", "learning rate", "Learning rate of each logged step."),
        ("grad_norm", "norm of the gradient", "Norm of the gradient, before clipping."),
        (
            "norm_relative",
            "|update| / |weight|",
            "Norm of the update relative to the weight, root mean square.",
        ),
    ):
        found = series.points(lines, field)
        if len(found) > 1:
            rows = series.named(title, found)
            parts.append(Chart(charts.curves(rows, title, [title], _SMALL), caption, small=True))
    return parts


def _metric_names(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the metrics of answers in a log."""
    from lora_jax.report.scores import METRICS

    found = dict.fromkeys(name for line in lines for name in line)
    return [name for name in found if name in METRICS]


def _answers(directory: Path, summary: Mapping[str, Any]) -> list[Part]:
    lines = files.read_steps(directory / "predictions.jsonl")
    if not lines:
        lines = files.read_steps(directory / "samples.jsonl")
    if not lines:
        return []
    steps = sorted({line["step"] for line in lines})
    last = summary.get("exported_step", steps[-1])
    last = last if last in steps else steps[-1]
    columns = [(step, _name(step)) for step in dict.fromkeys((steps[0], last))]
    samples = side_by_side(lines, "step", columns)
    count = f"{len(samples)} of {len({_place(line) for line in lines}):,} prompts"
    return [Samples(samples, f"{count}, evenly spaced over the held-out data.")]


def _name(step: int) -> str:
    return "base" if step == 0 else f"step {step:,}"


def _place(line: Mapping[str, Any]) -> tuple[str, str]:
    return str(line.get("where", "")), str(line.get("prompt", ""))


def side_by_side(
    lines: Iterable[Mapping[str, Any]], key: str, columns: Sequence[tuple[Any, str]]
) -> list[Sample]:
    """Return prompts with the answers of each column, given as (value of `key`, its name)."""
    found: dict[tuple[str, str], dict[Any, Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(_place(line), {})[_column(line, key)] = line
    wanted = [value for value, _ in columns]
    whole = {place: own for place, own in found.items() if all(value in own for value in wanted)}
    samples = []
    for place, own in spread(list((whole or found).items()), _SAMPLES):
        first = next(iter(own.values()))
        answers = [_answer(name, own[value]) for value, name in columns if value in own]
        references = [clip(text) for text in first.get("references", ())]
        samples.append(Sample(clip(place[1]), references, answers, place[0]))
    return samples


def _column(line: Mapping[str, Any], key: str) -> Any:
    return (line.get(key), line["scale"]) if "scale" in line else line.get(key)


def _answer(name: str, line: Mapping[str, Any]) -> Answer:
    right = line.get("exact_match", line.get("accuracy"))
    thought = clip(line.get("thought") or "")
    return Answer(
        name, clip(line.get("answer", "")), None if right is None else right == 1, thought
    )


def _norms(directory: Path) -> list[Part]:
    lines = files.read_steps(directory / "norms.jsonl")
    if not lines or not lines[-1].get("modules"):
        return []
    step, modules = lines[-1]["step"], lines[-1]["modules"]
    labels = plots.short_names(list(modules))
    rows = []
    for label, module in zip(labels, modules.values(), strict=True):
        values = module.get("relative", [])
        cells = enumerate(values) if len(values) > 1 else [("all", x) for x in values]
        rows += [
            {"module": label, "layer": layer, "value": x} for layer, x in cells if is_number(x)
        ]
    if not rows:
        return []
    caption = (
        f"Norm of the update relative to the weight, at step {step:,}: which modules and layers "
        "changed most."
    )
    return [Chart(charts.heat_map(rows, "|update| / |weight|", labels), caption)]


def _merge(directory: Path) -> list[Part]:
    report = files.read_object(directory / "merged" / "merge_report.json")
    if not report:
        return []
    lowest, module = report.get("lowest_cosine"), report.get("lowest_cosine_module")
    share = report.get("share_changed")
    facts = Facts(
        {
            "written as": report.get("dtype"),
            "weights that change": f"{share:.2%}" if is_number(share) else None,
            "cosine with the trained update": number(report.get("cosine"), 6),
            "lowest cosine": f"{number(lowest, 6)} in {module}" if is_number(lowest) else None,
            "KL(live, merged)": _nats(report.get("kl_live_merged")),
            "KL(live, base)": _nats(report.get("kl_live_base")),
        }
    )
    kinds: dict[str, list[tuple[Any, Mapping[str, Any]]]] = {}
    for name, fit in (report.get("modules") or {}).items():
        layer = tree.layer_index(name)
        kind = name if layer is None else name.partition(f".{layer}.")[2]
        kinds.setdefault(kind, []).append(("all" if layer is None else layer, fit))
    labels, rows = plots.short_names(list(kinds)), []
    for label, fits in zip(labels, kinds.values(), strict=True):
        for layer, fit in fits:
            if is_number(fit.get("cosine")):
                rows.append({"module": label, "layer": layer, "value": max(1 - fit["cosine"], 0)})
    parts: list[Part] = [facts]
    if any(row["value"] > 1e-6 for row in rows):
        caption = (
            "Update that rounding loses: 1 - cosine between the update as written and as trained."
        )
        parts.append(Chart(charts.heat_map(rows, "1 - cosine", labels, ".1e"), caption))
    elif rows:
        parts.append(Note("Nothing is lost: 1 - cosine is at most 1e-6 in every module."))
    return parts


def _nats(value: Any) -> str | None:
    return f"{value:.3g} nats per token" if is_number(value) else None


def _memory(summary: Mapping[str, Any], about: Mapping[str, Any]) -> list[Part]:
    if not summary:
        return []
    trained, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    share = None
    if is_number(trained) and is_number(total) and total:
        share = describe_share(int(trained), int(total - trained))
    speed = summary.get("tokens_per_second")
    facts = {
        "parameters that train": share,
        "peak memory of the host": size(summary.get("peak_rss_bytes")),
        "peak memory of the device": size(summary.get("device_bytes")),
        "adapter": size(summary.get("adapter_bytes")),
        "checkpoint": size(summary.get("checkpoint_bytes")),
        "steps": counted_text(summary.get("steps")),
        "exported step": counted_text(summary.get("exported_step")),
        "supervised tokens": counted_text(summary.get("supervised_tokens")),
        "speed": f"{speed:,.0f} tokens/s" if is_number(speed) and speed > 0 else None,
        "time": duration(summary.get("seconds")),
        "started": about.get("started"),
        "lora_jax": about.get("lora_jax"),
        "run": about.get("run"),
    }
    return [Facts(facts)]


_COUNTS = {
    "examples": "examples",
    "supervised_tokens": "supervised tokens",
    "tokens": "tokens",
    "longest": "longest, in tokens",
    "truncated": "truncated",
    "dropped": "dropped",
}


def _data(summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[Part]:
    settings = config.get("data") or {}
    shown = ("train", "eval", "eval_size", "regression", "replay", "system_prompt", "max_length")
    facts = {name.replace("_", " "): settings.get(name) for name in shown}
    facts |= {"rows of a step": (config.get("train") or {}).get("batch_size")}
    parts: list[Part] = [Facts(facts)]
    rows = [
        [Cell(name), *(cell(counts.get(key)) for key in _COUNTS)]
        for name, counts in (summary.get("data") or {}).items()
    ]
    if rows:
        columns = ["set", *_COUNTS.values()]
        parts.append(Table(columns, rows, frozenset(range(1, len(columns))), sorts=False))
    return parts


def _config(directory: Path, text: str) -> list[Part]:
    if not text:
        return []
    file, again = directory / "config.yaml", directory.with_name(f"{directory.name}-again")
    words = ["lora-jax", "train", "--config", str(file), f"output_dir={again}"]
    return [
        Note("The same run again, in a new directory:"),
        Code(shlex.join(words)),
        Code(text, "config.yaml, with all defaults"),
    ]
