"""Checks of a tokenizer's files before transformers reads them: no code, and sizes that fit.

    tokenizer_config.json   {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", null]}}

transformers would import `tokenization_own.py` from the directory, or from a repository of the hub,
if the user agrees. Here nothing of a directory is ever run: where `tokenizer_class` is one of
transformers' own, that class reads the files; any other tokenizer with such an entry is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax import hosts
from lora_jax.config import UserError, read_json

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
    if not (directory / _CONFIG).is_file():
        return
    content = read_json(directory / _CONFIG)
    _check_code(directory / _CONFIG, content)
    _check_names(directory / _CONFIG, content.get(_VERSIONS))
    for name in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        _check_count(directory / _CONFIG, name, content.get(name))


def check_added(tokenizer: Any, directory: Path) -> None:
    """Raise for more added tokens than a tokenizer can have.

    Raises:
        UserError: their number.
    """
    _check_count(directory, "the tokenizer", tokenizer.get_added_vocab())


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
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return any(tokenizer_class_from_name(name + end) is not None for end in ("", "Fast"))
