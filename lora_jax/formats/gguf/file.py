"""A GGUF file, written from metadata and tensors; equal content gives equal bytes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lora_jax.config import shown
from lora_jax.errors import UserError

# Name of the dtype of an array -> type in the file.
TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}
# Ranges of the integers and numbers that llama.cpp reads.
_MOST_INTEGER = 2**32 - 1


@dataclass(frozen=True)
class Stored:
    """A tensor of a file. `read` returns its values when they are written."""

    name: str
    shape: tuple[int, ...]  # numpy's order, the reverse of ggml's
    dtype: str  # one of TYPES
    read: Callable[[], np.ndarray]


def write_file(
    path: Path | None, architecture: str, fields: Mapping[str, Any], tensors: Iterable[Stored]
) -> None:
    """Write a file, one tensor at a time. Hosts whose `path` is None read the tensors alone."""
    tensors = list(tensors)
    if path is None:
        for tensor in tensors:
            tensor.read()
        return
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in fields.items():
            _add_field(writer, key, value)
        for tensor in tensors:
            kind = TYPES[tensor.dtype]
            item = np.dtype(np.float32 if kind.name == "F32" else np.float16)
            size = int(np.prod(tensor.shape)) * item.itemsize
            writer.add_tensor_info(tensor.name, tensor.shape, item, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_encode(tensor))
    finally:
        writer.close()


def _encode(tensor: Stored) -> np.ndarray:
    """Return the values as they are in the file; bfloat16, which numpy lacks, by its bits."""
    values = np.asarray(tensor.read())
    if tensor.dtype == "bfloat16":
        return np.ascontiguousarray(values).view(np.uint16)
    return np.ascontiguousarray(values, tensor.dtype)


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a value with the type that llama.cpp reads."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        if not 0 <= value <= _MOST_INTEGER:
            raise UserError(f"{key}={value} is outside of the range of a GGUF file")
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        raise TypeError(f"{key}={shown(repr(value))} has no type in a GGUF file")
