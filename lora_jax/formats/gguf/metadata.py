"""Checked values of the metadata of a GGUF file, where each value may be of any type."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.config import shown
from lora_jax.errors import UserError, raise_all

_INTEGERS = """
    vocab_size context_length embedding_length block_count feed_forward_length attention.key_length
    attention.value_length attention.sliding_window rope.dimension_count
    """.split()
_NUMBERS = """
    attention.layer_norm_rms_epsilon rope.freq_base rope.scaling.factor final_logit_softcapping
    """.split()
_TEXTS = """
    general.architecture tokenizer.ggml.model tokenizer.ggml.pre tokenizer.chat_template
    """.split()
_IDS = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown", "padding")]
_LISTS = {
    "tokenizer.ggml.tokens": (str, "texts"),
    "tokenizer.ggml.merges": (str, "texts"),
    "tokenizer.ggml.token_type": (int, "integers"),
}


def check_types(metadata: Mapping[str, Any], source: Path) -> None:
    """Check the types of all values that a conversion reads.

    Raises:
        UserError: values of another type, all of them listed.
    """
    name = metadata.get("general.architecture")
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        **{f"{name}.{key}": ((int,), "an integer") for key in _INTEGERS},
        **{f"{name}.{key}": ((int, float), "a finite number") for key in _NUMBERS},
        **dict.fromkeys(_IDS, ((int,), "an integer")),
        **dict.fromkeys((*_TEXTS, f"{name}.rope.scaling.type"), ((str,), "a text")),
    }
    problems = [
        f"{key}={shown(repr(metadata[key]))} is not {words}"
        for key, (types, words) in kinds.items()
        if key in metadata and not _fits(metadata[key], types)
    ]
    problems += [
        f"{key} is not a list of {words}"
        for key, (kind, words) in _LISTS.items()
        if key in metadata and not _is_list(metadata[key], kind)
    ]
    raise_all([f"{source} is damaged or not supported: {problem}" for problem in problems])


def _fits(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool) or not isinstance(value, types):
        return False
    return not isinstance(value, float) or math.isfinite(value)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def metadata_value(metadata: dict[str, Any], key: str, kind: type, source: Path) -> Any:
    """Return a required value of type `kind`; an int must be positive.

    Raises:
        UserError: the value is missing, or of another type.
    """
    if key not in metadata:
        raise UserError(f"{source} has no metadata {key!r}, which a conversion needs")
    value = metadata[key]
    if not isinstance(value, (int, float) if kind is float else kind) or (
        kind is int and value < 1
    ):
        raise UserError(
            f"{source}: metadata {key}={shown(repr(value))} is not supported; it must be one "
            f"positive {kind.__name__}"
        )
    return value
