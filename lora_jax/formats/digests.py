"""Digests of tensors: the sha256 of the bytes of each, independent of its file.

    of_files(list_tensors(directory))    {"model.norm.weight": "41aa..", ..}, read in threads
    of_arrays(tensors)                   one digest of names, shapes, dtypes and bytes

The digests of a file are cached under `digests/` in the cache directory (`LORA_JAX_CACHE`), and are
valid while its path, size, times and inode are the same, so that a second start does not read it.
A damaged or outdated entry is ignored and replaced.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import hosts
from lora_jax.cache import cache_directory, write_entry
from lora_jax.errors import UserError
from lora_jax.formats.tensors import Tensor, byte_ranges

_THREADS = min(16, os.cpu_count() or 1)
_PIECE = 1 << 20  # bytes that a thread reads at once
_LARGE = 10**9  # bytes to read from which a note is printed
_ENTRY_LIMIT = 1 << 24  # bytes; a longer entry is not read
_ENTRIES, _ENTRIES_SIZE = 1024, 1 << 26  # most entries in the cache, and most bytes
# A file that changed this recently may change again within one tick of the file system's clock, and
# that would go unnoticed. Some file systems count whole seconds.
_TICK, _COARSE_TICK = 10**8, 2 * 10**9  # nanoseconds


def of_files(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the sha256 of the bytes of each tensor, from the cache if its file is unchanged.

    Raises:
        UserError: a file cannot be read, is cut short, or changes while it is read.
    """
    by_file: dict[Path, dict[str, str]] = {}  # stored name -> name
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.file, {})[tensor.stored] = name
    states = {file: _state(file) for file in by_file}
    known = {file: _read_entry(states[file], by_file[file].keys()) for file in by_file}
    missing = [file for file, digests in known.items() if digests is None]
    read = _read_files(missing)
    for file in missing:
        if _state(file) != states[file]:
            raise UserError(
                f"{file} changed while it was being read; start again once it is complete"
            )
        _keep_entry(states[file], read[file])
    return {
        by_file[file][stored]: digest
        for file in by_file
        for stored, digest in (known[file] or read[file]).items()
        if stored in by_file[file]
    }


def of_arrays(tensors: Mapping[str, np.ndarray]) -> str:
    """Return one digest of the names, shapes, dtypes and bytes of arrays."""
    return join(
        (name, array.shape, array.dtype.name, hashlib.sha256(_bytes(array)).hexdigest())
        for name, array in tensors.items()
    )


def join(tensors: Iterable[tuple[str, Sequence[int], str, str]]) -> str:
    """Return one digest of tensors (name, shape, dtype, sha256), independent of their order."""
    total = hashlib.sha256()
    for name, shape, dtype, digest in sorted(tensors):
        total.update(json.dumps([name, list(shape), dtype, digest]).encode() + b"\n")
    return f"sha256:{total.hexdigest()}"


def shorten(digest: str) -> str:
    """Return the first 12 digits of a digest, for messages."""
    return digest.rpartition(":")[2][:12]


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# Reading


@dataclass(frozen=True)
class _Span:
    """The bytes of a tensor in a file."""

    file: Path
    stored: str
    start: int
    size: int


def _read_files(files: Iterable[Path]) -> dict[Path, dict[str, str]]:
    spans = [span for file in files for span in _spans(file)]
    if (size := sum(span.size for span in spans)) >= _LARGE:
        hosts.note(
            f"reading {size / 1e9:.1f} GB of weights for their digest, which is kept in "
            f"{_directory()} for the next start"
        )
    found: dict[Path, dict[str, str]] = {file: {} for file in files}
    left, lock, stop = iter(spans), threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        buffer = memoryview(bytearray(_PIECE))
        while not stop.is_set():
            with lock:
                span = next(left, None)
            if span is None:
                return
            try:
                found[span.file][span.stored] = _read_span(span, buffer, stop)
            except BaseException as error:
                errors.append(error)
                stop.set()

    # Daemon threads: a process that ends for another reason does not wait for them.
    count = min(_THREADS, len(spans), 1 + size // (16 * _PIECE))
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stop.set()
    if errors:
        raise errors[0]
    return found


def _read_span(span: _Span, buffer: memoryview, stop: threading.Event) -> str:
    digest, left = hashlib.sha256(), span.size
    try:
        with span.file.open("rb", buffering=0) as opened:
            opened.seek(span.start)
            while left and not stop.is_set():
                count = opened.readinto(buffer[:left])
                if not count:
                    raise UserError(f"{span.file} ends within {span.stored}: it is cut short")
                digest.update(buffer[:count])
                left -= count
    except OSError as error:
        raise UserError(f"{span.file} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _spans(file: Path) -> list[_Span]:
    """Return the tensors of a safetensors file in their order, from its header."""
    ranges = byte_ranges(file)
    spans = [_Span(file, name, start, end - start) for name, (start, end) in ranges.items()]
    return sorted(spans, key=lambda span: span.start)


# The cache


def _directory() -> Path:
    return cache_directory() / "digests"


def _state(file: Path) -> dict[str, Any]:
    """Return path, size, times and inode of a file, which change with its content. Links are
    resolved.
    """
    try:
        path = file.resolve()
        status = path.stat()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    return {
        "path": str(path),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,  # changes with the bytes even if mtime is set back
        "inode": status.st_ino,
    }


def _entry(state: Mapping[str, Any]) -> Path:
    return _directory() / f"{hashlib.sha256(os.fsencode(state['path'])).hexdigest()}.json"


def _read_entry(state: Mapping[str, Any], names: Iterable[str]) -> dict[str, str] | None:
    """Return the cached digests for this state of a file, or None."""
    entry = _entry(state)
    try:
        if not entry.is_file():  # a pipe or device
            return None
        with entry.open("rb") as opened:
            content = json.loads(opened.read(_ENTRY_LIMIT))
        digests = content["digests"]
        if content != _content(state, digests) or not {*names} <= digests.keys():
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return digests if all(isinstance(digest, str) for digest in digests.values()) else None


def _content(state: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    text = json.dumps([state, digests], sort_keys=True)
    return {"state": state, "digests": digests, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _keep_entry(state: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Cache the digests of a file, unless it changed so recently that it may change unnoticed."""
    changed = max(state["mtime_ns"], state["ctime_ns"])
    tick = _TICK if changed % 10**9 else _COARSE_TICK
    text = json.dumps(_content(state, digests))
    if time.time_ns() - changed < tick or len(text) > _ENTRY_LIMIT:
        return
    entry = _entry(state)
    try:
        write_entry(entry, text.encode())
        _remove_oldest(entry.parent)
    except OSError as error:
        hosts.note(
            f"digests cannot be kept in {entry.parent}: {error.strerror or error}; the next start "
            "reads the weights again"
        )


def _remove_oldest(directory: Path) -> None:
    """Remove the oldest entries above the limits of number and bytes."""
    kept = size = 0
    found = [(file.stat(), file) for file in directory.glob("*.json*") if file.is_file()]
    for status, file in sorted(found, key=lambda one: one[0].st_mtime_ns, reverse=True):
        kept, size = kept + 1, size + status.st_size
        if kept > _ENTRIES or size > _ENTRIES_SIZE:
            file.unlink(missing_ok=True)
