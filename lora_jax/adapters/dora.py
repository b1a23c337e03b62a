"""DoRA (arXiv 2402.09353): the direction of every column by LoRA, its norm by a magnitude.

    W'_j = magnitude_j * (W + a b)_j / |(W + a b)_j|,    j a column: one output feature

The norm needs no product of the shape of W, and the gradient treats it as a constant (section 4.3):

    |(W + a b)_j|^2 = |W_j|^2 + 2 sum_k (a^T W)_kj b_kj + sum_k ((a^T a) b)_kj b_kj
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.inits import over_slices
from lora_jax.targets import Target
from lora_jax.weights import Weight


def column_norms(target: Target, weight: Weight, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return |(W + a b)_j| as (..., out) in float32; `b` includes its scale."""
    return over_slices(norms_of_matrix, target, weight, a, b)


def norms_of_matrix(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return |(W + a b)_j| of one matrix as (out,)."""
    with jax.default_matmul_precision("highest"):
        mixed = 2 * (a.T @ weight) + (a.T @ a) @ b
    squares = jnp.sum(weight * weight, axis=0) + jnp.sum(mixed * b, axis=0)
    return jnp.sqrt(jnp.maximum(squares, 0))


def gain(
    target: Target,
    weight: Weight,
    factors: tuple[jax.Array, jax.Array],
    magnitude: jax.Array,
    adapted: Any = None,
) -> jax.Array:
    """Return magnitude / norm as (..., 1, out); 1 where the slice is not adapted or a column is
    zero. `adapted` replaces the slices of the target, as its `per_layer`.
    """
    norms = column_norms(target, weight, *jax.lax.stop_gradient(factors))
    if adapted is None:
        adapted = target.per_layer(np.asarray(target.ranks) > 0)
    sound = (norms > 0) & (adapted[..., 0] if target.stacked else adapted)
    ratio = jnp.where(sound, magnitude / jnp.where(sound, norms, 1), 1)
    return ratio[..., None, :]
