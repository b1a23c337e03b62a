"""How `lora_a` and `lora_b` start: draws, and factors of the weight itself.

    default      lora_a uniform in +-1/sqrt(in) (PEFT's Kaiming with a = sqrt(5)), lora_b zero
    gaussian     lora_a normal with deviation 1/rank, lora_b zero
    orthogonal   both random, with lora_a @ lora_b = 0
    pissa        the largest singular values and vectors of the weight (arXiv 2404.02948)
    olora        the first rows and columns of its QR factors (arXiv 2406.01775)

The last two take their part out of the base, so that the model starts unchanged. An embedding
starts with lora_a zero and lora_b normal under `default` and `gaussian`, as in PEFT.
"""

import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lora_jax.quantize import Int8Weight, NF4Weight, dequantize
from lora_jax.targets import Target
from lora_jax.tree import dotted
from lora_jax.weights import Weight


def draw(
    key: jax.Array, target: Target, weight: Weight, init: str, use_rslora: bool
) -> tuple[jax.Array, jax.Array]:
    """`lora_a` (..., in, rank) and `lora_b` (..., rank, out) in float32, padding zero.

    The draw for a weight depends on the key and its own path, not on which other weights are
    adapted. `weight` may be a shape, unless `init` is pissa or olora.
    """
    own = jax.random.fold_in(key, zlib.crc32(dotted(target.path).encode()))
    lead, (rows, columns) = target.lead, target.shape
    a_shape, b_shape = (*lead, rows, target.rank), (*lead, target.rank, columns)
    a_mask = target.rank_mask()
    b_mask = a_mask.swapaxes(-1, -2)
    match init:
        case "pissa" | "olora":
            factors = _pissa if init == "pissa" else _olora
            a, b = over_slices(factors, target, weight)
            a, b = a[..., : target.rank], b[..., : target.rank, :]
            scales = jnp.asarray(target.scales(use_rslora))
            if init == "pissa":  # PEFT shares the scale out over both
                root = jnp.sqrt(jnp.where(scales > 0, scales, 1))
                a, b = a / root, b / root
        case "orthogonal":
            a, b = jnp.zeros(a_shape), jnp.zeros(b_shape)
            for rank in sorted({*target.ranks} - {0}):
                halves = _orthogonal(jax.random.fold_in(own, rank), lead, target.shape, rank)
                mine = target.per_layer([own == rank for own in target.ranks])
                a = jnp.where(mine, _pad(halves[0], a_shape), a)
                b = jnp.where(mine, _pad(halves[1], b_shape), b)
        case _ if target.leaf == "embedding":
            a, b = jnp.zeros(a_shape), jax.random.normal(own, b_shape)
        case "gaussian":
            ranks = jnp.maximum(target.per_layer(target.ranks), 1)
            a, b = jax.random.normal(own, a_shape) / ranks, jnp.zeros(b_shape)
        case _:
            bound = rows**-0.5
            a = jax.random.uniform(own, a_shape, minval=-bound, maxval=bound)
            b = jnp.zeros(b_shape)
    return a * a_mask, b * b_mask


def over_slices(function: Callable, target: Target, weight: Weight, *others: jax.Array):
    """`function` of every matrix of a stack in float32, in the columns of the target, one at a
    time, so that no more than one is dequantised or widened at once.
    """
    columns = slice(*(target.columns or (None,)))

    def of_one(slices):
        matrix, *rest = slices
        quantized = isinstance(matrix, NF4Weight | Int8Weight)
        wide = dequantize(matrix) if quantized else matrix.astype(jnp.float32)
        return function(wide[:, columns], *rest)

    of_all: Callable = of_one
    for _ in target.lead:
        of_all = functools.partial(jax.lax.map, of_all)
    return of_all((weight, *others))


def _pissa(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    left, values, right = jnp.linalg.svd(weight, full_matrices=False)
    root = jnp.sqrt(values)
    return left * root, root[:, None] * right


def _olora(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of (out, in), as the weight lies in PEFT: lora_B the first columns of Q, lora_A the first
    rows of R.
    """
    q, r = jnp.linalg.qr(weight.T)
    return r.T, q.T


def _orthogonal(
    key: jax.Array, lead: tuple[int, ...], shape: tuple[int, int], rank: int
) -> tuple[jax.Array, jax.Array]:
    """Odd and even rows of an orthogonal matrix span the two, so that their product is zero."""
    of_basis, of_a, of_b = jax.random.split(key, 3)
    basis, _ = jnp.linalg.qr(jax.random.normal(of_basis, (*lead, rank, rank)))
    a = jax.random.normal(of_a, (*lead, shape[0], rank // 2)) @ basis[..., 0::2, :]
    b = jax.random.normal(of_b, (*lead, shape[1], rank // 2)) @ basis[..., 1::2, :]
    return a / 10, b.swapaxes(-1, -2) / 10


def _pad(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(x, [(0, want - have) for have, want in zip(x.shape, shape, strict=True)])
