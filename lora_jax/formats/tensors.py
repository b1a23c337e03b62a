"""Tensors of a model directory: the files that hold them, their names, shapes and dtypes.

The files are those that transformers loads: the one named by `transformers_weights` in config.json,
else `model.safetensors`, else the shards of `model.safetensors.index.json`. Other files of weights
in the directory are not read, as in transformers.
"""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_jax import hosts, tree
from lora_jax.config import is_file, read_json
from lora_jax.config.text import exists, shown
from lora_jax.errors import UserError

FLOATS = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NO_WEIGHTS = {  # dtypes of buffers, such as position_ids in old BERT files
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOAT8 = {  # which safetensors does not return as NumPy arrays
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_QUANTIZED = {"I8": np.dtype(np.int8)} | FLOAT8
_KNOWN = FLOATS | _NO_WEIGHTS | _QUANTIZED
_ADAPTER_FLOATS = (*FLOATS, "F64")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
# Bits of infinity of each dtype as an integer; larger ones are NaN.
_INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
_PART = 1 << 22  # values that are compared at once


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file, described by the header of the file, or a quantised one, which several
    tensors of files make up.
    """

    file: Path
    stored: str  # name in the file
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int = 0  # of its bytes in the file, if the dtype is float8
    # Of a quantised tensor (`packed`): its tensors in the files, and a function from their slices
    # to the slice of it, which is dequantised as it is read.
    parts: tuple["Tensor", ...] = ()
    unpack: Callable[..., Any] | None = None

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensor."""
        return [part.file for part in self.parts] or [self.file]


def list_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of a model directory by their names in the files; reads headers only.

    Raises:
        UserError: as `weight_files`; a missing or damaged file, an unknown dtype, or a name in two
            files.
    """
    tensors: dict[str, Tensor] = {}
    files = weight_files(directory)
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{directory}: {', '.join(missing[:8])}{', ...' * (len(missing) > 8)} is missing, of "
            f"{len(files)} files of weights"
        )
    for file in files:
        with open_tensors(file) as handle:
            starts: dict[str, tuple[int, int]] = {}
            for name in handle.keys():
                part = handle.get_slice(name)
                stored = part.get_dtype()
                if stored not in _KNOWN:
                    raise unreadable(file, name, stored)
                if stored in FLOAT8 and not starts:
                    starts = byte_ranges(file)
                if name in tensors:
                    raise UserError(
                        f"{tensors[name].file} and {file} both have a tensor {name}; remove the "
                        "file that does not belong to the model, and its lines of the index"
                    )
                start, _ = starts.get(name, (0, 0))
                shape = tuple(part.get_shape())
                tensors[name] = Tensor(file, name, shape, _KNOWN[stored], start)
    return tensors


def byte_ranges(file: Path) -> dict[str, tuple[int, int]]:
    """Return the first byte of each tensor of a safetensors file and the one after its last, from
    the header.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    offsets = {n: entry["data_offsets"] for n, entry in header.items() if n != "__metadata__"}
    return {name: (8 + length + start, 8 + length + end) for name, (start, end) in offsets.items()}


def weight_files(directory: Path) -> list[Path]:
    """Return the files of weights of a model directory; some may be missing.

    Raises:
        UserError: no weights; a damaged index, or one that names files outside of the directory; an
            adapter in the same directory.
    """
    check_no_adapter(directory)
    single, index = directory / _SINGLE, directory / _INDEX
    named = _named_by_config(directory)
    if named is not None:
        file = _inside(directory, named, "config.json: transformers_weights")
        return _shards(file) if named.endswith(".index.json") else [file]
    if single.is_file():
        if index.is_file():
            hosts.note(
                f"{directory} has {_SINGLE} and {_INDEX}; {_SINGLE} is read, as transformers does"
            )
        return [single]
    if index.is_file():
        return _shards(index)
    found = (
        ", ".join(sorted(path.name for path in directory.iterdir() if path.is_file())) or "no files"
    )
    raise UserError(
        f"{directory} has no {_SINGLE} and no index of shards, only: {found}. "
        "Convert other formats with transformers' save_pretrained"
    )


def has_weights(directory: Path) -> bool:
    """Return True if all files of weights exist; of a hub model only config.json may be here."""
    try:
        return all(file.is_file() for file in weight_files(directory))
    except UserError:
        return False


def check_no_adapter(directory: str | Path) -> None:
    """Check that a model directory has no adapter in it, which transformers would load too.

    Raises:
        UserError: the directory has an adapter_config.json.
    """
    if (Path(directory) / _ADAPTER).is_file():
        raise UserError(
            f"{directory} has a model (config.json) and an adapter ({_ADAPTER}) in it; "
            "transformers would load both. Move the adapter's files to another directory, and "
            "use that as the adapter (adapter.path, or --adapter) if it is wanted"
        )


def _named_by_config(directory: Path) -> str | None:
    try:
        named = read_json(directory / "config.json").get("transformers_weights")
    except UserError:
        return None  # `describe` reports a config that cannot be read
    if named is not None and (
        not isinstance(named, str)
        or not named.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise UserError(
            f"{directory / 'config.json'}: transformers_weights={shown(repr(named))} is neither a "
            ".safetensors file nor an index of such files"
        )
    return named


def _shards(index: Path) -> list[Path]:
    try:
        names = set(read_json(index)["weight_map"].values())
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is damaged: {shown(repr(error))}") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{index} is damaged: its weight_map names no files")
    return sorted(_inside(index.parent, name, index.name) for name in names)


def _inside(directory: Path, name: str, where: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UserError(f"{directory}: {where} names {name!r}, which is outside of the directory")
    return directory / path


def unreadable(file: Path, name: str, dtype: Any) -> UserError:
    """Return the error for a tensor of a dtype that is not supported."""
    return UserError(f"{file}: {name} has dtype {dtype}; supported are: {', '.join(FLOATS)}")


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file; errors name it.

    Raises:
        UserError: the file is missing, damaged or cut short.
    """
    if not is_file(file):
        raise UserError(f"{file} is {'not a regular file' if exists(file) else 'missing'}")
    try:
        with safe_open(file, framework="numpy") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a readable safetensors file (damaged or cut short?): {error}"
        ) from error


@contextlib.contextmanager
def open_all(tensors: Iterable[Tensor]) -> Iterator[dict[Path, Any]]:
    """Open the files of tensors, for `open_source`.

    Raises:
        UserError: as `open_tensors`.
    """
    with contextlib.ExitStack() as stack:
        files = sorted({file for tensor in tensors for file in tensor.files})
        yield {file: stack.enter_context(open_tensors(file)) for file in files}


def open_source(tensor: Tensor, handles: Mapping[Path, Any]) -> Any:
    """Return the slice of a tensor in open files: `source[ranges]` reads a part of it."""
    if tensor.unpack is not None:
        return tensor.unpack(*(open_source(part, handles) for part in tensor.parts))
    if tensor.dtype not in FLOAT8.values():
        return handles[tensor.file].get_slice(tensor.stored)
    if not math.prod(tensor.shape):
        return np.empty(tensor.shape, tensor.dtype)
    return np.memmap(tensor.file, tensor.dtype, "r", tensor.start, tensor.shape)


def read_whole(tensor: Tensor) -> np.ndarray:
    """Read a tensor; a quantised one is dequantised to its dtype."""
    with open_all([tensor]) as handles:
        if tensor.unpack is None and tensor.dtype not in FLOAT8.values():
            return handles[tensor.file].get_tensor(tensor.stored)
        values = open_source(tensor, handles)[tuple(map(slice, tensor.shape))]
        return np.array(values, tensor.dtype)


def bounds(ranges: Sequence[slice], shape: Sequence[int]) -> list[slice]:
    """Return slices of a tensor of this shape with their first and last index."""
    return [slice(*part.indices(n)[:2]) for part, n in zip(ranges, shape, strict=True)]


def read_floats(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read all tensors of a small file, such as an adapter's, and the metadata of the file.

    Raises:
        UserError: the file cannot be read, or has tensors of integers, all of them listed.
    """
    with open_tensors(file) as handle:
        names = list(handle.keys())
        kinds = {name: handle.get_slice(name).get_dtype() for name in names}
        wrong = [name for name in names if kinds[name] not in _ADAPTER_FLOATS]
        if wrong:
            raise UserError(
                f"{file} does not hold an adapter's weights, which are "
                f"{', '.join(_ADAPTER_FLOATS)}:\n  "
                + tree.summarize([f"{name} has dtype {kinds[name]}" for name in wrong])
            )
        return {name: handle.get_tensor(name) for name in names}, handle.metadata() or {}


def write_tensors(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with its metadata in the given order, so that equal tensors give
    equal bytes. The order of the library differs between processes.
    """
    save_file(dict(tensors), file, metadata=dict(metadata))
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length)) | {"__metadata__": dict(metadata)}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        opened.seek(8)
        opened.write(text.ljust(length))


def all_finite(values: np.ndarray) -> bool:
    """Return True if all values, of a dtype of weights, are finite. Allocates nothing: as integers,
    infinities and NaNs are the largest values of their sign.
    """
    if not values.size:
        return True
    largest = _INFINITY[values.dtype.name]
    bits = 8 * values.dtype.itemsize
    positive = values.view(f"int{bits}").max() < largest
    return bool(positive and values.view(f"uint{bits}").max() < largest + (1 << (bits - 1)))


def are_equal(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors have the same values."""
    states = [
        (tensor.file.stat().st_mtime_ns, tensor.file.stat().st_size) for tensor in (one, other)
    ]
    return _compare(one, other, *states)


@functools.lru_cache(maxsize=8)  # one command asks several times
def _compare(one: Tensor, other: Tensor, *states: tuple[int, int]) -> bool:
    if one.shape != other.shape or not one.shape:
        return False
    with open_all([one, other]) as handles:
        a, b = (open_source(tensor, handles) for tensor in (one, other))
        return all(
            np.array_equal(x.astype(np.float32), y.astype(np.float32))
            for x, y in zip(_parts(a, one.shape), _parts(b, other.shape), strict=True)
        )


def _parts(source: Any, shape: tuple[int, ...]) -> Iterable[np.ndarray]:
    rows = max(1, _PART // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        yield source[(slice(start, min(start + rows, shape[0])), *map(slice, shape[1:]))]
