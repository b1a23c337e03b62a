"""Checks of a tokenizer's files before transformers reads them: no code, and no huge sizes.

    tokenizer_config.json   {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", null]}}

transformers would import `tokenization_own.py` from the directory, or from a repository of the hub,
if the user agrees. Here no code of a directory is ever run: if `tokenizer_class` is a class of
transformers, that class reads the files; other tokenizers with such an entry are refused. A
`tokenizer_class` that is not a tokenizer is refused too: transformers calls any of its classes by
that name, and `AutoModel` or `AutoProcessor` would read other files and ask again.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_jax import hosts
from lora_jax.config import read_json, shown
from lora_jax.errors import UserError

_CONFIG = "tokenizer_config.json"
_VERSIONS = "fast_tokenizer_files"
# Bytes; the largest tokenizers in use have 40 MB in tokenizer.json, and 2 MB in the others.
_VOCABULARY = 100_000_000
_SETTINGS = 16_000_000
_LIMITS = {
    "tokenizer*.json": _VOCABULARY,
    "*vocab*": _VOCABULARY,
    "*.model": _VOCABULARY,
    "*.spm": _VOCABULARY,
    "*.tiktoken": _VOCABULARY,
    "*.tokenizer": _VOCABULARY,
    "merges.txt": _VOCABULARY,
    "tekken.json": _VOCABULARY,
    _CONFIG: _SETTINGS,
    "special_tokens_map.json": _SETTINGS,
    "added_tokens.json": _SETTINGS,
    "config.json": _SETTINGS,
}
_MOST_ADDED = 50_000  # tokens added to a vocabulary; Gemma 3 has 6,414
_LARGEST_ID = 10_000_000  # of a token; `tokenizers` lists all ids when it writes


def check_tokenizer_files(directory: Path) -> None:
    """Check that a tokenizer needs no code from its directory, and the sizes of its files.

    Raises:
        UserError: a file that is too large, or an entry that names code.
    """
    for pattern, most in _LIMITS.items():
        for file in directory.glob(pattern):
            if file.is_file() and (size := file.stat().st_size) > most:
                raise UserError(
                    f"{file} has {size:,} bytes; a tokenizer's file of this kind has at most "
                    f"{most:,}: it is damaged, or another kind of file"
                )
    for name in (_CONFIG, "config.json"):  # transformers looks for the class in both
        if (directory / name).is_file():
            _check_class(directory / name, read_json(directory / name).get("tokenizer_class"))
    if not (directory / _CONFIG).is_file():
        return
    content = read_json(directory / _CONFIG)
    _check_code(directory / _CONFIG, content)
    _check_names(directory / _CONFIG, content.get(_VERSIONS))
    for name in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        _check_count(directory / _CONFIG, name, content.get(name))


@contextlib.contextmanager
def no_questions() -> Iterator[None]:
    """Let transformers raise an error in the block instead of asking to run code."""
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def check_loaded(tokenizer: Any, directory: Path) -> None:
    """Check that the loaded object is a tokenizer, not for example the pair of a RAG model.

    Raises:
        UserError: an object of another class.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(
            f"{directory}: transformers reads its files as a {type(tokenizer).__name__}, which is "
            "not a tokenizer"
        )


def check_added(tokenizer: Any, directory: Path) -> None:
    """Check the number of added tokens and the largest token id.

    Raises:
        UserError: more than 50,000 added tokens, or an id above 10,000,000.
    """
    _check_count(directory, "the tokenizer", tokenizer.get_added_vocab())
    ids = tokenizer.get_vocab()
    last = max(ids, key=ids.__getitem__, default=None)
    if last is not None and ids[last] > _LARGEST_ID:
        raise UserError(
            f"{directory}: the tokenizer gives {shown(repr(last))} the id {ids[last]:,}; the "
            f"largest that is supported is {_LARGEST_ID:,}"
        )


def _check_count(where: Path, name: str, tokens: Any) -> None:
    if isinstance(tokens, list | dict) and len(tokens) > _MOST_ADDED:
        raise UserError(
            f"{where}: {name} adds {len(tokens):,} tokens; at most {_MOST_ADDED:,} are supported"
        )


def _check_names(file: Path, names: Any) -> None:
    for name in names if isinstance(names, list) else ():
        if not isinstance(name, str) or "/" in name or "\\" in name:
            raise UserError(
                f"{file}: {_VERSIONS} names {name!r}, which is not a file of the directory"
            )


def _check_code(file: Path, content: Mapping[str, Any]) -> None:
    mapped = content.get("auto_map")
    classes = mapped.get("AutoTokenizer") if isinstance(mapped, Mapping) else mapped
    if not classes or (isinstance(classes, list) and not any(classes)):
        return
    given = content.get("tokenizer_class")
    entry = f"auto_map names {_listed(classes)}"
    if isinstance(given, str) and _is_own(given):
        hosts.note(f"{file}: {entry}; that code is not run, transformers' {given} reads the files")
        return
    raise UserError(
        f"{file}: {entry}, code that comes with the files and is never run here, and "
        f"tokenizer_class={given!r} is not a class of transformers. If you trust the code, run it "
        "once elsewhere and save the tokenizer as tokenizer.json; if tokenizer.json is already the "
        "complete tokenizer, remove auto_map and set tokenizer_class to PreTrainedTokenizerFast"
    )


def _listed(classes: Any) -> str:
    names = classes if isinstance(classes, list) else [classes]
    return " and ".join(repr(name) for name in names[:4] if name)


def _is_own(name: str) -> bool:
    return _is_tokenizer(_find_class(name))


def _check_class(file: Path, name: Any) -> None:
    if name is None:
        return
    if not isinstance(name, str):
        raise UserError(f"{file}: tokenizer_class={shown(repr(name))} is not the name of a class")
    found = _find_class(name)
    if found is not None and not _is_tokenizer(found):
        raise UserError(
            f"{file}: tokenizer_class={shown(repr(name))} is not a tokenizer of transformers; if "
            "tokenizer.json is the complete tokenizer, set it to PreTrainedTokenizerFast"
        )


def _find_class(name: str) -> Any:
    """Return the object of this name in transformers, or None."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    found = (tokenizer_class_from_name(name + end) for end in ("", "Fast"))
    return next((one for one in found if one is not None), None)


def _is_tokenizer(found: Any) -> bool:
    """Return True for tokenizers, also those whose library is missing (an error says so)."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.import_utils import DummyObject

    return isinstance(found, DummyObject) or (
        isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
    )
