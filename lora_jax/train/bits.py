"""Bits per byte of held-out text, which compare models whatever their tokenizers are.

bits per byte = nats per token * tokens / (ln 2 * bytes)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.data import Example


def bits_per_nat(examples: Sequence[Example], tokenizer: Any) -> float | None:
    """Return the factor from nats per supervised token to bits per byte of the supervised text.

    Special tokens, such as the end of an answer, count as tokens and have no bytes. None if there
    are no bytes.
    """
    tokens, size = 0.0, 0
    for example in examples:
        tokens += float(np.sum(example.loss_weights))
        ids = np.asarray(example.tokens)[np.asarray(example.loss_weights) > 0].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        size += len(text.encode("utf-8", "replace"))
    return tokens / (math.log(2) * size) if size else None


def with_bits(pair: Mapping[str, Any] | None, factor: float | None) -> dict[str, Any] | None:
    """Return the summary's entry for a held-out set with `bits_per_byte` after its losses."""
    if pair is None or factor is None:
        return None if pair is None else dict(pair)
    losses = {name: pair[name] for name in ("loss_before", "loss_after")}
    bits = {
        f"bits_per_byte_{when}": None
        if losses[f"loss_{when}"] is None
        else losses[f"loss_{when}"] * factor
        for when in ("before", "after")
    }
    return {**losses, **bits, **{name: pair[name] for name in pair if name not in losses}}
