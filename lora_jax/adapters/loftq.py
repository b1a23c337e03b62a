"""LoftQ (arXiv 2310.08659): factors that correct the error of quantisation.

    Q_t = quantised(W - s A_{t-1} B_{t-1}),    s A_t B_t = the r largest directions of W - Q_t

starting from A_0 B_0 = 0. The base is the last Q_t and the update starts as s A_t B_t. After one
round the base is the quantised weight itself. As in PEFT, A and B each take the root of the
singular values. PEFT omits s; the two agree for alpha = rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.inits import (
    Factors,
    over_slices,
    singular_factors,
    subtract,
    without_scale,
)
from lora_jax.config import AdapterConfig
from lora_jax.quantize import QuantizedWeight, quantize
from lora_jax.targets import Target
from lora_jax.tree import Path


def factors(
    leaves: Mapping[Path, Any], targets: Sequence[Target], scheme: str, config: AdapterConfig
) -> dict[Path, tuple[Factors, Factors]]:
    """Return, by target path, the last factors, and those before them, which the base is to lose:
    `lora_a` (..., in, rank) and `lora_b` (..., rank, out) in float32, zero in the padding.

    A round costs an SVD of every weight. In memory are the factors and, of one weight at a time,
    the stack without its update and the quantised stack.
    """
    found = {}
    for path in dict.fromkeys(target.weight for target in targets):
        # The parts of a fused projection are quantised together.
        parts = [target for target in targets if target.weight == path]
        last, before = [_zeros(part) for part in parts], []
        for _ in range(config.loftq_iter):
            before, left = last, leaves[path]
            for part, (a, b) in zip(parts, before, strict=True):
                left = subtract(part, left, a, b, config.use_rslora)
            base = quantize(left, scheme)
            last = [_make_up(part, base, leaves[path], config.use_rslora) for part in parts]
        for part, *both in zip(parts, last, before, strict=True):
            found[part.path] = tuple(both)
    return found


def _zeros(target: Target) -> Factors:
    rows, columns = target.shape
    a, b = (*target.lead, rows, target.rank), (*target.lead, target.rank, columns)
    return jnp.zeros(a), jnp.zeros(b)


def _make_up(target: Target, base: QuantizedWeight, weight: jax.Array, use_rslora: bool) -> Factors:
    """Return factors of the quantisation error of a weight."""
    columns = slice(*(target.columns or (None,)))

    def of_one(base: jax.Array, weight: jax.Array) -> Factors:
        return singular_factors(weight[:, columns].astype(jnp.float32) - base)

    a, b = over_slices(of_one, target, base, weight)
    a, b = without_scale(target, a, b, use_rslora)
    mask = target.rank_mask()
    return a * mask, b * mask.swapaxes(-1, -2)
