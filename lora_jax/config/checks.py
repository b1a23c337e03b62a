"""Checks of values, alone and together. What needs the model is checked with it."""

import dataclasses
import datetime
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lora_jax.config.adapter import DATA_INITS, VIRTUAL_TOKEN_METHODS, AdapterConfig
from lora_jax.config.settings import LOSSES, PRINTS, Config, DataConfig, all_keys
from lora_jax.config.types import show
from lora_jax.errors import nearest, raise_all

_CHOICES = {
    "base_dtype": (None, "float32", "bfloat16", "int8", "nf4"),
    "data.too_long": ("truncate", "drop", "error"),
    "data.on_bad_row": ("error", "drop"),
    "export.dtype": (None, "float32", "bfloat16", "float16"),
    "export.quantized_base": (None, "original", "dequantized"),
    "train.schedule": ("constant", "linear", "cosine"),
    "train.compute_dtype": ("float32", "bfloat16"),
    "train.optimizer_memory": ("device", "host"),
    "train.attention": ("auto", "xla", "cudnn", "splash"),
    "train.remat": ("none", "full", "dots", "offload"),
}
LARGEST_SEED = 2**63 - 1  # that JAX takes
_ROWS, _STEPS, _SECONDS = 10**6, 10**9, 10**7  # more is a slip of the hand
# The least and the most of a setting; None has no bound on that side.
_RANGES: dict[str, tuple[float, float | None]] = {
    "data.max_length": (2, 10**7),
    "data.stream_rows": (1, 10**8),
    "train.steps": (1, _STEPS),
    "train.batch_size": (1, _ROWS),
    "train.micro_batch_size": (1, _ROWS),
    "train.warmup_steps": (0, _STEPS),
    "train.eval_every": (1, _STEPS),
    "train.save_every": (1, _STEPS),
    "train.save_total_limit": (1, _STEPS),
    "train.early_stopping_patience": (1, _STEPS),
    "train.log_every": (1, _STEPS),
    "train.loss_chunk": (1, 10**8),
    "train.router_aux_loss_coef": (0, None),
    "train.weight_decay": (0, None),
    "train.epsilon": (0, None),
    "train.final_rate": (0, 1),
    "eval.batch_size": (1, _ROWS),
    "eval.loss_examples": (1, 10**9),
    "eval.generate_every": (1, _STEPS),
    "eval.generate_examples": (1, 10**9),
    "eval.generate_batch_size": (1, _ROWS),
    "eval.max_new_tokens": (1, 10**7),
    "eval.samples": (0, 10**9),
    "export.probe_rows": (0, _ROWS),
    "hosts.start_timeout": (1, _SECONDS),
    "hosts.lost_after": (5, _SECONDS),
    "mesh.data": (-1, _ROWS),
    "mesh.fsdp": (-1, _ROWS),
    "mesh.tensor": (-1, _ROWS),
    "seed": (0, LARGEST_SEED),
}
_ABOVE_ZERO = (
    *("train.learning_rate", "train.grad_clip", "train.epochs"),
    *("data.eval_size", "export.max_merge_kl"),
)
_BELOW_ONE = ("train.beta1", "train.beta2")
_MOST_EPOCHS = 10**6
# Settings of some inits alone.
_OF_INITS = {"calibration_batches": DATA_INITS, "eva_rho": ("eva",), "loftq_iter": ("loftq",)}
_SINKS = ("tensorboard", "wandb", "trackio")
# Settings that name files or directories, and what a file system takes at most, in bytes.
_PATHS = (
    *("model", "output_dir", "checkpoint_dir", "adapter.path"),
    *("data.eval", "data.regression", "data.chat_template"),
)
_LONGEST_NAME, _LONGEST_PATH = 255, 4000


def check(config: Config) -> None:
    """Raise one `UserError` with every value that is out of range. What needs the model is checked
    with the model.
    """
    raise_all(find_problems(config))


def find_problems(config: Config) -> list[str]:
    """Return every value that is out of range, one line each that begins with its key."""
    values = _flatten(config)
    # Comparisons with these would only say the same again.
    if wrong := list(_not_finite(values)):
        return wrong
    problems = []
    for key, choices in _CHOICES.items():
        if (value := values[key]) not in choices:
            names = [str(choice) for choice in choices if choice is not None]
            problems.append(
                f"{key}={value!r} is not one of: {', '.join(names)}.{nearest(str(value), names)}"
            )
    for key, (least, most) in _RANGES.items():
        value = values[key]
        if value is not None and value < least:
            problems.append(f"{key}={value} must be at least {least}")
        if value is not None and most is not None and value > most:
            problems.append(f"{key}={show(value)} must be at most {most}")
    for key in _ABOVE_ZERO:
        if values[key] is not None and not values[key] > 0:
            problems.append(f"{key}={values[key]} must be above 0")
    for key in _BELOW_ONE:
        if not 0 <= values[key] < 1:
            problems.append(f"{key}={values[key]} must be at least 0 and below 1")
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
            yield f"{key}={show(value)}: {wrong[0]} is not a finite number"


def _path_problems(values: Mapping[str, Any]) -> Iterator[str]:
    for key in _PATHS:
        text = (values[key] or "").encode("utf-8", "surrogateescape")
        names = [len(name) for name in text.split(b"/")]
        if max(names) > _LONGEST_NAME or len(text) > _LONGEST_PATH:
            yield (
                f"{key}={show(values[key])} has {len(text)} bytes: a name can have up to "
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
            yield "data.eval_size cannot hold rows out of a stream; name them in data.eval"
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
    if train.epochs is not None and train.epochs > _MOST_EPOCHS:
        yield f"train.epochs={train.epochs:g} must be at most {_MOST_EPOCHS}"
    if train.epochs is not None and config.data.streaming:
        yield (
            f"train.epochs={train.epochs:g} needs the number of rows, which is not known with "
            "data.streaming; set train.steps"
        )
    if not (isinstance(config.resume, bool) or config.resume == "auto"):
        yield f"resume={config.resume!r} is not one of: false, true, auto."
    if "://" in config.output_dir:
        yield (
            f"output_dir={config.output_dir!r} is no directory: logs and exports go to one; "
            "checkpoint_dir may be a bucket, as in gs://bucket/path"
        )
    place = config.checkpoint_dir or ""
    if "://" in place and not place.startswith("gs://"):
        yield (
            f"checkpoint_dir={place!r}: checkpoints can be written to directories and to buckets "
            "of Google Cloud, gs://bucket/path, where they are committed at once or not at all"
        )
    for name in train.report_to:
        if name not in _SINKS:
            yield (
                f"train.report_to: {name!r} is not one of: {', '.join(_SINKS)}."
                f"{nearest(name, _SINKS) or ' [] reports to none of them.' * (name == 'none')}"
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
    if train.divergence is not None and not train.divergence > 1:
        yield f"train.divergence={train.divergence} must be above 1; null never stops"


def _evaluation_problems(config: Config) -> Iterable[str]:
    """Yield what is asked of evaluations that do not measure it."""
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
    known = (*LOSSES, *dict.fromkeys([*config.eval.metrics, "accuracy"]))
    if metric not in known:
        yield (
            f"train.metric_for_best_model={metric!r} is not measured: it is one of {known[0]}, "
            f"{known[1]} and what eval.metrics lists.{nearest(metric, known)}"
        )
        return
    for name in users:
        if metric == "regression_loss":
            if not (config.data.regression is not None and train.eval_every):
                yield f"{name} by regression_loss needs data.regression and train.eval_every"
        elif not (held_out and train.eval_every):
            yield f"{name} needs data.eval (or data.eval_size) and train.eval_every"
        elif metric not in LOSSES and every != train.eval_every:
            yield (
                f"{name} by {metric} needs answers at every evaluation: set "
                f"eval.generate_every={train.eval_every}, the value of train.eval_every"
            )


def _export_problems(config: Config) -> Iterable[str]:
    if config.export.merged and (problem := merge_problem(config)):
        yield problem
    if config.export.merged and config.adapter.method in VIRTUAL_TOKEN_METHODS:
        yield (
            f"export.merged=true: adapter.method={config.adapter.method} trains virtual tokens, "
            "which cannot be merged into weights; export.peft writes them"
        )
    cosine = config.export.min_merge_cosine
    if cosine is not None and not 0 < cosine <= 1:
        yield f"export.min_merge_cosine={cosine} must be above 0 and at most 1"
    if config.export.max_merge_kl is not None and config.export.probe_rows == 0:
        yield "export.max_merge_kl is measured on export.probe_rows, which is 0; leave one out"


def _base_problems(config: Config) -> Iterable[str]:
    """Yield what does not go with the dtype of the base, or with the init."""
    if config.adapter.method == "full" and config.base_dtype in ("int8", "nf4"):
        yield (
            "adapter.method=full trains the weights themselves, and "
            f"base_dtype={config.base_dtype} keeps them in a form that cannot be trained; choose "
            "float32 or bfloat16"
        )
    for name, inits in _OF_INITS.items():
        value = getattr(config.adapter, name)
        if value != getattr(AdapterConfig(), name) and config.adapter.init not in inits:
            yield (
                f"adapter.{name}={value} is for adapter.init={' and '.join(inits)}, and it is "
                f"{config.adapter.init}"
            )
    if config.adapter.init == "loftq" and config.base_dtype not in ("int8", "nf4"):
        yield (
            f"adapter.init=loftq corrects the error of a quantised base, and base_dtype="
            f"{config.base_dtype} has none; set base_dtype to nf4 or int8"
        )


def merge_problem(config: Config) -> str | None:
    """Return why this run cannot be merged without a decision, or None."""
    chosen = config.export.quantized_base
    if config.base_dtype not in ("int8", "nf4"):
        return None
    if config.adapter.init == "loftq" and chosen != "dequantized":
        return (
            f"export.quantized_base={chosen}: adapters of init=loftq start as a correction of the "
            "quantised base, which has no place on the model's own weights; set it to dequantized"
        )
    if chosen is not None:
        return None
    return (
        f"base_dtype={config.base_dtype}: adapters train on dequantised weights, which are not "
        "those of the model; set export.quantized_base=dequantized to merge into what it was "
        "trained on, or original to merge into the model's own weights"
    )
