"""Checks of a tokenizer's files before transformers reads them: no code, and sizes that fit.

    tokenizer_config.json   {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", null]}}

transformers would import `tokenization_own.py` from the directory, or from a repository of the hub,
if the user agrees. Here nothing of a directory is ever run: where `tokenizer_class` is one of
transformers' own, that class reads the files; any other tokenizer with such an entry is refused.
So is a `tokenizer_class` that is no tokenizer: transformers calls whatever it has by that name, and
`AutoModel` or `AutoProcessor` would read other files of the directory and ask again.
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
_MOST_ADDED = 50_000  # tokens that are added to a vocabulary: Gemma 3 has 6,414
_LARGEST_ID = 10_000_000  # of a token; `tokenizers` makes a list of all ids when it writes


def check_tokenizer_files(directory: Path) -> None:
    """Raise for a tokenizer that needs code of its directory, or files that are too large.

    Raises:
        UserError: the file, what is wrong with it, and what to do.
    """
    for pattern, most in _LIMITS.items():
        for file in directory.glob(pattern):
            if file.is_file() and (size := file.stat().st_size) > most:
                raise UserError(
                    f"{file} has {size:,} bytes; a tokenizer's file of this kind has at most "
                    f"{most:,}, so it is damaged or something else"
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
    """A block in which transformers raises an error where it would ask whether to run code."""
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def check_loaded(tokenizer: Any, directory: Path) -> None:
    """Raise for what is no tokenizer, such as the pair of tokenizers of a RAG model.

    Raises:
        UserError: its class.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(
            f"{directory}: its files are read as a {type(tokenizer).__name__}, which is no "
            "tokenizer of one text"
        )


def check_added(tokenizer: Any, directory: Path) -> None:
    """Raise for more added tokens, or larger ids, than a tokenizer can have.

    Raises:
        UserError: their number; the token of the largest id.
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
                f"{file}: {_VERSIONS} names {name!r}, which is no file of the directory"
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
        f"tokenizer_class={given!r} is no class of transformers. If you trust the code, run it "
        "once elsewhere and save what it makes as a tokenizer.json; if tokenizer.json is the whole "
        "tokenizer already, remove auto_map and set tokenizer_class to PreTrainedTokenizerFast"
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
        raise UserError(f"{file}: tokenizer_class={shown(repr(name))} is no name of a class")
    found = _find_class(name)
    if found is not None and not _is_tokenizer(found):
        raise UserError(
            f"{file}: tokenizer_class={shown(repr(name))} is no tokenizer of transformers; if "
            "tokenizer.json is the whole tokenizer, set it to PreTrainedTokenizerFast"
        )


def _find_class(name: str) -> Any:
    """Return what transformers has by this name; None if nothing."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    found = (tokenizer_class_from_name(name + end) for end in ("", "Fast"))
    return next((one for one in found if one is not None), None)


def _is_tokenizer(found: Any) -> bool:
    """Return True for tokenizers, and for those whose library is missing, which raise that."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.import_utils import DummyObject

    return isinstance(found, DummyObject) or (
        isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
    )
