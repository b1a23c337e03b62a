"""Weights of 4 and 8 bits in files, as bitsandbytes has them.

    NAME.weight                  uint8 (ceil(out * in / 2), 1)    two numbers a byte, the first in
                                                                  high bits; rows after each other
    NAME.weight.absmax           float32 (blocks,)                one per 64 numbers
    NAME.weight.quant_map        float32 (16,)                    the values of NF4 or FP4
    NAME.weight.quant_state.bitsandbytes__nf4                     JSON: shape, dtype, blocksize
    NAME.weight.nested_absmax    float32 (ceil(blocks / 256),)    of double quantisation: absmax is
    NAME.weight.nested_quant_map float32 (256,)                   uint8 then

    NAME.weight                  int8 (out, in)
    NAME.SCB                     float32 (out,)                   absmax of each output feature
    NAME.weight_format           uint8, 0                         rows after each other

    4 bits    w = quant_map[number] * absmax
              absmax = nested_quant_map[absmax] * nested_absmax + nested_offset
    8 bits    w = number * SCB * (1 / 127)

Products are in float32 and in the order of bitsandbytes, which rounds them to the `dtype` of the
quant_state then. Here they are rounded to the dtype that is asked for.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.config import is_finite
from lora_jax.config.text import BadJSON, parse_json, quoted
from lora_jax.formats.tensors import FLOATS, Tensor, bounds, open_all, open_source
from lora_jax.quantize import NF4_VALUES

_WEIGHT, _STATE = ".weight", "quant_state.bitsandbytes__"
_BLOCKED = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_OF_ROWS = ("SCB", "weight_format")
_FP4_VALUES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # of 12
_VALUES = {
    "nf4": np.array(NF4_VALUES, np.float32),
    "fp4": np.array([*_FP4_VALUES, *(-value for value in _FP4_VALUES)], np.float32)
    / np.float32(12),
}
_INVERSE = np.float32(1 / 127)
_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of blocks
_STORAGE = (np.dtype(np.uint8), np.dtype(np.int8), *FLOATS.values())  # of two numbers or more
_LONGEST_STATE = 4096  # bytes
_PART = 1 << 20  # numbers that are dequantised at once
_FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}


class _Damaged(Exception):
    """A weight whose parts are missing or do not fit each other."""


def joined(tensors: Mapping[str, Tensor], dtype: np.dtype) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a model directory with each quantised weight as one tensor of `dtype`,
    and problems. The small tensors that describe a weight are read.
    """
    found, parts = dict(tensors), {}
    for name, tensor in tensors.items():
        if (place := _owner(name)) is not None:
            owner, part = place
            parts.setdefault(owner, {})[part] = tensor
            del found[name]
    problems = []
    with open_all(tensor for own in parts.values() for tensor in own.values()) as handles:
        for owner, own in parts.items():
            try:
                found[owner] = _join(owner, tensors.get(owner), own, dtype, handles)
            except _Damaged as error:
                file = next(iter(own.values())).file
                problems.append(f"{file.name}: {owner}: {error}")
    return found, problems


def _owner(name: str) -> tuple[str, str] | None:
    """Return the weight that a tensor belongs to and which part of it this is, or None."""
    start, mark, kind = name.rpartition(f"{_WEIGHT}.{_STATE}")
    if mark:
        return f"{start}{_WEIGHT}", f"{_STATE}{kind}"
    start, _, last = name.rpartition(".")
    if last in _OF_ROWS:
        return f"{start}{_WEIGHT}", last
    return (start, last) if last in _BLOCKED and start.endswith(_WEIGHT) else None


def _join(
    name: str,
    weight: Tensor | None,
    parts: Mapping[str, Tensor],
    dtype: np.dtype,
    handles: Mapping[Path, Any],
) -> Tensor:
    if weight is None:
        raise _Damaged(f"is missing, and {', '.join(parts)} of it is there")
    if not parts.keys().isdisjoint(_OF_ROWS):
        return _join_rows(name, weight, parts, dtype, handles)
    state = _read_state(parts, handles)
    _check_fit(weight, state, parts, handles)
    kept = ("absmax", *(("nested_absmax", "nested_quant_map") if state.nested else ()))
    return Tensor(
        *(weight.file, name, state.shape, dtype),
        parts=(weight, *(parts[part] for part in kept)),
        unpack=functools.partial(_Blocks, state=state),
    )


# 8 bits


def _join_rows(
    name: str,
    weight: Tensor,
    parts: Mapping[str, Tensor],
    dtype: np.dtype,
    handles: Mapping[Path, Any],
) -> Tensor:
    scales, layout = parts.get("SCB"), parts.get("weight_format")
    if scales is None:
        raise _Damaged("has no SCB")
    if weight.dtype != np.int8 or len(weight.shape) != 2:
        raise _Damaged(f"is {weight.shape} of {weight.dtype}, not (out, in) of int8")
    if scales.dtype not in FLOATS.values() or scales.shape != weight.shape[:1]:
        raise _Damaged(f"SCB is {scales.shape} of {scales.dtype}, not {weight.shape[:1]} of floats")
    if layout is not None:
        one = layout.dtype == np.uint8 and math.prod(layout.shape) == 1
        value = open_source(layout, handles)[...] if one else None
        if value is None or int(value.reshape(())) != 0:
            raise _Damaged("weight_format is not 0, the layout of plain rows")
    return Tensor(
        *(weight.file, name, weight.shape, dtype),
        parts=(weight, scales),
        unpack=functools.partial(_Rows, shape=weight.shape),
    )


@dataclass(frozen=True)
class _Rows:
    """Numbers of int8 and absmax of rows that are read as a float32 tensor (out, in)."""

    numbers: Any
    scales: Any
    shape: tuple[int, ...]

    def __getitem__(self, ranges: Sequence[slice]) -> np.ndarray:
        rows, columns = bounds(ranges, self.shape)
        out = self.numbers[rows, columns].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            out *= self.scales[rows].astype(np.float32)[:, None]
            out *= _INVERSE
        return out


# 4 bits


@dataclass(frozen=True)
class _State:
    """The quant_state of a weight of 4 bits."""

    kind: str
    shape: tuple[int, int]  # (out, in)
    block: int  # numbers that share an absmax
    nested: int = 0  # absmax that share a nested_absmax; 0 without double quantisation
    offset: float = 0.0

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.count // self.block)


def _read_state(parts: Mapping[str, Tensor], handles: Mapping[Path, Any]) -> _State:
    names = [name for name in parts if name.startswith(_STATE)]
    kinds = [name.removeprefix(_STATE) for name in names]
    if len(kinds) != 1 or kinds[0] not in _VALUES:
        raise _Damaged(f"has {len(kinds)} quant_state of {', '.join(_VALUES)}, not one")
    tensor = parts[names[0]]
    if tensor.dtype != np.uint8 or not 0 < math.prod(tensor.shape) <= _LONGEST_STATE:
        raise _Damaged(f"quant_state is {tensor.shape} of {tensor.dtype}, not bytes of JSON")
    try:
        given = parse_json(open_source(tensor, handles)[...].tobytes().decode())
    except (BadJSON, UnicodeDecodeError) as error:
        raise _Damaged(f"quant_state is not JSON: {error}") from error
    nested = "nested_absmax" in parts
    expected = _FIELDS | (_NESTED if nested else set())
    if not isinstance(given, dict) or given.keys() != expected:
        raise _Damaged(f"quant_state={quoted(given)} does not have {', '.join(sorted(expected))}")
    rules: dict[str, Callable[[Any], bool]] = {
        "quant_type": lambda value: value == kinds[0],
        "blocksize": _is_size,
        "dtype": lambda value: value in [dtype.name for dtype in FLOATS.values()],
        "shape": _is_shape,
        "nested_blocksize": _is_size,
        "nested_dtype": lambda value: value == "float32",
        "nested_offset": lambda value: type(value) in (int, float) and is_finite(value),
    }
    for name in sorted(expected):
        if not rules[name](given[name]):
            raise _Damaged(f"quant_state has {name}={quoted(given[name])}, which is not supported")
    out, inner = given["shape"]
    size, offset = (given["nested_blocksize"], given["nested_offset"]) if nested else (0, 0.0)
    return _State(kinds[0], (out, inner), given["blocksize"], size, float(offset))


def _is_size(value: Any) -> bool:
    return type(value) is int and value in _SIZES


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_length(n) for n in value)


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _check_fit(
    weight: Tensor, state: _State, parts: Mapping[str, Tensor], handles: Mapping[Path, Any]
) -> None:
    size = math.prod(weight.shape) * weight.dtype.itemsize
    fits = weight.shape[1:] == (1,) and size == (state.count + 1) // 2
    if not fits or weight.dtype not in _STORAGE:
        raise _Damaged(
            f"is {weight.shape} of {weight.dtype}, which are not the 4 bits of {state.shape}"
        )
    floats, one = tuple(FLOATS.values()), (np.dtype(np.float32),)
    expected = {"absmax": ((state.blocks,), floats), "quant_map": ((16,), one)}
    if state.nested:
        expected["absmax"] = ((state.blocks,), (np.dtype(np.uint8),))
        expected["nested_absmax"] = ((-(-state.blocks // state.nested),), floats)
        expected["nested_quant_map"] = ((256,), one)
    for part, (shape, dtypes) in expected.items():
        tensor = parts.get(part)
        if tensor is None:
            raise _Damaged(f"has no {part}")
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise _Damaged(
                f"{part} is {tensor.shape} of {tensor.dtype}, not {shape} of {dtypes[0]}"
            )
    if left := parts.keys() - expected.keys() - {f"{_STATE}{state.kind}"}:
        raise _Damaged(f"has {', '.join(sorted(left))} without double quantisation")
    table = open_source(parts["quant_map"], handles)[...]
    if not np.allclose(table, _VALUES[state.kind], rtol=0, atol=1e-6):
        raise _Damaged(f"quant_map has other values than those of {state.kind}")


@dataclass(frozen=True)
class _Blocks:
    """Numbers of 4 bits and absmax of blocks that are read as a float32 tensor (out, in)."""

    numbers: Any
    absmax: Any
    nested_absmax: Any = None
    nested_map: Any = None
    state: _State = _State("nf4", (1, 1), 64)

    def __getitem__(self, ranges: Sequence[slice]) -> np.ndarray:
        rows, columns = bounds(ranges, self.state.shape)
        width = self.state.shape[1]
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        step = max(1, _PART // width)
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            part = self._flat(start * width, stop * width).reshape(stop - start, width)
            out[start - rows.start : stop - rows.start] = part[:, columns]
        return out

    def _flat(self, start: int, stop: int) -> np.ndarray:
        """Return the numbers from `start` to `stop` of all rows after each other."""
        pairs = _PAIRS[self.state.kind][self._bytes(start // 2, (stop + 1) // 2)]
        values = pairs.reshape(-1)[start % 2 :][: stop - start]
        size = self.state.block
        first, last = start // size, -(-stop // size)
        with np.errstate(over="ignore", invalid="ignore"):
            scales = np.repeat(self._scales(first, last), size)
            return values * scales[start - first * size :][: stop - start]

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        """Return bytes of the numbers, which may be stored in another dtype."""
        size = np.dtype(self.numbers[0:1].dtype).itemsize
        first, last = start // size, -(-stop // size)
        found = self.numbers[first:last].reshape(-1).view(np.uint8)
        return found[start - first * size :][: stop - start]

    def _scales(self, first: int, last: int) -> np.ndarray:
        absmax = self.absmax[first:last]
        if not self.state.nested:
            return absmax.astype(np.float32)
        size = self.state.nested
        start, stop = first // size, -(-last // size)
        outer = np.repeat(self.nested_absmax[start:stop].astype(np.float32), size)
        inner = self.nested_map[...][absmax] * outer[first - start * size :][: last - first]
        return inner + np.float32(self.state.offset)


# By byte: the values of its high bits and of its low bits.
_PAIRS = {
    kind: np.stack([np.repeat(values, 16), np.tile(values, 16)], axis=-1)
    for kind, values in _VALUES.items()
}
