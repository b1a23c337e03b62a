"""Cache of tokenised examples for the next run, keyed by everything that affects them.

    key = {"data": digest_files([file]), "tokenizer": ..., "settings": ..., "code": code_version()}
    cached = cached_examples(directory, key, lambda: encode_all(rows, tokenizer, ...))

An entry is one file named by the digest of its key:

    sha256 of the rest   32 bytes
    safetensors          tokens (int32) and loss_weights (float32) of all examples one after the
                         other, offsets, starts and roles (int64); key, counts and `where` as JSON
                         in bytes

It is renamed into place when complete. If the entry or the directory cannot be used, the examples
are built without the cache.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from lora_jax.cache import write_entry
from lora_jax.data.templates import Counts, Example
from lora_jax.errors import UserError

_FORMAT = "3"  # of the file: another one is another entry
_CHECKSUM = 32  # bytes of a sha256
_PIECE = 1 << 20  # bytes read at once
# They arrange examples or keep them, and decide nothing of what is in one.
_ARRANGING = ("__init__.py", "cache.py", "loader.py", "packing.py", "stream.py")
_DECIDING = ("jinja2", "tokenizers", "transformers")  # packages that take part in the encoding


@dataclass(frozen=True)
class Cached:
    """Examples from the cache, or built if it has none."""

    examples: list[Example]
    counts: Counts
    hit: bool  # read from the cache
    notes: list[str]  # for the user: an entry is damaged, or the directory cannot be written


def cached_examples(
    directory: Path,
    key: Mapping[str, str],
    build: Callable[[], tuple[list[Example], Counts]],
) -> Cached:
    """Return the examples of `build`, from `directory` if it has them under the same `key`.

    `key` has everything that affects the examples, as digests or short texts: bytes of the data,
    tokenizer, template, settings, code. Cached examples equal built ones bit for bit; arrays may be
    read-only.

    Raises:
        ValueError: an empty key, or one that is not of strings; examples whose arrays are not of
            int32 and float32, one weight for each token.
    """
    if not key or any(not isinstance(text, str) for pair in key.items() for text in pair):
        raise ValueError(f"the key of cached examples must map names to strings, not {key!r}")
    text = json.dumps({"format": _FORMAT, "key": dict(key)}, sort_keys=True)
    file = Path(directory) / f"{hashlib.sha256(text.encode()).hexdigest()}.examples"
    notes = []
    try:
        return Cached(*_unpack(*_read(file), text), hit=True, notes=notes)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        notes.append(f"the tokenised cache {file} cannot be read: {_reason(error)}")
    except _Damaged as error:
        notes.append(f"the tokenised cache {file} is damaged and not used: {error}")
    examples, counts = build()
    try:
        content = _pack(examples, counts, text)
        write_entry(file, hashlib.sha256(content).digest(), content)
    except OSError as error:
        notes.append(f"the tokenised cache {file.parent} cannot be written: {_reason(error)}")
    return Cached(examples, counts, hit=False, notes=notes)


def digest_files(paths: Iterable[Path]) -> str:
    """Return the hexadecimal sha256 of the names (without directories) and bytes of files, in
    order.

    Raises:
        UserError: a file cannot be read.
    """
    total = hashlib.sha256()
    for path in map(Path, paths):
        one = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while piece := file.read(_PIECE):
                    one.update(piece)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {_reason(error)}") from error
        # A digest each: otherwise a byte could move from one file to the next unseen.
        total.update(hashlib.sha256(path.name.encode("utf-8", "surrogateescape")).digest())
        total.update(one.digest())
    return total.hexdigest()


def code_version(package: Path = Path(__file__).parent) -> str:
    """Return a digest of the code that affects examples: the modules of this package, except those
    that only arrange examples, and the versions of the libraries involved.

    Raises:
        UserError: the modules cannot be read.
    """
    modules = sorted(file for file in package.glob("*.py") if file.name not in _ARRANGING)
    versions = [f"{name} {metadata.version(name)}" for name in _DECIDING]
    return hashlib.sha256("\n".join([digest_files(modules), *versions]).encode()).hexdigest()


class _Damaged(Exception):
    """Problem with a cache entry."""


def _pack(examples: list[Example], counts: Counts, key: str) -> bytes:
    for example in examples:
        found = (example.tokens.dtype, example.loss_weights.dtype)
        shapes = (example.tokens.shape, example.loss_weights.shape)
        if found != (np.int32, np.float32) or shapes[0] != shapes[1] or len(shapes[0]) != 1:
            raise ValueError(
                f"{example.where}: tokens and loss_weights are {found[0]}{list(shapes[0])} and "
                f"{found[1]}{list(shapes[1])}, not int32 and float32 of one length"
            )
    about = {
        "key": key,
        "counts": dataclasses.asdict(counts),
        "where": [example.where for example in examples],
    }
    tokens = [np.zeros(0, np.int32), *(example.tokens for example in examples)]
    weights = [np.zeros(0, np.float32), *(example.loss_weights for example in examples)]
    pairs = [-1 if one.pair_start is None else one.pair_start for one in examples]
    seconds = [-1 if one.second_start is None else one.second_start for one in examples]
    return safetensors.numpy.save(
        {
            "tokens": np.concatenate(tokens),
            "loss_weights": np.concatenate(weights),
            "offsets": np.cumsum([len(one) for one in tokens], dtype=np.int64),
            "pair_starts": np.asarray(pairs, np.int64),
            "second_starts": np.asarray(seconds, np.int64),
            "roles": np.asarray([one.roles for one in examples], np.int64).reshape(-1, 2),
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        }
    )


def _unpack(checksum: bytes, content: bytes, key: str) -> tuple[list[Example], Counts]:
    """Invert `_pack`.

    Raises:
        _Damaged: the content is damaged or belongs to another key.
    """
    if hashlib.sha256(content).digest() != checksum:
        raise _Damaged("its checksum differs")
    try:
        tensors = safetensors.numpy.load(content)
        about = json.loads(tensors["about"].tobytes())
        if about["key"] != key:
            raise _Damaged("it belongs to another key")
        counts = Counts(**about["counts"])
        tokens, weights = tensors["tokens"], tensors["loss_weights"]
        ends = tensors["offsets"].tolist()
        pairs = tensors["pair_starts"].tolist()
        seconds, roles = tensors["second_starts"].tolist(), tensors["roles"].tolist()
        spans = zip(ends, ends[1:], about["where"], pairs, seconds, roles, strict=False)
        examples = [
            Example(
                *(tokens[a:b], weights[a:b], where, None if pair < 0 else pair),
                second_start=None if second < 0 else second,
                roles=(both[0], both[1]),
            )
            for a, b, where, pair, second, both in spans
        ]
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise _Damaged(f"it has another format: {error!r}") from error
    return examples, counts


def _read(file: Path) -> tuple[bytes, bytes]:
    with file.open("rb") as opened:
        return opened.read(_CHECKSUM), opened.read()


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
