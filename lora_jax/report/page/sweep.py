"""Report page of a sweep, from its sweep.json and metrics.jsonl. A sweep may still be running."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError, counted
from lora_jax.report.page import charts, files, series
from lora_jax.report.page.parts import (
    Cell,
    Chart,
    Code,
    Facts,
    Note,
    Page,
    Part,
    Section,
    Table,
    cell,
    is_number,
    number,
)

RATE, RANK = "train.learning_rate", "adapter.rank"
_TASK, _TRAIN = "loss of the task (nats per token)", "training loss (nats per token)"
_REGRESSION = "loss on general text (nats per token)"
_POINTS = 12_000  # of all curves of the trials
_AXES = 8  # settings of the parallel coordinates
_WIDE = 20.0  # least ratio of the ends of a logarithmic axis
Trial = Mapping[str, Any]


def make(directory: Path) -> Page:
    """Return the page of a sweep.

    Raises:
        UserError: a sweep.json that is not one.
    """
    file = directory / "sweep.json"
    found = files.read_object(file)
    trials = found.get("trials")
    if not isinstance(trials, list) or not all(
        isinstance(one, dict) and {"number", "settings", "status"} <= one.keys() for one in trials
    ):
        raise UserError(f"{file} has no list of trials; is it the file of `lora-jax sweep`?")
    config, text = files.read_config(directory / "config.yaml")
    lines = files.read_steps(directory / "metrics.jsonl")
    varied = _varied(trials)
    subjects = {
        json.dumps([one["settings"].get(n) for n in ("data.train", "data.eval", "train.objective")])
        for one in trials
    }
    sections = [
        Section("Result", _result(directory, found, config, len(subjects))),
        Section("Settings and loss", _settings(trials, varied)),
        Section("Task and forgetting", _tradeoff(trials, varied)),
        Section("All settings", _parallel(trials, varied)),
        Section("Curves", _curves(trials, varied, lines)),
        Section("Trials", _table(trials, varied, found.get("best") or ())),
        Section("Config", [Code(text, "config.yaml, shared by all trials")] if text else []),
    ]
    count = counted(len(trials), "trial")
    lead = f"{config.get('model', '')} · {count} over {', '.join(varied) or 'one setting'}"
    return Page(directory.resolve().name, lead, [one for one in sections if one.parts])


def score(trial: Trial) -> float | None:
    """Return the loss that trials are compared by: of the task, else of training."""
    task = trial.get("task_loss")
    found = trial.get("train_loss") if task is None else task
    return found if is_number(found) else None


def _score_title(trials: Sequence[Trial]) -> str:
    return _TASK if any(is_number(one.get("task_loss")) for one in trials) else _TRAIN


def _varied(trials: Sequence[Trial]) -> list[str]:
    """Return the settings in which trials differ."""
    names = dict.fromkeys(name for one in trials for name in one["settings"])
    texts = {name: {json.dumps(one["settings"].get(name)) for one in trials} for name in names}
    return [name for name in names if len(texts[name]) > 1]


def _label(trial: Trial, names: Iterable[str]) -> str:
    own = trial["settings"]
    return ", ".join(f"{name.rpartition('.')[2]} {number(own.get(name))}" for name in names)


def _result(
    directory: Path, found: Mapping[str, Any], config: Mapping[str, Any], subjects: int
) -> list[Part]:
    trials = found["trials"]
    status = Counter(str(one["status"]) for one in trials)
    by_number = {one["number"]: one for one in trials}
    best = [by_number[n] for n in found.get("best") or () if n in by_number]
    parts: list[Part] = []
    if status["running"] or status["waiting"]:
        parts.append(Note("The sweep is not over.", "warning"))
    if subjects > 1:
        parts.append(
            Note("Trials differ in their data or objective: compare losses only within each.")
        )
    programs = [one for one in found.get("groups") or () if isinstance(one, dict)]
    facts: dict[str, Any] = {
        "trials": ", ".join(f"{count:,} {name}" for name, count in status.most_common()),
        "programs": number(len(programs)) if programs else None,
    }
    if best and subjects == 1:
        facts["best trial"] = f"{best[0]['number']}: {_label(best[0], best[0]['settings'])}"
        facts["its loss"] = number(score(best[0]), 5)
        facts["its loss on general text"] = _known(best[0].get("regression_loss"))
    parts.append(Facts(facts))
    if (directory / "best.yaml").is_file():
        words = ["lora-jax", "train", "--config", str(directory / "best.yaml")]
        parts += [Note("A run of the best trial, with answers:"), Code(shlex.join(words))]
    if any(one.get("adapter") for one in trials) and config.get("model"):
        words = ["lora-jax", "serve", "--model", config["model"]]
        words += ["--adapter-root", str(directory / "adapters")]
        parts += [Note("The best adapters, served:"), Code(shlex.join(words))]
    return parts


def _known(value: Any) -> str | None:
    return number(value, 5) if is_number(value) else None


def _comparable(trials: Sequence[Trial]) -> list[Trial]:
    """Return trials whose loss is that of all their steps."""
    return [one for one in trials if one["status"] == "complete" and score(one) is not None]


def is_logarithmic(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= _WIDE


def choose_axes(trials: Sequence[Trial], varied: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the setting for the horizontal axis and that for the colours: the learning rate and
    the rank where they vary, else other numbers, and for the colours also texts.
    """
    values = {name: [one["settings"].get(name) for one in trials] for name in varied}
    numeric = [n for n in varied if n != "seed" and all(map(is_number, values[n]))]
    order = sorted(numeric, key=lambda n: (n != RATE, -len(set(values[n]))))
    x = order[0] if order else None
    others = [n for n in varied if n not in (x, "seed")]
    few = [n for n in others if len({json.dumps(value) for value in values[n]}) <= 10]
    group = RANK if RANK in few else few[0] if few else None
    return x, group


def _settings(trials: Sequence[Trial], varied: Sequence[str]) -> list[Part]:
    done = _comparable(trials)
    x, group = choose_axes(done, varied)
    if not done or x is None:
        return []
    rows = []
    for one in done:
        own, value = one["settings"], None if group is None else one["settings"].get(group)
        rows.append(
            {
                "x": own[x],
                "y": score(one),
                "group": value if is_number(value) else str(value),
                "trial": one["number"],
                "label": _label(one, varied),
            }
        )
    log = is_logarithmic([row["x"] for row in rows])
    lines = f"; a line through the means for each {group}" if group else ""
    caption = f"Complete trials: loss over {x}{lines}. Lower is better."
    title = _score_title(done)
    return [Chart(charts.by_setting(rows, x, title, group, log), caption)]


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return True for each point that no other is at least as good as in both losses, and better
    in one.
    """
    return [not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in points) for p in points]


def _tradeoff(trials: Sequence[Trial], varied: Sequence[str]) -> list[Part]:
    both = ("regression_loss", "task_loss")
    done = [one for one in _comparable(trials) if all(is_number(one.get(n)) for n in both)]
    if not done:
        return []
    flags = pareto([(one["regression_loss"], one["task_loss"]) for one in done])
    rows = [
        {
            "x": one["regression_loss"],
            "y": one["task_loss"],
            "front": flag,
            "set": "best trade-offs" if flag else "others",
            "trial": one["number"],
            "label": _label(one, varied),
        }
        for one, flag in zip(done, flags, strict=True)
    ]
    caption = (
        "Complete trials: a trial on the dashed line is beaten by no other in both losses. The "
        "number is that of the trial."
    )
    return [Chart(charts.front(rows, _REGRESSION, _TASK), caption)]


def _places(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Return the place of each value on an axis from 0 to 1, and the ticks of the axis."""
    if all(map(is_number, values)):
        log = is_logarithmic(values)
        scaled = [math.log(x) if log else float(x) for x in values]
        low, span = min(scaled), (max(scaled) - min(scaled)) or 1.0
        places = [(x - low) / span for x in scaled]
        ticks = dict(sorted(zip(places, values, strict=True)))
        if len(ticks) > 6:
            ticks = {place: ticks[place] for place in (0.0, 1.0)}
        return places, [(place, number(value)) for place, value in ticks.items()]
    texts = [number(value) if is_number(value) else json.dumps(value) for value in values]
    kinds = list(dict.fromkeys(texts))
    at = {text: i / max(1, len(kinds) - 1) for i, text in enumerate(kinds)}
    shown = kinds if len(kinds) <= 12 else []
    return [at[text] for text in texts], [(at[t], t.strip('"')[:24]) for t in shown]


def _parallel(trials: Sequence[Trial], varied: Sequence[str]) -> list[Part]:
    done = _comparable(trials)
    names = list(varied)[:_AXES]
    if len(done) < 2 or len(names) < 2:
        return []
    columns = {name: [one["settings"].get(name) for one in done] for name in names}
    columns |= {"loss": [score(one) for one in done]}
    rows, ticks = [], []
    for name, values in columns.items():
        places, marks = _places(values)
        for one, place, value in zip(done, places, values, strict=True):
            own = {"trial": one["number"], "axis": name, "place": place}
            rows.append(own | {"text": number(value), "score": score(one)})
        ticks += [{"axis": name, "place": place, "text": text} for place, text in marks]
    left = f" (the first {_AXES} settings)" if len(varied) > _AXES else ""
    caption = f"A line for each complete trial{left}; point at a mark to see one alone."
    return [Chart(charts.parallel(rows, ticks, list(columns), "loss"), caption)]


def _curves(
    trials: Sequence[Trial], varied: Sequence[str], lines: Sequence[Mapping[str, Any]]
) -> list[Part]:
    by_trial: dict[Any, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_trial.setdefault(line.get("trial"), []).append(line)
    most = max(10, min(series.MOST, _POINTS // max(1, len(trials))))
    scored = [one for one in trials if score(one) is not None]
    parts: list[Part] = []
    for field, title in (
        ("loss", _TRAIN),
        ("task_loss", _TASK),
        ("regression_loss", _REGRESSION),
    ):
        rows, longest = [], 0
        for one in scored:
            curve = series.points(by_trial.get(one["number"], ()), field)
            longest = max(longest, len(curve))
            about = {"trial": one["number"], "label": _label(one, varied), "score": score(one)}
            for point in series.thin(curve, most):
                rows.append(about | {"step": point["step"], "value": point["value"]})
        if longest > 1:
            thinned = ", a point is the mean of several steps" if longest > most else ""
            caption = f"{title[0].upper()}{title[1:]} of every trial{thinned}."
            parts.append(Chart(charts.members(rows, title), caption))
    return parts


def _table(trials: Sequence[Trial], varied: Sequence[str], best: Sequence[Any]) -> list[Part]:
    losses = [
        (name, title)
        for name, title in (
            ("task_loss", "task loss"),
            ("regression_loss", "loss on general text"),
            ("train_loss", "training loss"),
        )
        if any(is_number(one.get(name)) for one in trials)
    ]
    more = dict.fromkeys(
        name for one in trials for name in one if name not in _KNOWN and is_number(one[name])
    )
    losses += [(name, name.replace("_", " ")) for name in more]
    has_reason = any(one.get("reason") for one in trials)
    columns = ["trial", *varied, *(title for _, title in losses), "steps", "status"]
    columns += ["reason"] * has_reason
    chosen = set(map(str, best))
    rows = []
    for one in sorted(trials, key=_order):
        row = [cell(one["number"], best=str(one["number"]) in chosen)]
        row += [_setting(one["settings"].get(name)) for name in varied]
        row += [cell(one.get(name), 5) for name, _ in losses]
        row += [cell(one.get("steps")), Cell(str(one["status"]), str(one["status"]))]
        row += [Cell(str(one.get("reason") or ""))] * has_reason
        rows.append(row)
    end = len(varied) + len(losses) + 2
    texts = {i + 1 for i, n in enumerate(varied) if not all(map(is_number, _of(trials, n)))}
    numeric = frozenset(range(end)) - texts
    caption = "The best are marked; a click on a heading sorts."
    return [Table(columns, rows, numeric, caption)]


_KNOWN = {"number", "settings", "status", "task_loss", "regression_loss", "train_loss", "steps"}
_KNOWN |= {"group", "adapter", "reason"}


def _of(trials: Sequence[Trial], name: str) -> list[Any]:
    return [one["settings"].get(name) for one in trials]


def _order(trial: Trial) -> tuple[bool, float, Any]:
    found = score(trial)
    whole = trial["status"] == "complete" and found is not None
    return not whole, found if found is not None else math.inf, trial["number"]


def _setting(value: Any) -> Cell:
    return cell(value) if is_number(value) or value is None else cell(_text(value))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
