"""Weights of 4 bits in files, as OCP's MXFP4 has them: blocks of 32 numbers that share a power of
two (Microscaling Formats 1.0).

    NAME_blocks    uint8 (experts, out, in / 32, 16)    two numbers a byte, the first in low bits
    NAME_scales    uint8 (experts, out, in / 32)        exponents of two, 127 above
    NAME           bfloat16 (experts, in, out)          the numbers, all of them exact
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.formats.tensors import Tensor, bounds

_BLOCK = 32
_BLOCKS, _SCALES = "_blocks", "_scales"
_POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=-1)  # by byte
POWERS = np.array([*(np.ldexp(1.0, i - 127) for i in range(255)), np.nan], np.float32)  # by scale


def joined(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a model directory with each pair of blocks and scales as one tensor,
    and problems: one of a pair is missing, or its shape or dtype is not that of a pair.
    """
    found, problems = {}, []
    for name, tensor in tensors.items():
        stem = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
        blocks, scales = tensors.get(stem + _BLOCKS), tensors.get(stem + _SCALES)
        if name == stem:
            found[name] = tensor
        elif name.endswith(_SCALES) and blocks is not None:
            continue
        elif blocks is None or scales is None:
            problems.append(f"{name} has no {stem}{_SCALES if scales is None else _BLOCKS}")
        elif stem in tensors:
            problems.append(f"{stem} is there both in MXFP4 and as {tensors[stem].dtype}")
        elif not _fit(blocks, scales):
            problems.append(
                f"{stem}: blocks {blocks.shape} of {blocks.dtype} and scales {scales.shape} of "
                f"{scales.dtype} are not (experts, out, n, 16) and (experts, out, n) of uint8"
            )
        else:
            experts, columns, count, _ = blocks.shape
            shape, dtype = (experts, count * _BLOCK, columns), np.dtype(ml_dtypes.bfloat16)
            unpack = functools.partial(_Packed, shape=shape)
            found[stem] = Tensor(
                blocks.file, blocks.stored, shape, dtype, parts=(blocks, scales), unpack=unpack
            )
    return found, problems


def _fit(blocks: Tensor, scales: Tensor) -> bool:
    both = blocks.dtype == scales.dtype == np.dtype(np.uint8)
    shape = blocks.shape
    return both and len(shape) == 4 and shape[-1] * 2 == _BLOCK and scales.shape == shape[:-1]


@dataclass(frozen=True)
class _Packed:
    """Blocks and scales that are read as a tensor (experts, in, out)."""

    blocks: Any
    scales: Any
    shape: tuple[int, ...]

    def __getitem__(self, ranges: Sequence[slice]) -> np.ndarray:
        experts, rows, columns = own = bounds(ranges, self.shape)
        first, last = rows.start // _BLOCK, -(-rows.stop // _BLOCK)
        inside = slice(rows.start - first * _BLOCK, rows.stop - first * _BLOCK)
        out = np.empty([part.stop - part.start for part in own], ml_dtypes.bfloat16)
        for place, expert in enumerate(range(experts.start, experts.stop)):  # one at a time: memory
            index = (slice(expert, expert + 1), columns, slice(first, last))
            matrix = dequantize(self.blocks[index], self.scales[index])[0]
            out[place] = matrix[:, inside].T
        return out


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the numbers (.., n * 32) in bfloat16 of blocks (.., n, 16) with scales (.., n).

    Example:
        >>> blocks = np.full((1, 16), 0x9F, np.uint8)  # the halves 15 and 9: -6 and -0.5
        >>> dequantize(blocks, np.array([128], np.uint8))[:4].astype(float).tolist()
        [-12.0, -1.0, -12.0, -1.0]
    """
    factors = POWERS[scales]
    values = _PAIRS[blocks].reshape(*scales.shape, _BLOCK) * factors[..., None]
    with np.errstate(over="ignore"):
        return values.astype(ml_dtypes.bfloat16).reshape(*scales.shape[:-1], -1)
