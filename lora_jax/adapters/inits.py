"""Initial values of `lora_a` and `lora_b`: random draws, or factors of the weight.

    default      lora_a uniform in +-1/sqrt(in) (PEFT's Kaiming with a = sqrt(5)), lora_b zero
    gaussian     lora_a normal with standard deviation 1/rank, lora_b zero
    zero_a       lora_a zero, lora_b uniform in +-1/sqrt(rank) (arXiv 2406.08447, "Init[B]")
    orthogonal   both random, with lora_a @ lora_b = 0
    pissa        the largest singular values and vectors of the weight (arXiv 2404.02948)
    olora        the first rows and columns of its QR factors (arXiv 2406.01775)

The last two subtract their factors from the base, so the model starts unchanged. An embedding
starts with lora_a zero and lora_b normal under `default` and `gaussian`, as in PEFT. Inits that
need data or the quantised base are in `eva`, `lora_ga` and `loftq`.
"""

import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lora_jax.quantize import Int8Weight, NF4Weight, dequantize
from lora_jax.targets import Target
from lora_jax.tree import dotted
from lora_jax.weights import LoraWeight, Weight, materialize

Factors = tuple[jax.Array, jax.Array]


def draw(
    key: jax.Array, target: Target, weight: Weight, init: str, use_rslora: bool
) -> tuple[jax.Array, jax.Array]:
    """Return `lora_a` (..., in, rank) and `lora_b` (..., rank, out) in float32, padding zero.

    The draw for a weight depends on the key and its own path, not on which other weights are
    adapted. `weight` may be a shape, unless `init` is pissa or olora.
    """
    own = jax.random.fold_in(key, zlib.crc32(dotted(target.path).encode()))
    lead, (rows, columns) = target.lead, target.shape
    a_shape, b_shape = (*lead, rows, target.rank), (*lead, target.rank, columns)
    a_mask = target.rank_mask()
    b_mask = a_mask.swapaxes(-1, -2)
    match init:
        case "pissa":
            a, b = over_slices(singular_factors, target, weight)
            a, b = without_scale(target, a, b, use_rslora)
        case "olora":
            a, b = over_slices(_olora, target, weight)
            a, b = a[..., : target.rank], b[..., : target.rank, :]
        case "orthogonal":
            a, b = jnp.zeros(a_shape), jnp.zeros(b_shape)
            for rank in sorted({*target.ranks} - {0}):
                halves = _orthogonal(jax.random.fold_in(own, rank), lead, target.shape, rank)
                mine = target.per_layer([own == rank for own in target.ranks])
                a = jnp.where(mine, _pad(halves[0], a_shape), a)
                b = jnp.where(mine, _pad(halves[1], b_shape), b)
        case "zero_a":
            ranks = jnp.maximum(target.per_layer(target.ranks), 1)
            a = jnp.zeros(a_shape)
            b = jax.random.uniform(own, b_shape, minval=-1.0, maxval=1.0) / jnp.sqrt(ranks)
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
    """Apply `function` to every matrix of a stack, in float32 and over the target's columns. One
    matrix at a time is dequantised or cast.
    """
    return _over_slices(function, len(target.lead), target.columns, weight, *others)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _over_slices(
    function: Callable,
    axes: int,
    columns: tuple[int, int] | None,
    weight: Weight,
    *others: jax.Array,
):
    def of_one(slices):
        matrix, *rest = slices
        quantized = isinstance(matrix, NF4Weight | Int8Weight)
        wide = dequantize(matrix) if quantized else matrix.astype(jnp.float32)
        return function(wide[:, slice(*(columns or (None,)))], *rest)

    of_all: Callable = of_one
    for _ in range(axes):
        of_all = functools.partial(jax.lax.map, of_all)
    return of_all((weight, *others))


def subtract(
    target: Target, weight: jax.Array, a: jax.Array, b: jax.Array, use_rslora: bool
) -> jax.Array:
    """Subtract the update of factors a and b from a weight, in the dtype of the weight."""
    b = in_columns(target, b * target.scales(use_rslora), weight.shape[-1])
    return materialize(LoraWeight(weight, a, -b))


def in_columns(target: Target, x: jax.Array, width: int, fill: float = 0.0) -> jax.Array:
    """Pad (..., columns of the target) to (..., columns of the weight)."""
    if target.columns is None:
        return x
    start, stop = target.columns
    outside = [(0, 0)] * (x.ndim - 1) + [(start, width - stop)]
    return jnp.pad(x, outside, constant_values=fill)


def singular_factors(matrix: jax.Array) -> Factors:
    """Return the singular vectors of a matrix (in, out), each scaled by the root of its value."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values)
    return left * root, root[:, None] * right


def without_scale(target: Target, a: jax.Array, b: jax.Array, use_rslora: bool) -> Factors:
    """Return the first `rank` columns of `a` and rows of `b`, both divided by sqrt(scale) as in
    PEFT's PiSSA. Their scaled product is that of the columns and rows.
    """
    scales = jnp.asarray(target.scales(use_rslora))
    root = jnp.sqrt(jnp.where(scales > 0, scales, 1))
    return a[..., : target.rank] / root, b[..., : target.rank, :] / root


def _olora(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the QR factors of the weight as PEFT stores it, (out, in): lora_B is the first columns
    of Q, lora_A the first rows of R.
    """
    q, r = jnp.linalg.qr(weight.T)
    return r.T, q.T


def _orthogonal(
    key: jax.Array, lead: tuple[int, ...], shape: tuple[int, int], rank: int
) -> tuple[jax.Array, jax.Array]:
    """Draw two factors from odd and even rows of an orthogonal matrix: their product is zero."""
    of_basis, of_a, of_b = jax.random.split(key, 3)
    basis, _ = jnp.linalg.qr(jax.random.normal(of_basis, (*lead, rank, rank)))
    a = jax.random.normal(of_a, (*lead, shape[0], rank // 2)) @ basis[..., 0::2, :]
    b = jax.random.normal(of_b, (*lead, shape[1], rank // 2)) @ basis[..., 1::2, :]
    return a / 10, b.swapaxes(-1, -2) / 10


def _pad(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(x, [(0, want - have) for have, want in zip(x.shape, shape, strict=True)])
