"""Checks of values, alone and together. What needs the model is checked with it."""

import dataclasses
import datetime
from collections.abc import Iterable
from typing import Any

from lora_jax.config.settings import (
    DATA_INITS,
    LOSSES,
    PRINTS,
    SOFT,
    AdapterConfig,
    Config,
    DataConfig,
    all_keys,
    nearest,
    raise_all,
)

_CHOICES = {
    "base_dtype": (None, "float32", "bfloat16", "int8", "nf4"),
    "adapter.method": ("lora", "prompt", "prefix", "full"),
    "adapter.init": (
        *("default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "lora_ga"),
    ),
    "adapter.bias": ("none", "lora_only", "all"),
    "adapter.prompt_init": ("vocab", "text", "random"),
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
_AT_LEAST = {
    "data.max_length": 2,
    "data.stream_rows": 1,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.micro_batch_size": 1,
    "train.warmup_steps": 0,
    "train.eval_every": 1,
    "train.save_every": 1,
    "train.save_total_limit": 1,
    "train.early_stopping_patience": 1,
    "train.log_every": 1,
    "train.loss_chunk": 1,
    "train.weight_decay": 0,
    "train.epsilon": 0,
    "eval.batch_size": 1,
    "eval.loss_examples": 1,
    "eval.generate_every": 1,
    "eval.generate_examples": 1,
    "eval.generate_batch_size": 1,
    "eval.max_new_tokens": 1,
    "eval.samples": 0,
    "export.probe_rows": 0,
    "hosts.start_timeout": 1,
    "hosts.lost_after": 5,
    "seed": 0,
}
LARGEST_SEED = 2**63 - 1  # that JAX takes
_ABOVE_ZERO = ("train.learning_rate", "train.grad_clip", "data.eval_size", "export.max_merge_kl")
# Settings that go with method=lora alone; rank, alpha and the like are read by no other.
_OF_LORA = (
    *("use_rslora", "use_dora", "init", "freeze_a", "lora_plus_ratio", "bias", "dropout"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "target_modules"),
    *("exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern"),
    *("calibration_batches", "eva_rho", "loftq_iter"),
)
_OF_VIRTUAL = ("num_virtual_tokens", "prompt_init", "prompt_text", "prefix_gate")
# Settings of some inits alone.
_OF_INITS = {"calibration_batches": DATA_INITS, "eva_rho": ("eva",), "loftq_iter": ("loftq",)}
_SINKS = ("tensorboard", "wandb", "trackio")


def check(config: Config) -> None:
    """Raise one `UserError` with every value that is out of range. What needs the model is checked
    with the model.
    """
    problems = []

    def value(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)
        return node

    for key, choices in _CHOICES.items():
        if not key.startswith("adapter.") and value(key) not in choices:
            names = ", ".join(str(choice) for choice in choices if choice is not None)
            problems.append(
                f"{key}={value(key)!r} is not one of: "
                f"{names}.{nearest(str(value(key)), filter(None, choices))}"
            )
    for key, least in _AT_LEAST.items():
        if value(key) is not None and not value(key) >= least:
            problems.append(f"{key}={value(key)} must be at least {least}")
    if config.seed > LARGEST_SEED:
        problems.append(f"seed={config.seed} must be at most {LARGEST_SEED}")
    for key in _ABOVE_ZERO:
        if value(key) is not None and not 0 < value(key) < float("inf"):
            problems.append(f"{key}={value(key)} must be above 0")
    coefficient = config.train.router_aux_loss_coef
    if not 0 <= coefficient < float("inf"):
        problems.append(f"train.router_aux_loss_coef={coefficient} must be at least 0")
    for key in ("train.beta1", "train.beta2"):
        if not 0 <= value(key) < 1:
            problems.append(f"{key}={value(key)} must be at least 0 and below 1")
    problems += [f"adapter.{problem}" for problem in adapter_problems(config.adapter)]
    if not 0 <= config.train.final_rate <= 1:
        problems.append(f"train.final_rate={config.train.final_rate} must be between 0 and 1")
    micro = config.train.micro_batch_size
    if micro and config.train.batch_size % micro:
        problems.append(
            f"train.batch_size={config.train.batch_size} is not a multiple of "
            f"train.micro_batch_size={micro}"
        )
    axes = dataclasses.asdict(config.mesh)
    if any(size < 1 and size != -1 for size in axes.values()) or list(axes.values()).count(-1) > 1:
        problems.append(
            f"mesh={axes}: every axis is at least 1, and one of them may be -1 for the devices "
            "that are left"
        )
    problems += _data_problems(config.data)
    problems += [*_run_problems(config), *_export_problems(config), *_base_problems(config)]
    if not config.model:
        problems.append(
            "model is not set: a Hugging Face directory, a .gguf file, org/name, or "
            "demo:smollm2-135m-instruct"
        )
    raise_all(problems)


def _data_problems(data: DataConfig) -> Iterable[str]:
    sources = data.train
    if isinstance(sources, dict):
        wrong = {
            name: weight
            for name, weight in sources.items()
            if isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not 0 < weight < float("inf")
        }
        if wrong or not sources:
            yield f"data.train: weights must be numbers above 0, not {wrong}"
    elif not isinstance(sources, str | None):
        yield (
            f"data.train={sources!r} is neither a source nor a mapping of sources to weights, as "
            "in {a.jsonl: 0.7, b.jsonl: 0.3}"
        )
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


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _run_problems(config: Config) -> Iterable[str]:
    train = config.train
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
                f"{nearest(name, _SINKS)}"
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
                f"eval.generate_every={train.eval_every}, as train.eval_every is"
            )


def _export_problems(config: Config) -> Iterable[str]:
    if config.export.merged and (problem := merge_problem(config)):
        yield problem
    if config.export.merged and config.adapter.method in SOFT:
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


def adapter_problems(adapter: AdapterConfig) -> list[str]:
    """The values that no model can take; also asked where an `AdapterConfig` is made in Python."""
    ranks = {"rank": adapter.rank}
    ranks |= {f"rank_pattern[{name!r}]": rank for name, rank in adapter.rank_pattern.items()}
    alphas = {"alpha": adapter.alpha}
    alphas |= {f"alpha_pattern[{name!r}]": alpha for name, alpha in adapter.alpha_pattern.items()}
    problems = [f"{name}={rank} must be at least 1" for name, rank in ranks.items() if rank < 1]
    problems += [
        f"{name}={alpha} must be above 0"
        for name, alpha in alphas.items()
        if not 0 < alpha < float("inf")
    ]
    if isinstance(adapter.modules_to_save, str):
        name = adapter.modules_to_save
        problems.append(f"modules_to_save={name!r} must be a list of names, as in [{name!r}]")
    if not 0 <= adapter.dropout < 1:
        problems.append(f"dropout={adapter.dropout} must be at least 0 and below 1")
    if not 0 < adapter.lora_plus_ratio < float("inf"):
        problems.append(f"lora_plus_ratio={adapter.lora_plus_ratio} must be above 0")
    for key, choices in _CHOICES.items():
        section, _, name = key.rpartition(".")
        if section == "adapter" and getattr(adapter, name) not in choices:
            value = getattr(adapter, name)
            hint = nearest(str(value), choices)
            problems.append(f"{name}={value!r} is not one of: {', '.join(choices)}.{hint}")
    for name, least in (("calibration_batches", 1), ("eva_rho", 1), ("loftq_iter", 1)):
        if not least <= getattr(adapter, name) < float("inf"):
            problems.append(f"{name}={getattr(adapter, name)} must be at least {least}")
    return problems + list(_method_problems(adapter))


def _method_problems(adapter: AdapterConfig) -> Iterable[str]:
    """Settings of other methods than the one that is chosen."""
    default, method = AdapterConfig(), adapter.method
    given = {
        f.name: getattr(adapter, f.name)
        for f in dataclasses.fields(AdapterConfig)
        if getattr(adapter, f.name) != getattr(default, f.name)
    }
    if method == "full":
        for name in (*_OF_LORA, "path", *_OF_VIRTUAL):
            if name in given:
                yield (
                    f"method=full trains every weight, and {name}={given[name]!r} says something "
                    "of adapters; leave one out"
                )
        return
    for name in _OF_LORA if method in SOFT else _OF_VIRTUAL if method == "lora" else ():
        if name in given:
            other = "lora" if method in SOFT else "prompt or prefix"
            yield (
                f"{name}={given[name]!r} is for method={other}, and this is method={method}; leave "
                "one out"
            )
    if method not in SOFT:
        return
    if adapter.num_virtual_tokens is not None and adapter.num_virtual_tokens < 1:
        yield f"num_virtual_tokens={adapter.num_virtual_tokens} must be at least 1"
    if (adapter.prompt_init == "text") != bool(adapter.prompt_text):
        yield (
            f"prompt_init={adapter.prompt_init} and prompt_text={adapter.prompt_text!r}: the one "
            "needs the other"
        )
    if adapter.prefix_gate and method == "prompt":
        yield (
            "prefix_gate=true is for method=prefix: virtual tokens of a prompt are tokens among "
            "others, which no weight can take out"
        )
