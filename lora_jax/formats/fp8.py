"""Weights of 8 bits in files: float8_e4m3fn with scales, as transformers, vLLM and DeepSeek have
them.

    NAME.weight              float8 (out, in)
    NAME.weight_scale_inv    (ceil(out / 128), ceil(in / 128))    one per block, with
                                                                  weight_block_size=[128, 128]
                             (out, 1) or (out,)                   one per output feature
                             (), (1,) or (1, 1)                   one for the tensor
    NAME.weight_scale        the same
    NAME.activation_scale    of products in FP8, which are not computed here

A weight is the product of its number and its scale, in float32, under both names of the scale.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.formats.mxfp4 import POWERS
from lora_jax.formats.tensors import FLOATS, Tensor, bounds
from lora_jax.models.quantization import Quantization

_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_BYTE, _EXPONENT = np.dtype(np.uint8), np.dtype(ml_dtypes.float8_e8m0fnu)
_VALUES = np.arange(256, dtype=np.uint8).view(_FLOAT8).astype(np.float32)  # by byte
_WEIGHT, _SCALES = ".weight", ("_scale_inv", "_scale")
_LEFT_OUT = tuple(
    f".{name}_scale" for name in ("activation", "input", "output", "q", "k", "v", "kv", "prob")
)
_PART = 1 << 20  # numbers that are dequantised at once


def is_left_out(name: str) -> bool:
    """Return True for scales of activations and of the cache."""
    return name.endswith(_LEFT_OUT)


def joined(
    tensors: Mapping[str, Tensor], quantization: Quantization, dtype: np.dtype
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a model directory with each weight and its scales as one tensor of
    `dtype`, and problems: scales that are missing or do not fit, scales of no weight.
    """
    found, problems = {}, []
    for name, tensor in tensors.items():
        owner = _owner(name)
        if is_left_out(name):
            continue
        if owner is not None:
            weight = tensors.get(owner)
            if weight is None or weight.dtype != _FLOAT8:
                kind = "is missing" if weight is None else f"is {weight.dtype}, not float8_e4m3fn"
                problems.append(f"{tensor.file.name}: {name} has no weight: {owner} {kind}")
        elif tensor.dtype != _FLOAT8:
            found[name] = tensor
        else:
            scales = [tensors[name + end] for end in _SCALES if name + end in tensors]
            block = _block(tensor, scales, quantization) if len(scales) == 1 else None
            if block is None:
                problems.append(
                    f"{tensor.file.name}: {name} {tensor.shape} {_mismatch(scales, quantization)}"
                )
                continue
            found[name] = Tensor(
                *(tensor.file, name, tensor.shape, dtype),
                parts=(tensor, *scales),
                unpack=functools.partial(_Scaled, shape=tensor.shape, block=block),
            )
    return found, problems


def _owner(name: str) -> str | None:
    """Return the weight that a tensor of scales belongs to, or None for another tensor."""
    for end in _SCALES:
        if name.endswith(_WEIGHT + end):
            return name.removesuffix(end)
    return None


def _block(
    weight: Tensor, found: Sequence[Tensor], quantization: Quantization
) -> tuple[int, int] | None:
    """Return the numbers (out, in) of a weight that share a scale; None if the scales do not fit
    it.
    """
    (scales,), blocks = found, quantization.blocks
    kinds = (*FLOATS.values(), _EXPONENT, *([_BYTE] if quantization.byte_scales else []))
    if len(weight.shape) != 2 or 0 in weight.shape or scales.dtype not in kinds:
        return None
    rows, columns = weight.shape
    if math.prod(scales.shape) == 1:
        return rows, columns
    if blocks is None:
        return (1, columns) if scales.shape in ((rows,), (rows, 1)) else None
    height, width = blocks
    grid = (-(-rows // height), -(-columns // width))
    return (min(height, rows), min(width, columns)) if scales.shape == grid else None


def _mismatch(scales: Sequence[Tensor], quantization: Quantization) -> str:
    if not scales:
        return f"has no {_WEIGHT[1:]}{_SCALES[0]}"
    if len(scales) > 1:
        return "has two tensors of scales"
    blocks = quantization.blocks
    kind = "tensors or output features" if blocks is None else f"blocks of {list(blocks)}"
    return f"and its scales {scales[0].shape} of {scales[0].dtype} do not fit: expected for {kind}"


@dataclass(frozen=True)
class _Scaled:
    """Numbers (out, in) and scales that are read as a float32 tensor (out, in)."""

    numbers: Any
    scales: Any
    shape: tuple[int, ...]
    block: tuple[int, int]

    def __getitem__(self, ranges: Sequence[slice]) -> np.ndarray:
        rows, columns = bounds(ranges, self.shape)
        (height, width), count = self.block, columns.stop - columns.start
        scales = self._factors()[:, columns.start // width : -(-columns.stop // width)]
        skip = columns.start % width
        out = np.empty((rows.stop - rows.start, count), np.float32)
        step = max(1, _PART // max(1, count))
        for start in range(rows.start, rows.stop, step):
            own = slice(start, min(start + step, rows.stop))
            values = _VALUES[np.asarray(self.numbers[own, columns]).view(np.uint8)]
            factors = scales[np.arange(own.start, own.stop) // height]
            if factors.shape[1] > 1:
                factors = np.repeat(factors, width, axis=1)[:, skip : skip + count]
            with np.errstate(over="ignore", invalid="ignore"):
                np.multiply(values, factors, out[own.start - rows.start : own.stop - rows.start])
        return out

    def _factors(self) -> np.ndarray:
        """Return the scales in float32 (rows of blocks, columns of blocks)."""
        scales = np.asarray(self.scales[...])
        if scales.dtype in (_BYTE, _EXPONENT):
            scales = POWERS[scales.view(np.uint8)]
        height, width = self.block
        shape = -(-self.shape[0] // height), -(-self.shape[1] // width)
        return scales.astype(np.float32).reshape(shape)
