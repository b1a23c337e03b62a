"""Files of combined or extracted adapters: the implementation of `lora-jax combine`."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
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
from lora_jax.tree import check_same_structure


@dataclass(frozen=True)
class Formula:
    """Arguments of `lora_jax.adapters.combine.combine`."""

    method: str = "sum"
    rank: int | None = None
    density: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Origin:
    """Facts about the training that a new adapter inherits from its source directories."""

    side_files: Path  # directory of the tokenizer
    fingerprint: Mapping[str, str]
    stops: Collection[int] = ()  # IDs that end an answer
    prompt: Mapping[str, Any] = field(default_factory=dict)  # arguments of the chat template, ..


def combine_directories(
    spec: str,
    adapters: Sequence[tuple[str, float]],
    output: str | Path,
    formula: Formula = Formula(),
    *,
    allow_change: Collection[str] = (),
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """Write the combination of PEFT directories, each with its weight, as a PEFT directory; return
    a report of it (`_report`). `ignore` are fields of config.json known not to matter.

    Raises:
        UserError: the model or an adapter cannot be found, is damaged or does not fit; an adapter
            was made on another base; adapters differ in tokenizer, template or its arguments
            (unless named in `allow_change`); what `lora_jax.adapters.combine` refuses; `output` is
            not empty.
    """
    output = expand(output)
    _check_free(output)
    source = formats.resolve(spec)
    model = _describe(source, ignore)
    directories = _adapter_directories([path for path, _ in adapters])
    digests = _check_fingerprints(source, directories, allow_change)
    origin = _origin(source, directories, digests, allow_change)
    parts = _read_parts(model, directories, adapters)
    options: dict[str, Any] = {
        "rank": formula.rank,
        "density": formula.density,
        "seed": formula.seed,
    }
    plan = methods.plan(model.params, parts, formula.method, **options)
    raise_all(formats.peft_problems(plan.trainable, model))
    with formats.open_matrices(source, model) as read:
        made = methods.carry_out(plan, read)
    options |= {"seed": formula.seed if formula.method.startswith("dare") else None}
    report = _report(made, method=formula.method, **options) | {
        "adapters": [{"path": path, "weight": weight} for path, weight in adapters]
    }
    _write(output, spec, model, made, origin, report)
    return report


def _adapter_directories(paths: Sequence[str]) -> list[Path]:
    directories = [expand(path, "adapter") for path in paths]
    raise_all(
        [
            f"adapter {shown(repr(str(directory)))} does not exist, or is no directory; give a "
            "PEFT adapter directory"
            for directory in directories
            if not is_directory(directory, f"adapter {str(directory)!r}")
        ]
    )
    return directories


def _read_parts(
    model: Model, directories: Sequence[Path], adapters: Sequence[tuple[str, float]]
) -> list[methods.Part]:
    parts, problems = [], []
    for directory, (path, weight) in zip(directories, adapters, strict=True):
        try:
            tree, config = formats.read_adapter(directory, model.params, model)
            parts.append(methods.Part(tree, config, weight, path))
        except UserError as error:
            problems.append(str(error))
    raise_all(problems)
    return parts


def _origin(
    source: Path,
    directories: Sequence[Path],
    digests: Mapping[str, str],
    allow_change: Collection[str],
) -> _Origin:
    systems = {formats.read_system_prompt(directory) for directory in directories}
    prompt = {
        "chat_template_kwargs": _template_kwargs(directories, allow_change),
        "system_prompt": systems.pop() if len(systems) == 1 else None,
    }
    side = next((d for d in directories if (d / "tokenizer_config.json").is_file()), source)
    stops = {token for directory in directories for token in formats.read_stops(directory)}
    return _Origin(side, digests, stops, prompt)


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
    """Write the difference of a fine-tuned model from its base as a PEFT directory; return a report
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
        found = extraction.plan(
            model.params, changes, rank=rank, target_modules=target_modules, uncovered=uncovered
        )
        raise_all(formats.peft_problems(found, model))
        made = extraction.extract(model.params, found, read, tuned)
    report = _report(made, method="extract", rank=rank) | {"finetuned": finetuned}
    origin = _Origin(
        side_files=other if (other / "tokenizer_config.json").is_file() else source,
        fingerprint={"base": fingerprint.base_digest(source)},
        stops=formats.generation_stops(other),
    )
    _write(output, spec, model, made, origin, report)
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


def _check_fingerprints(
    source: Path, directories: Sequence[Path], allow_change: Collection[str]
) -> dict[str, str]:
    """Check that all adapters were made on this base, and with one tokenizer and one template;
    return their common fingerprint.
    """
    stored = {directory: formats.read_fingerprint(directory) for directory in directories}
    found: dict[str, str] = {}
    for digests in stored.values():
        found = {name: digests[name] for name in fingerprint.PARTS if name in digests} | found
    found["base"] = fingerprint.base_digest(source)
    problems = []
    for directory, digests in stored.items():
        try:
            fingerprint.check(digests, found, str(directory), allow_change)
        except UserError as error:
            problems.append(str(error))
    raise_all(problems)
    return found


def _template_kwargs(directories: Sequence[Path], allow_change: Collection[str]) -> dict[str, Any]:
    """Return the chat template arguments that all adapters of this project were trained with; the
    first adapter's, if the template may change.
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


def _report(made: Combined, **settings: Any) -> dict[str, Any]:
    """Return the settings, the ranks and parameters of the result, and its relative error |result -
    exact| / |exact|: over all modules, and of the worst.
    """
    ranks = [rank for target in made.trainable.targets for rank in target.ranks if rank]
    worst = max(made.errors, key=lambda name: made.errors[name]) if made.error else None
    return {
        **{name: value for name, value in settings.items() if value is not None},
        "ranks": [min(ranks), max(ranks)],
        "parameters": made.trainable.exported,
        "error": made.error,
        "worst_module": worst,
        "worst_error": made.errors[worst] if worst else 0.0,
    }


def _write(
    output: Path,
    spec: str,
    model: Model,
    made: Combined,
    origin: _Origin,
    report: Mapping[str, Any],
) -> None:
    text = card.adapter_card(
        card.Base(spec, model.directory),
        card.task_of(model),
        formats.file_rank(made.trainable),
        formats.serving_problems(made.trainable, model.hf_config.get("model_type")),
        {"Made of": card.table(["setting", "value"], list(_sources(report)))},
    )
    formats.write_adapter(
        output,
        made.adapters,
        model.params,
        made.trainable,
        base_model=formats.public_name(spec),
        task_type="SEQ_CLS" if model.labels else "CAUSAL_LM",
        source=origin.side_files,
        card=text,
        extra={
            "base_model": spec,
            "fingerprint": dict(origin.fingerprint),
            "combined": dict(report),
            **origin.prompt,
            **({"eos_token_id": sorted(origin.stops)} if origin.stops else {}),
        },
    )


def _sources(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return the sources of the adapter for its card; only the last two parts of a path."""
    for one in report.get("adapters", ()):
        path = expand(one["path"]).absolute()
        yield "adapter", f"{path.parent.name}/{path.name}, weight {one['weight']:g}"
    if "finetuned" in report:
        yield "fine-tuned model", card.Base(report["finetuned"]).shown
    for name in ("method", "rank", "density", "seed", "error"):
        if report.get(name) is not None:
            yield name, report[name]
