"""Small files of a Hugging Face directory: tokenizer, templates, generation config, licence.

All exports include them. Copies of JSON and Jinja files have no byte order mark, which transformers
would refuse or render.
"""

import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_jax.config import expand, read_json, read_text
from lora_jax.config.text import BOM, exists, shown
from lora_jax.errors import UserError
from lora_jax.formats.tokenizer_files import (
    check_added,
    check_loaded,
    check_tokenizer_files,
    no_questions,
)

# Files that `save_pretrained` of a tokenizer or processor writes, and licences.
_TEMPLATES = ("chat_template*", "additional_chat_templates/*.jinja")
SIDE_FILES = (
    *_TEMPLATES,
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab*", "*vocab.json", "merges.txt", "bpe.codes", "dict.txt"),
    *("*.model", "*.spm", "*.tiktoken", "*.tokenizer"),
    *("emoji.json", "normalizer.json", "byte_maps.json", "word_*.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("LICENSE*", "LICENCE*", "License*", "license*", "COPYING*", "NOTICE*", "Notice*"),
    "USE_POLICY*",
)
_JSON = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_OWN_TEMPLATE = "chat_template.jinja"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_side_files(source: Path, target: Path, chat_template: str | None = None) -> None:
    """Copy tokenizer, chat templates and licence. A `chat_template` (Jinja text) replaces all
    templates of the model, also named ones.
    """
    left_out = () if chat_template is None else _find(source, _TEMPLATES)
    for file in _find(source, SIDE_FILES):
        if file not in left_out:
            _copy(source / file, target / file)
    if chat_template is not None:
        (target / _OWN_TEMPLATE).write_text(chat_template, encoding="utf-8")


def _find(source: Path, patterns: Collection[str]) -> list[Path]:
    """Return the files that match, relative to `source`."""
    found = {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(source) for file in found)


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if _is_marked(file):
        target.write_bytes(file.read_bytes().removeprefix(BOM))
    else:
        shutil.copyfile(file, target)


def _is_marked(file: Path) -> bool:
    if file.suffix not in (".json", ".jinja"):
        return False
    with file.open("rb") as opened:
        return opened.read(len(BOM)) == BOM


def load_tokenizer(directory: str | Path) -> Any:
    """Return the tokenizer of a Hugging Face directory; nothing in the directory is run.

    Raises:
        UserError: no tokenizer that transformers can load; a file that is not UTF-8 text, or not
            JSON; as `check_tokenizer_files`.
    """
    directory = expand(directory)
    from transformers import AutoTokenizer

    check_tokenizer_files(directory)
    for file in _find(directory, _TEMPLATES):
        if file.suffix == ".jinja":  # transformers accepts null bytes
            read_text(directory / file)
    try:
        with _unmarked(directory) as place, no_questions():
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, which do not name the file
        for file in _find(directory, _JSON):
            read_json(directory / file)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        goes_on = len(lines) > 1 and lines[0].endswith(":")  # the second line has the reason
        reason = " ".join(lines[: 1 + goes_on])[:1000] or type(error).__name__
        raise UserError(
            f"{directory} has no tokenizer that transformers can load: {reason}"
        ) from error
    check_loaded(tokenizer, directory)
    check_added(tokenizer, directory)
    tokenizer.name_or_path = str(directory)
    return tokenizer


@contextmanager
def _unmarked(directory: Path) -> Iterator[Path]:
    """Yield the directory, or copies of its small files if any has a byte order mark."""
    files = _find(directory, ("config.json", *SIDE_FILES))
    if not any(_is_marked(directory / file) for file in files):
        yield directory
        return
    with tempfile.TemporaryDirectory() as copies:
        for file in files:
            _copy(directory / file, Path(copies) / file)
        yield Path(copies)


# Tokens that end a generation


def stop_tokens(directory: str | Path) -> list[int]:
    """Return the EOS ids of generation_config.json and config.json.

    Raises:
        UserError: a file that cannot be read, or values that are not token ids.
    """
    directory = expand(directory)
    found = {token for name in _configs(directory) for token in read_eos(directory / name)}
    return sorted(found)


def generation_stops(directory: str | Path) -> list[int]:
    """Return the ids at which transformers and vLLM end an answer of the model, in their order.

    Raises:
        UserError: as `stop_tokens`.
    """
    directory = expand(directory)
    names = _configs(directory)
    return read_eos(directory / names[0]) if names else []


def write_generation_config(source: Path, target: Path, stops: Collection[int] = ()) -> None:
    """Copy the generation config of the model in `source`, with `stops` added to its EOS ids.

    If there is none, transformers takes the token ids of config.json; a new file keeps these.

    Raises:
        UserError: as `stop_tokens`.
    """
    file = source / "generation_config.json"
    known = generation_stops(source) if stops else []
    added = sorted(set(stops) - set(known))
    if not added:
        if file.is_file():
            _copy(file, target / file.name)
        return
    if exists(file):
        content = read_json(file)
    else:
        config = _with_text(read_json(source / "config.json"))
        content = {name: config[name] for name in _TOKENS if config.get(name) is not None}
    ids = [*known, *added]
    write_json(target / file.name, content | {"eos_token_id": ids if len(ids) > 1 else ids[0]})


def _configs(directory: Path) -> list[str]:
    """Return the files that may name EOS ids, in order of precedence."""
    names = ("generation_config.json", "config.json")
    return [name for name in names if exists(directory / name)]


def _with_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json, and those of its `text_config` where it has none."""
    text, own = config.get("text_config"), {k: v for k, v in config.items() if v is not None}
    return {**text, **own} if isinstance(text, Mapping) else own


def read_eos(file: Path) -> list[int]:
    """Return the ids under `eos_token_id` of a JSON file, in their order.

    Raises:
        UserError: the file cannot be read, or the values are not token ids.
    """
    value = _with_text(read_json(file)).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise UserError(
            f"{file}: eos_token_id={shown(repr(value))} must be a token id or a list of them; "
            "correct the file"
        )
    return list(dict.fromkeys(ids))


def write_json(file: Path, content: Any) -> None:
    """Write JSON with sorted keys and a final newline, so that equal content gives equal bytes."""
    file.write_text(
        json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
