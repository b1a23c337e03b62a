"""Check of the header of a GGUF file. The package `gguf` trusts its counts, so this comes first.

magic, version, number of tensors, number of metadata
key, type, value                  once per metadata; arrays hold a type, a length and items
"""

import mmap
import struct
from pathlib import Path

from lora_jax.errors import UserError

_MAGIC = b"GGUF"
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type
_TEXT, _ARRAY = 8, 9
_MOST_FIELDS, _MOST_TENSORS = 10_000, 100_000
# Items of all arrays: tokens, their types and scores, merges. Gemma 3 has 0.8 million; `gguf` reads
# 50,000 in a second.
_MOST_ITEMS = 1_000_000
_MOST_DEPTH = 4


class _Header:
    """A reader of header fields, with its position in the file."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place, self.items = data, 0, 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.place)
        self.skip(struct.calcsize(form))
        return value

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.place:
            raise ValueError(f"it ends within a value of {size:,} bytes")
        self.place += size

    def value(self, kind: int, depth: int = 0) -> None:
        """Move past a value, or raise ValueError."""
        if kind == _TEXT:
            self.skip(self.number("Q"))
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _ARRAY and depth < _MOST_DEPTH:
            kind, length = self.number("I"), self.number("Q")
            self.items += length
            if self.items > _MOST_ITEMS:
                raise ValueError(f"its arrays have {self.items:,} items, above {_MOST_ITEMS:,}")
            if kind in _SIZES:
                self.skip(_SIZES[kind] * length)
                return
            for _ in range(length):
                self.value(kind, depth + 1)
        else:
            raise ValueError(f"it has a value of type {kind}, nested {depth} times")


def check_header(source: Path) -> None:
    """Check that a header is complete, and that its counts are possible.

    Raises:
        UserError: the file is not a GGUF file, is cut short, or has counts that are too large.
    """
    try:
        with source.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            _check(_Header(data))
    except (struct.error, ValueError) as error:  # mmap raises ValueError for an empty file
        raise UserError(f"{source} is not a GGUF file, or damaged or truncated: {error}") from error
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}") from error


def _check(header: _Header) -> None:
    if header.data[:4] != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    header.skip(4)
    version = header.number("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}; supported: 2, 3")
    tensors, fields = header.number("Q"), header.number("Q")
    for count, most, what in (
        (tensors, _MOST_TENSORS, "tensors"),
        (fields, _MOST_FIELDS, "metadata"),
    ):
        if count > most:
            raise ValueError(f"it has {count:,} {what}, above {most:,}")
    for _ in range(fields):
        header.value(_TEXT)
        header.value(header.number("I"))
    for _ in range(tensors):
        header.value(_TEXT)
        axes = header.number("I")
        if axes > 8:
            raise ValueError(f"it has a tensor of {axes} axes")
        header.skip(8 * axes + 12)
