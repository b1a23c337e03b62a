"""Adapters from adapters, or from a fine-tuned model, as files: what `lora-jax combine` does."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lora_jax import formats, hosts
from lora_jax.adapters import combine as methods
from lora_jax.adapters import extract as extraction
from lora_jax.adapters.updates import Combined
from lora_jax.config import expand, is_directory, shown
from lora_jax.errors import UserError, raise_all
from lora_jax.formats import card, fingerprint
from lora_jax.models.common import Model
from lora_jax.targets import find_trainable
from lora_jax.tree import check_same_structure


def combine_directories(
    spec: str,
    adapters: Sequence[tuple[str, float]],
    output: str | Path,
    *,
    method: str = "sum",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    allow_change: Collection[str] = (),
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """Write the combination of PEFT directories, each with its weight, as a PEFT directory; returns
    a report of it (`_report`). `ignore` are fields of config.json known not to matter.

    Raises:
        UserError: the model or an adapter cannot be found, is damaged or does not fit; an adapter
            was made on another base, or two with other tokenizers, templates or arguments for them
            (unless named in `allow_change`); what `lora_jax.adapters.combine` refuses; `output` is
            not empty.
    """
    output = expand(output)
    _check_free(output)
    source = formats.resolve(spec)
    model = _describe(source, ignore)
    directories = [expand(path, "adapter") for path, _ in adapters]
    raise_all(
        [
            f"adapter {shown(repr(str(directory)))} does not exist, or is no directory; give a "
            "PEFT adapter directory"
            for directory in directories
            if not is_directory(directory, f"adapter {str(directory)!r}")
        ]
    )
    prints = _check_prints(source, directories, allow_change)
    arguments = _template_kwargs(directories, allow_change)
    parts, problems = [], []
    for directory, (path, weight) in zip(directories, adapters, strict=True):
        try:
            tree, config = formats.read_adapter(directory, model.params, model)
            parts.append(methods.Part(tree, config, weight, path))
        except UserError as error:
            problems.append(str(error))
    raise_all(problems)
    options: dict[str, Any] = {"rank": rank, "density": density, "seed": seed}
    plan = methods.plan(model.params, parts, method, **options)
    raise_all(formats.peft_problems(find_trainable(model.params, plan.config), model))
    with formats.open_matrices(source, model) as read:
        made = methods.carry_out(plan, read)
    options |= {"seed": seed if method.startswith("dare") else None}
    report = _report(made, model, method=method, **options) | {
        "adapters": [{"path": path, "weight": weight} for path, weight in adapters]
    }
    side = next((d for d in directories if (d / "tokenizer_config.json").is_file()), source)
    stops = {token for directory in directories for token in formats.read_stops(directory)}
    systems = {formats.read_system_prompt(directory) for directory in directories}
    prompt = {
        "chat_template_kwargs": arguments,
        "system_prompt": systems.pop() if len(systems) == 1 else None,
    }
    _write(output, spec, model, made, side, prints, report, stops, prompt)
    return report


def extract_directory(
    spec: str,
    finetuned: str,
    output: str | Path,
    *,
    rank: int,
    target_modules: Any = "all-linear",
    uncovered: str = "refuse",
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """Write what a model directory has learnt beside its base as a PEFT directory; returns a report
    of it (`_report`). `ignore` are fields of config.json known not to matter.

    Raises:
        UserError: a model cannot be found, or the two have other weights; what
            `lora_jax.adapters.extract` refuses; `output` is not empty.
    """
    output = expand(output)
    _check_free(output)
    source, other = formats.resolve(spec), formats.resolve(finetuned)
    model = _describe(source, ignore)
    tuned_model = _describe(other, ignore)
    check_same_structure(
        tuned_model.params, model.params, f"{finetuned} is no fine-tuned form of {spec}"
    )
    with ExitStack() as stack:
        read = stack.enter_context(formats.open_matrices(source, model))
        tuned = stack.enter_context(formats.open_matrices(other, tuned_model))
        changes = extraction.find_changes(model.params, read, tuned)
        config = extraction.plan(
            model.params, changes, rank=rank, target_modules=target_modules, uncovered=uncovered
        )
        raise_all(formats.peft_problems(find_trainable(model.params, config), model))
        made = extraction.extract(model.params, config, read, tuned)
    report = _report(made, model, method="extract", rank=rank) | {"finetuned": finetuned}
    side = other if (other / "tokenizer_config.json").is_file() else source
    prints = {"base": fingerprint.base_digest(source)}
    stops = formats.generation_stops(other)
    _write(output, spec, model, made, side, prints, report, stops)
    return report


def _describe(source: Path, ignore: Collection[str]) -> Model:
    model = formats.describe(source, ignore)
    for text in model.notes:
        hosts.note(text)
    return model


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output} already exists and is not empty; choose another directory or remove it"
        )


def _check_prints(
    source: Path, directories: Sequence[Path], allow_change: Collection[str]
) -> dict[str, str]:
    """That all adapters were made on this base, and with one tokenizer and one template; returns
    what they say of these.
    """
    stored = {directory: formats.read_fingerprint(directory) for directory in directories}
    found: dict[str, str] = {}
    for prints in stored.values():
        found = {name: prints[name] for name in fingerprint.PARTS if name in prints} | found
    found["base"] = fingerprint.base_digest(source)
    problems = []
    for directory, prints in stored.items():
        try:
            fingerprint.check(prints, found, str(directory), allow_change)
        except UserError as error:
            problems.append(str(error))
    raise_all(problems)
    return found


def _template_kwargs(directories: Sequence[Path], allow_change: Collection[str]) -> dict[str, Any]:
    """The arguments for the chat template that all adapters of this project were trained with; of
    different ones, where the template may change, those of the first.
    """
    known = [d for d in directories if formats.read_fingerprint(d)]
    given = [formats.read_template_kwargs(directory) for directory in known]
    if "template" not in allow_change:
        raise_all(
            [
                f"template: {other} was trained with data.chat_template_kwargs={found}, and "
                f"{known[0]} with {given[0]}; combine adapters of one prompt, or list 'template' "
                "in allow_change to write those of the first"
                for other, found in zip(known, given, strict=True)
                if found != given[0]
            ]
        )
    return given[0] if given else {}


def _report(made: Combined, model: Model, **settings: Any) -> dict[str, Any]:
    """The settings, the ranks and parameters of the result, and its distance from what was meant,
    |made - meant| / |meant|: over all modules, and of the worst.
    """
    found = find_trainable(model.params, made.config)
    ranks = [rank for target in found.targets for rank in target.ranks if rank]
    worst = max(made.errors, key=lambda name: made.errors[name]) if made.error else None
    return {
        **{name: value for name, value in settings.items() if value is not None},
        "ranks": [min(ranks), max(ranks)],
        "parameters": found.exported,
        "error": made.error,
        "worst_module": worst,
        "worst_error": made.errors[worst] if worst else 0.0,
    }


def _write(
    output: Path,
    spec: str,
    model: Model,
    made: Combined,
    side: Path,
    prints: Mapping[str, str],
    report: Mapping[str, Any],
    stops: Collection[int] = (),
    prompt: Mapping[str, Any] | None = None,
) -> None:
    task_type = "SEQ_CLS" if model.labels else "CAUSAL_LM"
    found = find_trainable(model.params, made.config)
    text = card.adapter_card(
        card.Base(spec, model.directory),
        task_type,
        report["ranks"][1],
        formats.serving_problems(found),
        {"Made of": card.table(["setting", "value"], list(_origin(report)))},
    )
    formats.write_adapter(
        output,
        made.adapters,
        model.params,
        made.config,
        base_model=formats.public_name(spec),
        task_type=task_type,
        source=side,
        card=text,
        extra={
            "base_model": spec,
            "fingerprint": dict(prints),
            "combined": dict(report),
            **(prompt or {}),
            **({"eos_token_id": sorted(stops)} if stops else {}),
        },
    )


def _origin(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return the source of the adapter for its card: no directory above the last two."""
    for one in report.get("adapters", ()):
        path = expand(one["path"]).absolute()
        yield "adapter", f"{path.parent.name}/{path.name}, weight {one['weight']:g}"
    if "finetuned" in report:
        yield "fine-tuned model", card.Base(report["finetuned"]).shown
    for name in ("method", "rank", "density", "seed", "error"):
        if report.get(name) is not None:
            yield name, report[name]
