"""Reading of adapters that anybody may have written: everything is checked before it is allocated.

The header of the safetensors file is compared with limits and with the size of the file. What the
files hold is then checked by `formats.read_adapter`, as everywhere. Errors name the adapter, never
a path.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lora_jax import formats
from lora_jax.config import AdapterConfig, read_json
from lora_jax.errors import UserError, counted, raise_all
from lora_jax.formats import fingerprint
from lora_jax.formats.peft_digest import WEIGHTS
from lora_jax.generate.versions import identity
from lora_jax.models.common import Model
from lora_jax.serve.folder import CONFIG, Folder
from lora_jax.sharding import gather_to_host

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Limits:
    """Limits of what is read of an adapter."""

    rank: int = 16
    file_bytes: int = 2**31
    header_bytes: int = 2**24
    tensors: int = 2**16
    config_bytes: int = 2**20


@dataclass(frozen=True)
class Read:
    """An adapter in host memory."""

    revision: str  # sha256 over weights, config and base
    identity: str  # sha256 over weights and config
    rank: int
    adapters: Mapping[str, Any]
    config: AdapterConfig
    texts: Any  # what `Reader.texts` made of the directory


class Reader:
    """Reader of adapters for one base.

    Args:
        base: the model with shapes in place of weights, and its directory.
        digest: digest of its weights, `formats.fingerprint.base_digest`.
        folder: the adapters; no file outside of it is read.
        limits: limits of what is read.
        texts: makes what the server needs of an adapter's directory besides weights, such as its
            tokenizer.
        allow_change: "base" accepts adapters that were trained on other weights.
    """

    def __init__(
        self,
        base: Model,
        digest: str,
        folder: Folder,
        limits: Limits = Limits(),
        texts: Callable[[Path], Any] = lambda directory: None,
        allow_change: Collection[str] = (),
    ):
        self.base, self.digest, self.folder = base, digest, folder
        self.limits, self._texts, self._allowed = limits, texts, allow_change

    def read(self, name: str, directory: Path) -> Read:
        """Read the adapter `name` in a directory.

        Raises:
            UserError: files that are missing, damaged, too large or no adapter of this base; all
                messages name the adapter and have no path.
        """
        with self._named(name, directory):
            return self._read(directory)

    def rank(self, name: str, directory: Path) -> int:
        """Return the largest rank that an adapter's config names; 0 where it names none.

        Raises:
            UserError: a config that cannot be read.
        """
        with self._named(name, directory):
            return max(_ranks(self._config(directory)), default=0)

    def bytes(self, name: str, directory: Path) -> int:
        """Return the bytes of an adapter's tensors in float32, as they are in host memory.

        Raises:
            UserError: files as `read` refuses them.
        """
        with self._named(name, directory):
            return sum(self._header(directory / WEIGHTS).values())

    @contextlib.contextmanager
    def _named(self, name: str, directory: Path) -> Iterator[None]:
        """Give errors of a block the name of the adapter, in place of paths."""
        try:
            yield
        except UserError as error:
            raise UserError(f"adapter {name!r}: {self._without_paths(error, directory)}") from error
        except OSError as error:
            raise UserError(f"adapter {name!r} cannot be read: {error.strerror}") from error

    def _read(self, directory: Path) -> Read:
        self.folder.check_links(directory)
        rank = max(_ranks(self._config(directory)), default=0)
        if rank > self.limits.rank:
            raise UserError(
                f"its rank {rank} is above the server's --max-lora-rank {self.limits.rank}"
            )
        self._header(directory / WEIGHTS)
        stored, found = formats.read_fingerprint(directory), {"base": self.digest}
        fingerprint.check(stored, found, "the adapter", self._allowed)
        adapters, config = formats.read_adapter(directory, self.base.params, self.base)
        adapters = jax.tree.map(gather_to_host, adapters)
        own = identity(adapters, config)
        revision = hashlib.sha256(f"{own} {self.digest}".encode()).hexdigest()
        return Read(revision, own, rank, adapters, config, self._texts(directory))

    def _config(self, directory: Path) -> dict[str, Any]:
        for file in (directory / CONFIG, directory / "lora_jax.json"):
            if file.exists() and file.stat().st_size > self.limits.config_bytes:
                raise UserError(f"{file.name} is larger than {self.limits.config_bytes:,} bytes")
        return read_json(directory / CONFIG)

    def _header(self, file: Path) -> dict[str, int]:
        """Return the bytes of each tensor in float32, from a header that is within the limits."""
        if not file.is_file():
            others = [*file.parent.glob("*.bin"), *file.parent.glob("*.pt")]
            reason = "; files of pickle are not read" if others else ""
            raise UserError(f"{file} does not exist{reason}")
        limits, size = self.limits, file.stat().st_size
        if size > limits.file_bytes:
            raise UserError(
                f"{file} has {size:,} bytes, and the server reads {limits.file_bytes:,} at most"
            )
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(limits.header_bytes, max(0, size - 8)):
                raise UserError(
                    f"{file} is damaged or no safetensors file: its header would have {length:,} "
                    "bytes"
                )
            text = opened.read(length)
        try:
            header = json.loads(text)
            header.pop("__metadata__", None)
            if len(header) > limits.tensors:
                raise UserError(f"{file} has {len(header):,} tensors, more than {limits.tensors:,}")
            return _sizes(file, header, size - 8 - length)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file} is damaged: its header cannot be read") from error

    def _without_paths(self, error: UserError, directory: Path) -> str:
        text = str(error)
        for path in (directory, directory.resolve(), self.folder.root):
            text = text.replace(f"{path}/", "").replace(str(path), "its directory")
        base = self.base.directory
        return text.replace(str(base), "the base") if base != Path() else text


def _sizes(file: Path, header: Mapping[str, Any], data: int) -> dict[str, int]:
    """Return the bytes of each tensor in float32; `data` are the bytes behind the header."""
    problems, sizes = [], {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in _SIZES:
            problems.append(f"{file}: {name} has dtype {entry['dtype']}, not one of a weight")
            continue
        shape = entry["shape"]
        if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
            raise ValueError
        count = math.prod(shape)
        if not 0 <= begin <= end <= data or end - begin != count * _SIZES[entry["dtype"]]:
            problems.append(
                f"{file} is truncated or damaged: {name} would be bytes {begin:,} to {end:,} of "
                f"{counted(data, 'byte')}"
            )
        sizes[name] = 4 * count
    raise_all(problems[:3])
    return sizes


def _ranks(config: Mapping[str, Any]) -> list[int]:
    """Return the ranks in an adapter_config.json, those of patterns too."""
    patterns = config.get("rank_pattern")
    values = [config.get("r"), *(patterns.values() if isinstance(patterns, Mapping) else ())]
    return [value for value in values if isinstance(value, int)]
