"""LoRA-GA (arXiv 2407.05000): factors along the gradient of the loss, taken out of the base.

With the gradient of a weight (in, out) as U diag(s) V^T, in falling order of s,

    lora_a = the first r columns of U,    lora_b = g * diag(s) V^T, rows r to 2 r

(`direction="ArB2r"` of the paper, counted in its layout (out, in)) and g = out^(1/4) / sqrt(16)
(`scale="stable"`). These are PEFT's factors; the paper leaves s out and scales lora_a as well.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.inits import over_slices
from lora_jax.targets import Target
from lora_jax.tree import Path, flatten, unflatten

_GAMMA = 16  # PEFT: stable_gamma


def factors(
    params: Mapping, target: Target, calibrate: Callable[..., jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Return `lora_a` (..., in, rank) and `lora_b` (..., rank, out) in float32, padding zero.

    `calibrate` maps parameters to the mean loss of some data, differentiably; it is a pytree, such
    as `jax.tree_util.Partial`. It runs once forward and backward, with memory for the weight's
    stack and its gradient in float32.
    """
    weight = flatten(params)[target.weight].astype(jnp.float32)  # and so is the gradient
    gradient = _gradient(target.weight, weight, params, calibrate)
    ranks = np.broadcast_to(target.per_layer(target.ranks), (*target.lead, 1, 1))[..., 0, 0]

    def of_one(gradient: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
        left, values, right = jnp.linalg.svd(gradient, full_matrices=False)
        # The sign of a pair is free: the largest entry of what becomes lora_a is positive.
        largest = jnp.take_along_axis(left, jnp.abs(left).argmax(axis=0)[None], axis=0)[0]
        sign = jnp.where(largest < 0, -1.0, 1.0)
        rows = (sign * values)[:, None] * right
        size = gradient.shape[1] ** 0.25 / _GAMMA**0.5
        b = jax.lax.dynamic_slice_in_dim(rows, rank, target.rank)
        return (sign * left)[:, : target.rank], size * b

    a, b = over_slices(of_one, target, gradient, jnp.asarray(ranks))
    mask = target.rank_mask()
    return a * mask, b * mask.swapaxes(-1, -2)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(path: Path, weight: jax.Array, params: Mapping, calibrate: Any) -> jax.Array:
    """Return the gradient of the loss with respect to `weight`, put in place of that at `path`."""
    leaves = flatten(params)
    return jax.grad(lambda weight: calibrate(unflatten(leaves | {path: weight})))(weight)
