"""The tokenizer of a model as metadata of a GGUF file: the inverse of `tokenizer`.

Kinds of tokenizers that llama.cpp would split otherwise are refused.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError, raise_all
from lora_jax.formats.gguf.tokenizer import CONTROL, PRE_TOKENIZERS, SPACE, USER_DEFINED

_NORMAL, _UNUSED, _BYTE = 1, 5, 6  # values of tokenizer.ggml.token_type, as CONTROL
_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
_REMEDY = "; export with --format hf, and convert that with llama.cpp's own program"


def vocabulary_fields(
    tokenizer: Any, architecture: str, vocab_size: int, stops: Sequence[int], template: str | None
) -> dict[str, Any]:
    """Return the metadata of a tokenizer of transformers. `stops` are the ids that end an answer,
    and `template` replaces its chat template.

    Raises:
        UserError: a tokenizer that llama.cpp cannot have in this form.
    """
    where = Path(tokenizer.name_or_path) / "tokenizer.json"
    if not tokenizer.is_fast:
        raise UserError(f"{where} does not exist: a GGUF file needs it{_REMEDY}")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    build = {"llama": _byte_level, "gemma3": _sentencepiece}[architecture]
    if content["model"]["type"] != "BPE":
        raise UserError(f"{where} is no BPE tokenizer: not supported in a GGUF file{_REMEDY}")
    merges = [_pair(merge) for merge in content["model"]["merges"]]
    own, problems = build(content, merges)
    problems += _added_problems(content)
    names = _tokens_by_id(tokenizer, vocab_size)
    if names is None:
        problems.append(f"it has ids outside of the {vocab_size} rows of the embedding")
    raise_all([f"{where}: {problem}{_REMEDY}" for problem in problems])
    tokens, types = _tokens_and_types(names or {}, vocab_size, content, architecture)
    fields = {
        **own,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **_scores(tokens, merges, architecture),
        **_special_fields(tokenizer, stops),
    }
    chosen = template or _own_template(tokenizer)
    return fields | ({"tokenizer.chat_template": chosen} if chosen else {})


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _byte_level(content: Mapping, merges: Sequence) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a byte-level BPE tokenizer, and why it cannot be one in a GGUF file."""
    own = _plain(content["pre_tokenizer"])
    pre = next(
        (
            name
            for name, known in PRE_TOKENIZERS.items()
            if _plain(json.loads(known.__getstate__())) == own
        ),
        None,
    )
    problems = []
    if pre is None:
        problems.append(f"its pre-tokenizer is none of: {', '.join(PRE_TOKENIZERS)}")
    if content["normalizer"] is not None:
        problems.append("it has a normalizer")
    if not merges:
        problems.append("it has no merges, without which llama.cpp reads no file")
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
    }
    return fields, problems


def _plain(part: Any) -> Any:
    """Return the settings of a pre-tokenizer that change its result."""
    if isinstance(part, Mapping):
        return {key: _plain(value) for key, value in part.items() if key != "trim_offsets"}
    return [_plain(one) for one in part] if isinstance(part, list) else part


def _sentencepiece(content: Mapping, merges: Sequence) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of Gemma's tokenizer, and why it cannot be one in a GGUF file."""
    problems = []
    normalizer = content["normalizer"] or {}
    if (normalizer.get("type"), normalizer.get("content")) != ("Replace", SPACE):
        problems.append(f"its normalizer does not replace spaces by {SPACE!r}")
    if not content["model"]["byte_fallback"]:
        problems.append("it has no tokens of bytes for text without a piece")
    seen, last = set(), None
    for pair in merges:  # llama.cpp has a score for each piece, and none for pairs
        piece = "".join(pair)
        if piece != last and piece in seen:
            problems.append(f"its merges into {piece!r} are not next to each other")
            break
        seen.add(piece)
        last = piece
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": False,
    }
    return fields, problems


def _added_problems(content: Mapping) -> list[str]:
    """List added tokens that take text around them, which llama.cpp has no flag for."""
    flags = ("lstrip", "rstrip", "single_word")
    return [
        f"its token {token['content']!r} has {flag}"
        for token in content["added_tokens"]
        for flag in flags
        if token[flag]
    ][:4]


def _tokens_by_id(tokenizer: Any, vocab_size: int) -> dict[int, str] | None:
    """Return the tokens, or None if there are ids outside of the embedding."""
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    return None if max(names, default=0) >= vocab_size else names


def _tokens_and_types(
    names: Mapping[int, str], vocab_size: int, content: Mapping, architecture: str
) -> tuple[list[str], list[int]]:
    """Return a token and a type for every row of the embedding."""
    special = {one["content"]: one["special"] for one in content["added_tokens"]}
    tokens, types = [], []
    for index in range(vocab_size):
        token = names.get(index, f"[PAD{index}]")
        tokens.append(token)
        if index not in names:
            types.append(_UNUSED)
        elif token in special:
            types.append(CONTROL if special[token] else USER_DEFINED)
        elif architecture == "gemma3" and token in _BYTE_TOKENS:
            types.append(_BYTE)
        else:
            types.append(_NORMAL)
    return tokens, types


def _scores(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], architecture: str
) -> dict[str, Any]:
    """Return the scores by which llama.cpp chooses the next piece to join: the first merge wins."""
    if architecture != "gemma3":
        return {}
    order: dict[str, int] = {}
    for pair in merges:
        order.setdefault("".join(pair), len(order) + 1)
    return {"tokenizer.ggml.scores": [-float(order.get(token, 0)) for token in tokens]}


def _special_fields(tokenizer: Any, stops: Sequence[int]) -> dict[str, Any]:
    """Return the ids of special tokens, and if a text is put between BOS and EOS. The first of
    `stops` is the end of text, and the second that of a turn.
    """
    ends = list(dict.fromkeys([*stops, tokenizer.eos_token_id]))
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": ends[0],
        "eot": ends[1] if len(ends) > 1 else None,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    fields: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": int(index)
        for name, index in ids.items()
        if index is not None
    }
    text: Collection[int] = tokenizer.encode("a")
    for side, place in (("bos", 0), ("eos", -1)):
        own = getattr(tokenizer, f"{side}_token_id")
        fields[f"tokenizer.ggml.add_{side}_token"] = own is not None and list(text)[place] == own
    return fields


def _own_template(tokenizer: Any) -> str | None:
    """Return the chat template of a tokenizer; of several, the default one."""
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, Mapping) else found
