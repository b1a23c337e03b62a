"""Checks of a config: each value by the rule of its setting, and settings against each other.
Checks that need the model are made when it is read.
"""

import dataclasses
import datetime
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lora_jax.config.adapter import DATA_INITS, AdapterConfig
from lora_jax.config.objective import OBJECTIVES
from lora_jax.config.options import options_of, type_problems
from lora_jax.config.settings import PRINTS, Config, DataConfig, all_keys
from lora_jax.config.types import as_setting
from lora_jax.errors import nearest, raise_all

_OPTIONS = options_of(Config)
_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes that file systems take


def check(config: Config) -> None:
    """Raise one `UserError` with every problem that is known without the model.

    Raises:
        UserError: values of another type or out of range; settings that contradict each other.
    """
    raise_all(find_problems(config))


def find_problems(config: Config) -> list[str]:
    """Return every problem of a config in one line, which begins with the key of a setting."""
    if wrong := list(type_problems(config)):
        return wrong
    values = _flatten(config)
    # Comparisons with these would only say the same again.
    if wrong := list(_not_finite(values)):
        return wrong
    rules = {key: rule for key, rule in _OPTIONS.items() if not key.startswith("adapter.")}
    problems = [*filter(None, (rule.problem(key, values[key]) for key, rule in rules.items()))]
    micro = config.train.micro_batch_size
    if micro and config.train.batch_size % micro:
        problems.append(
            f"train.batch_size={config.train.batch_size} is not a multiple of "
            f"train.micro_batch_size={micro}"
        )
    axes = dataclasses.asdict(config.mesh)
    if 0 in axes.values() or list(axes.values()).count(-1) > 1:
        problems.append(
            f"mesh={axes}: every axis is at least 1, and one of them may be -1 for the devices "
            "that are left"
        )
    problems += _path_problems(values)
    problems += _data_problems(config.data)
    problems += _objective_problems(config, values)
    problems += [*_run_problems(config), *_export_problems(config), *_base_problems(config)]
    if not config.model:
        problems.append(
            "model is not set: a Hugging Face directory, a .gguf file, org/name, or "
            "demo:smollm2-135m-instruct"
        )
    return problems


def _flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the settings by dotted key."""
    found = {}
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        inner = dataclasses.is_dataclass(value)
        found |= _flatten(value, f"{prefix}{f.name}.") if inner else {prefix + f.name: value}
    return found


def _not_finite(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings with a number that is infinite or NaN."""

    def floats(value: Any) -> Iterator[float]:
        if isinstance(value, float):
            yield value
        elif isinstance(value, Mapping | list | tuple):
            for one in value.values() if isinstance(value, Mapping) else value:
                yield from floats(one)

    for key, value in values.items():
        wrong = [one for one in floats(value) if not math.isfinite(one)]
        if wrong:
            yield f"{key}={as_setting(value)}: {wrong[0]} is not a finite number"


def _objective_problems(config: Config, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings that `train.objective` does not read, or that it cannot go with."""
    objective, defaults = config.train.objective, _flatten(Config())
    if objective not in OBJECTIVES:
        return
    for key, rule in _OPTIONS.items():
        readers = rule.objectives
        if readers and objective not in readers and values[key] != defaults[key]:
            yield (
                f"{key}={as_setting(values[key])} is for train.objective={' or '.join(readers)}, "
                f"and it is {objective}"
            )
    if config.train.compares_answers and config.data.completion is not None:
        yield (
            f"data.completion={config.data.completion!r} makes one answer of a row, and "
            f"train.objective={objective} reads its columns by their names: docs/data.md"
        )
    if config.train.needs_reference and config.adapter.trains_everything:
        yield (
            f"train.objective={objective} compares with the model before training, and "
            "adapter.method=full keeps no copy of it; train an adapter, or choose orpo or simpo"
        )
    if config.train.needs_reference and config.objective.reference != "start":
        if config.adapter.changes_base:
            yield (
                f"objective.reference={config.objective.reference}: adapter.init="
                f"{config.adapter.init} subtracts its factors from the base; use start, which is "
                "the base at the first step"
            )
    yield from _replay_problems(config)
    if config.train.compares_answers and config.adapter.init in DATA_INITS:
        yield (
            f"adapter.init={config.adapter.init} looks at rows with one answer, and "
            f"train.objective={objective} has others; choose another init"
        )


def _replay_problems(config: Config) -> Iterator[str]:
    """Yield settings that do not go with `data.replay`, and uses of it that are missing."""
    weight, data = config.objective.base_kl, config.data
    if data.replay is None:
        if weight:
            yield f"objective.base_kl={weight:g} is measured on data.replay, which is not set"
        if data.replay_share != DataConfig().replay_share:
            yield f"data.replay_share={data.replay_share:g} needs data.replay, which is not set"
        return
    if data.train is None:
        yield f"data.replay={data.replay!r} goes with data.train, which is not set"
    if data.streaming:
        yield "data.replay is mixed with rows that are read at once; set data.streaming=false"
    if config.train.compares_answers and not weight:
        yield (
            f"data.replay={data.replay!r}: train.objective={config.train.objective} learns nothing "
            "from general text; set objective.base_kl, which compares with the base on it"
        )
    if weight and config.adapter.trains_everything:
        yield (
            f"objective.base_kl={weight:g} compares with the base, and adapter.method=full keeps "
            "no copy of it; train an adapter, or leave base_kl out and mix data.replay in"
        )
    if weight and config.adapter.changes_base:
        yield (
            f"objective.base_kl={weight:g} compares with the base, and adapter.init="
            f"{config.adapter.init} subtracts its factors from it; choose another init"
        )


def _path_problems(values: Mapping[str, Any]) -> Iterator[str]:
    for key in (key for key, rule in _OPTIONS.items() if rule.is_path):
        text = (values[key] or "").encode("utf-8", "surrogateescape")
        names = [len(name) for name in text.split(b"/")]
        if max(names) > _LONGEST_NAME or len(text) > _LONGEST_PATH:
            yield (
                f"{key}={as_setting(values[key])} has {len(text)} bytes: a name can have up to "
                f"{_LONGEST_NAME} bytes, and a path up to {_LONGEST_PATH}"
            )


def _data_problems(data: DataConfig) -> Iterable[str]:
    sources = data.train
    if isinstance(sources, Mapping):
        wrong = {name: weight for name, weight in sources.items() if not weight > 0}
        if wrong or not sources:
            yield f"data.train: weights must be numbers above 0, not {wrong}"
    if data.template_date is not None and not _is_date(data.template_date):
        yield f"data.template_date={data.template_date!r} is no day of the form 2026-11-26"
    if data.eval_size is not None and data.eval is not None:
        yield "data.eval and data.eval_size are both set; choose one"
    if data.eval_size is not None and data.eval_size >= 1 and data.eval_size % 1:
        yield f"data.eval_size={data.eval_size} must be a share below 1 or a whole number"
    for name in ("eval_size", "drop_overlap"):
        if getattr(data, name) and sources is None:
            yield f"data.{name} needs data.train, which is not set"
    if data.streaming:
        if isinstance(sources, dict) and len(sources) != 1:
            yield "data.streaming takes one source, and data.train names several"
        if data.eval_size is not None:
            yield "data.eval_size cannot hold rows out of a stream; give held-out rows in data.eval"
        if data.drop_overlap:
            yield "data.drop_overlap needs all of data.train, which data.streaming does not read"
    if data.labels is not None and len(data.labels) < 2:
        yield f"data.labels={data.labels!r}: at least two are needed"


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _run_problems(config: Config) -> Iterable[str]:
    train = config.train
    if train.epochs is not None and config.data.streaming:
        yield (
            f"train.epochs={train.epochs:g} needs the number of rows, which is not known with "
            "data.streaming; set train.steps"
        )
    if "://" in config.output_dir:
        yield (
            f"output_dir={config.output_dir!r} is no directory: logs and exports need one; "
            "only checkpoint_dir may be a bucket, such as gs://bucket/path"
        )
    place = config.checkpoint_dir or ""
    if "://" in place and not place.startswith("gs://"):
        yield (
            f"checkpoint_dir={place!r}: checkpoints can be written to directories and to buckets "
            "of Google Cloud, gs://bucket/path; other stores cannot commit one in a single step"
        )
    keys = [*all_keys(Config, ""), *PRINTS]
    sections = {key.partition(".")[0] for key in keys}
    for name in config.allow_change:
        if name not in keys and name not in sections:
            yield (
                f"allow_change: {name!r} is neither a setting nor one of: {', '.join(PRINTS)}."
                f"{nearest(name, keys)}"
            )
    yield from _evaluation_problems(config)


def _evaluation_problems(config: Config) -> Iterable[str]:
    """Yield settings that need a measurement which the evaluations do not make."""
    train, metric = config.train, config.train.metric_for_best_model
    held_out = config.data.eval is not None or config.data.eval_size is not None
    every = config.eval.generate_every
    if every is not None and not (held_out and config.eval.generate):
        yield (
            f"eval.generate_every={every} needs data.eval (or data.eval_size) and "
            "eval.generate=true"
        )
    if every is not None and (train.eval_every is None or every % train.eval_every):
        yield (
            f"eval.generate_every={every} is not a multiple of train.eval_every="
            f"{train.eval_every}: answers are generated at evaluations"
        )
    users = [
        f"train.{name}"
        for name in ("early_stopping_patience", "load_best_model_at_end")
        if getattr(train, name)
    ]
    if not users and metric != type(train)().metric_for_best_model:
        yield (
            f"train.metric_for_best_model={metric} has no effect without "
            "train.load_best_model_at_end or train.early_stopping_patience"
        )
    known = (*train.metrics_without_answers, *dict.fromkeys([*config.eval.metrics, "accuracy"]))
    if metric not in known:
        yield (
            f"train.metric_for_best_model={metric!r} is not measured; choose "
            f"{', '.join(train.metrics_without_answers)} or one of eval.metrics."
            f"{nearest(metric, known)}"
        )
        return
    for name in users:
        if metric == "regression_loss":
            if not (config.data.regression is not None and train.eval_every):
                yield f"{name} by regression_loss needs data.regression and train.eval_every"
        elif not (held_out and train.eval_every):
            yield f"{name} needs data.eval (or data.eval_size) and train.eval_every"
        elif metric not in train.metrics_without_answers and every != train.eval_every:
            yield (
                f"{name} by {metric} needs answers at every evaluation: set "
                f"eval.generate_every={train.eval_every}, the value of train.eval_every"
            )


def _export_problems(config: Config) -> Iterable[str]:
    if config.export.merged and (problem := merge_problem(config)):
        yield problem
    if config.export.merged and config.adapter.trains_virtual_tokens:
        yield (
            f"export.merged=true: adapter.method={config.adapter.method} trains virtual tokens, "
            "which cannot be merged into weights; export.peft writes them"
        )
    if config.export.max_merge_kl is not None and config.export.probe_rows == 0:
        yield "export.max_merge_kl is measured on export.probe_rows, which is 0; leave one out"


def _base_problems(config: Config) -> Iterable[str]:
    """Yield settings that do not go with the dtype of the base or with the init."""
    if config.adapter.method == "full" and config.base_dtype in ("int8", "nf4"):
        yield (
            "adapter.method=full trains the weights themselves, and "
            f"base_dtype={config.base_dtype} keeps them in a form that cannot be trained; choose "
            "float32 or bfloat16"
        )
    for name, rule in options_of(AdapterConfig).items():
        value, inits = getattr(config.adapter, name), rule.inits
        if inits and value != getattr(AdapterConfig(), name) and config.adapter.init not in inits:
            yield (
                f"adapter.{name}={value} is for adapter.init={' and '.join(inits)}, and it is "
                f"{config.adapter.init}"
            )
    if config.adapter.init == "loftq" and config.base_dtype not in ("int8", "nf4"):
        yield (
            f"adapter.init=loftq corrects the error of a quantised base, and base_dtype="
            f"{as_setting(config.base_dtype)} is not quantised; set base_dtype to nf4 or int8"
        )


def merge_problem(config: Config) -> str | None:
    """Return the reason why a merge needs a decision of the user first, or None."""
    chosen = config.export.quantized_base
    if config.base_dtype not in ("int8", "nf4"):
        return None
    if config.adapter.init == "loftq" and chosen != "dequantized":
        return (
            f"export.quantized_base={as_setting(chosen)}: adapters of init=loftq start as a "
            "correction of the quantised base, and would be wrong on the model's own weights; set "
            "it to dequantized"
        )
    if chosen is not None:
        return None
    return (
        f"base_dtype={config.base_dtype}: adapters train on dequantised weights, which differ from "
        "those of the model's files. Set export.quantized_base=dequantized to merge into the "
        "weights of the training, or =original to merge into those of the files"
    )
