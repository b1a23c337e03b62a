"""Quantised weight leaves: NF4 with double quantisation, as in QLoRA, and int8 per output column.

    weight         (..., in, out)      one block is 64 rows of one column, one group 256 columns
    NF4Weight      codes               two 4-bit codes per byte, 32 bytes per block
                   scales              one byte per block
                   scale_of_scales     one float32 per group
    Int8Weight     values, scales      one byte per weight, one float32 per column

Every function acts on the last two axes, so a stack of layers and one slice of it inside a scan are
the same to it. All arithmetic is in float32. Weights are multiplied by the inverse of a scale: a
compiler may rewrite a division by a broadcast scale, and the bytes would then depend on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import tree
from lora_jax.errors import UserError, nearest

SCHEMES = ("int8", "nf4")
BLOCK = 64  # rows that share a scale
GROUP = 256  # neighbouring blocks of one row of blocks that share a scale of scales
# The quantiles of a standard normal, scaled to [-1, 1], with an exact zero (arXiv 2305.14314,
# appendix E).
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4Weight:
    """A weight of 4.13 bits per number (arXiv 2305.14314): w = NF4_VALUES[code] * absmax of its
    block, where absmax = scale / 255 * scale_of_scales.

    Rows 2i and 2i + 1 share byte i, the first in its high half; where 64 divides `in` the bytes are
    those of bitsandbytes. The last block is filled up with zeros.
    """

    codes: jax.Array  # uint8 (..., ceil(in / 64) * 32, out)
    scales: jax.Array  # uint8 (..., ceil(in / 64), out)
    scale_of_scales: jax.Array  # float32 (..., ceil(in / 64), ceil(out / 256))
    rows: int = field(metadata={"static": True})  # in
    dtype: np.dtype = field(metadata={"static": True})  # before it was quantised

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], self.rows, self.codes.shape[-1])

    @property
    def ndim(self) -> int:
        return self.codes.ndim


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight:
    """A weight of 8 bits per number: w = values * scales, with scales = absmax / 127 of each output
    column, as LLM.int8 stores its weights (arXiv 2208.07339).
    """

    values: jax.Array  # int8 (..., in, out)
    scales: jax.Array  # float32 (..., 1, out)
    dtype: np.dtype = field(metadata={"static": True})  # before it was quantised

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim


QuantizedWeight = NF4Weight | Int8Weight


def check_scheme(scheme: str) -> None:
    """Raise a UserError unless `scheme` is one of SCHEMES."""
    if scheme not in SCHEMES:
        raise UserError(
            f"{scheme!r} is not a way to quantise; there are: {', '.join(SCHEMES)}."
            f"{nearest(scheme, SCHEMES)}"
        )


def quantize(w: Any, scheme: str) -> QuantizedWeight:
    """The leaf that stands for a finite float array w (..., in, out).

    Raises:
        UserError: `scheme` is not one of SCHEMES.

    Example:
        >>> from lora_jax.quantize import dequantize, quantize
        >>> w = jnp.linspace(-1, 1, 128).reshape(64, 2)
        >>> bool(abs(dequantize(quantize(w, "int8")) - w).max() < 0.005)
        True
    """
    check_scheme(scheme)
    w = jnp.asarray(w)
    wide = w.astype(jnp.float32)
    if scheme == "int8":
        absmax = jnp.max(jnp.abs(wide), axis=-2, keepdims=True)
        values = jnp.round(wide * _inverse(absmax, 127)).astype(jnp.int8)
        return Int8Weight(values, absmax * np.float32(1 / 127), w.dtype)
    codes, absmax = _nf4_codes(wide)
    return NF4Weight(codes, *_quantize_scales(absmax), w.shape[-2], w.dtype)


def dequantize(w: QuantizedWeight, dtype: Any = jnp.float32) -> jax.Array:
    """The array (..., in, out) that a leaf stands for."""
    if isinstance(w, Int8Weight):
        return (w.values.astype(jnp.float32) * w.scales).astype(dtype)
    absmax = _dequantize_scales(w.scales, w.scale_of_scales)
    return _dequantize_nf4(w.codes, absmax, w.rows).astype(dtype)


def _nf4_codes(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes uint8 (..., blocks * 32, out) of a float32 w (..., in, out), and the absmax of every
    block, float32 (..., blocks, out).

    A value half-way between two codes takes the lower one.
    """
    *lead, rows, columns = w.shape
    w = jnp.pad(w, [(0, 0)] * len(lead) + [(0, -rows % BLOCK), (0, 0)])
    blocks = w.reshape(*lead, -1, BLOCK, columns)
    absmax = jnp.max(jnp.abs(blocks), axis=-2)
    scaled = jnp.clip(blocks * _inverse(absmax, 1)[..., None, :], -1, 1)
    values = np.asarray(NF4_VALUES, np.float32)
    codes = jnp.zeros(scaled.shape, jnp.uint8)
    for bound in (values[:-1] + values[1:]) / 2:
        codes += scaled > bound
    pairs = codes.reshape(*lead, -1, 2, columns)
    return pairs[..., 0, :] << 4 | pairs[..., 1, :], absmax


def _dequantize_nf4(codes: jax.Array, absmax: jax.Array, rows: int) -> jax.Array:
    """float32 (..., rows, out) of codes (..., blocks * 32, out) and absmax (..., blocks, out)."""
    *lead, _, columns = codes.shape
    # Shifts by a broadcast array, not two halves stacked: one loop that writes the result once.
    both = (codes[..., None, :] >> np.array([[4], [0]], np.uint8)) & 15
    blocks = _nf4_value(both.reshape(*lead, -1, BLOCK, columns)) * absmax[..., None, :]
    return blocks.reshape(*lead, -1, columns)[..., :rows, :]


def _nf4_value(codes: jax.Array) -> jax.Array:
    """NF4_VALUES[codes], computed: as fast as a lookup on a CPU, and vector arithmetic still where
    a gather goes one number at a time.

    The lowest bit goes from a value to the next by a product with 0 or 1, exactly; the other bits
    choose by selects. A select between two constants would need them as whole arrays, and under
    `jax.grad` a scan keeps those 16 arrays in memory beside its loop.
    """
    odd = (codes & 1).astype(jnp.float32)
    values = np.asarray(NF4_VALUES, np.float32)
    level = [a + odd * (b - a) for a, b in zip(values[::2], values[1::2], strict=True)]
    for bit in (2, 4, 8):
        on = (codes & bit) != 0
        level = [jnp.where(on, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _quantize_scales(absmax: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The second quantisation: absmax (..., blocks, out) -> scales uint8, scale_of_scales float32
    (..., blocks, groups).
    """
    groups = jnp.pad(absmax, [(0, 0)] * (absmax.ndim - 1) + [(0, -absmax.shape[-1] % GROUP)])
    largest = jnp.max(groups.reshape(*absmax.shape[:-1], -1, GROUP), axis=-1)
    inverse = _per_column(_inverse(largest, 255), absmax.shape[-1])
    return jnp.round(absmax * inverse).astype(jnp.uint8), largest


def _dequantize_scales(scales: jax.Array, scale_of_scales: jax.Array) -> jax.Array:
    """absmax (..., blocks, out)."""
    return scales.astype(jnp.float32) * _per_column(
        scale_of_scales * np.float32(1 / 255), scales.shape[-1]
    )


def _per_column(groups: jax.Array, columns: int) -> jax.Array:
    """A number per group -> the same number for each of its columns: (..., groups) -> (...,
    columns).
    """
    return jnp.repeat(groups, GROUP, axis=-1)[..., :columns]


def _inverse(absmax: jax.Array, steps: int) -> jax.Array:
    """steps / absmax, finite also where absmax is zero."""
    return steps / jnp.maximum(absmax, steps * np.finfo(np.float32).tiny)


def quantizes(path: tree.Path, leaves: Mapping[tree.Path, Any]) -> bool:
    """Whether a scheme applies to one of the leaves of a parameter tree: to kernels, but not to
    those of output heads, as in QLoRA, or of routers.
    """
    head = any(part in tree.OUTPUT_HEADS for part in path)
    return path[-1] == "kernel" and not head and not tree.is_router(path, leaves)


def quantize_tree(params: Mapping, scheme: str) -> dict:
    """A parameter tree with every leaf quantised to which a scheme applies, one at a time.

    Raises:
        UserError: `scheme` is not one of SCHEMES.
    """
    leaves = tree.flatten(params)
    quantized = {
        path: quantize(leaf, scheme) if quantizes(path, leaves) else leaf
        for path, leaf in leaves.items()
    }
    return tree.unflatten(quantized)
