"""Settings that are set and have no effect, because another setting turns them off.

They are warnings and not errors, so that an override such as eval.generate=false needs no other
change of a file. A run, `inspect`, `plan` and the dry run print one line for each such switch.
"""

from collections.abc import Iterator
from typing import Any

from lora_jax.config.settings import Config

_OF_ANSWERS = (
    *("eval.metrics", "eval.strip_thoughts", "eval.generate_examples", "eval.samples"),
    *("eval.generate_batch_size", "eval.max_new_tokens"),
)
_OF_MERGE = ("dtype", "quantized_base", "max_shard_size", "min_merge_cosine", "max_merge_kl")


def find_unused(config: Config) -> Iterator[str]:
    """Yield a sentence for every switch that leaves settings without effect."""
    for off, reason, names in _switches(config):
        if not off:
            continue
        given = [f"{name}={_value(config, name)!r}" for name in names if _is_given(config, name)]
        if given:
            verb = "has" if len(given) == 1 else "have"
            yield f"{', '.join(given)} {verb} no effect: {reason}"


def _switches(config: Config) -> Iterator[tuple[bool, str, tuple[str, ...]]]:
    """Yield (whether it is off, the reason, the settings that it turns off)."""
    train, data = config.train, config.data
    task = data.eval is not None or data.eval_size is not None
    held_out = task or data.regression is not None
    full = config.adapter.method == "full"
    yield (
        train.schedule == "constant",
        "train.schedule=constant does not decay",
        ("train.final_rate",),
    )
    yield not task, "neither data.eval nor data.eval_size is set", ("eval.generate", *_OF_ANSWERS)
    yield task and not config.eval.generate, "eval.generate=false", _OF_ANSWERS
    yield (
        not held_out,
        "none of data.eval, data.eval_size and data.regression is set",
        ("eval.batch_size", "eval.loss_examples", "train.eval_every"),
    )
    yield data.eval is None, "data.eval is not set", ("data.drop_overlap",)
    yield not data.streaming, "data.streaming=false", ("data.stream_rows",)
    yield data.streaming, "data.streaming=true caches no examples", ("data.cache",)
    yield (
        data.chat_template == "none",
        "data.chat_template=none is plain text",
        ("data.chat_template_kwargs", "data.template_date"),
    )
    yield (
        not (config.export.merged or full),
        "export.merged=false (lora-jax export --format hf uses these settings)",
        (*(f"export.{name}" for name in _OF_MERGE), "export.probe_rows"),
    )
    yield full, "adapter.method=full has no adapter to write", ("export.peft",)
    yield (
        config.resume is False and config.adapter.path is None,
        "there is nothing to compare: neither resume nor adapter.path is set",
        ("allow_change",),
    )


def _value(config: Config, name: str) -> Any:
    node: Any = config
    for part in name.split("."):
        node = getattr(node, part)
    return node


def _is_given(config: Config, name: str) -> bool:
    return _value(config, name) != _value(_DEFAULT, name)


_DEFAULT = Config()
