"""Structured output: grammars of requests, and the tokens that they allow next.

`response_format` is OpenAI's field, `structured_outputs` is vLLM's. Either becomes a `Grammar`,
which llguidance keeps to.
"""

import copy
import functools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import llguidance
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from lora_jax.errors import UserError
from lora_jax.serve.errors import refused

_CONSTRAINTS = ("json", "json_object", "regex", "choice", "grammar")
_WHITESPACE = {"disable_any_whitespace", "whitespace_pattern"}
_OBJECT = '{"type": "object"}'

# By tokenizer: making one takes a second and some MB.
_vocabularies: WeakKeyDictionary[Any, llguidance.LLTokenizer] = WeakKeyDictionary()


class Guide:
    """The state of one answer, as `lora_jax.generate.requests.Guide`."""

    def __init__(self, matcher: llguidance.LLMatcher, ends: Sequence[int], stops: Collection[int]):
        self._matcher, self._ends, self._stops = matcher, list(ends), sorted(stops)

    def allowed(self, vocab: int) -> np.ndarray | None:
        matcher, bits = self._matcher, allocate_token_bitmask(1, vocab)
        if not matcher.is_stopped():
            fill_next_token_bitmask(matcher, bits)
        if matcher.is_error():
            raise UserError(f"the grammar cannot go on: {_first_line(matcher.get_error())}")
        if matcher.is_stopped():
            return None
        # llguidance ends a text by the tokenizer's own token; an answer ends by its stop tokens.
        words = bits[0].view(np.uint32)
        _set(words, self._ends, False)
        if matcher.is_accepting():
            if not words.any():
                return None
            _set(words, self._stops, True)
        return words

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)


class Grammar:
    """The texts that an answer may be.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocab: size of the model's vocabulary, at least that of the tokenizer.
        source: a grammar as `llguidance` takes it.

    Raises:
        UserError: a grammar that is wrong, or too complex.
    """

    def __init__(self, tokenizer: Any, vocab: int, source: str):
        own = _vocabulary(tokenizer, vocab)
        wrong = llguidance.LLMatcher.validate_grammar(source, own)
        if wrong and not wrong.startswith("WARNING"):
            raise UserError(_first_line(wrong))
        self._ends = own.eos_tokens
        self._start = llguidance.LLMatcher(own, source, log_level=0)
        self.start(()).allowed(vocab)  # what is too complex shows here, and is kept

    def start(self, stops: Collection[int]) -> Guide:
        """Return the state of an answer that these tokens may end."""
        return Guide(self._start.deep_copy(), self._ends, stops)


def source_of(request: Any) -> tuple[str, str] | None:
    """Return the grammar of a request, with the name of its field; None if any text will do.

    Raises:
        ApiError: 400 for formats that are not known, and for two at once.
    """
    made = {
        "response_format": _of_format(request.response_format),
        "structured_outputs": _of_outputs(request.structured_outputs),
    }
    given = [(field, source) for field, source in made.items() if source is not None]
    if len(given) > 1:
        raise refused("structured_outputs", "not together with response_format")
    return given[0] if given else None


def _of_format(given: Mapping[str, Any] | None) -> str | None:
    name = "response_format"
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return _of_schema(name, _OBJECT, {})
        case {"type": "json_schema", "json_schema": {"schema": schema, **rest}}:
            # Every schema is kept to, strictly; a name and a description say nothing of the text.
            if unknown := sorted(rest.keys() - {"name", "description", "strict"}):
                raise refused(name, f"json_schema has unknown fields: {', '.join(unknown)}")
            return _of_schema(name, schema, {})
        case {"type": "json_schema"}:
            raise refused(name, "json_schema needs a field `schema` with the schema")
    kinds = "text, json_object or json_schema"
    raise refused(name, f"its type is {given.get('type')!r}; it must be {kinds}")


def _of_outputs(given: Mapping[str, Any] | None) -> str | None:
    name = "structured_outputs"
    if given is None:
        return None
    given = {key: value for key, value in given.items() if value is not None and value is not False}
    if unknown := sorted(given.keys() - {*_CONSTRAINTS, *_WHITESPACE}):
        raise refused(name, f"{', '.join(unknown)} are not supported; use {_listed}")
    chosen = [key for key in _CONSTRAINTS if key in given]
    if len(chosen) != 1:
        raise refused(name, f"needs one of {_listed}, and has {', '.join(chosen) or 'none'}")
    kind, value = chosen[0], given[chosen[0]]
    spaces = {key: given[key] for key in _WHITESPACE & given.keys()}
    if spaces and kind not in ("json", "json_object"):
        raise refused(name, f"{', '.join(sorted(spaces))} only with json or json_object")
    match kind:
        case "json_object" | "json":
            return _of_schema(name, _OBJECT if kind == "json_object" else value, spaces)
        case "choice":
            is_texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
            if not (is_texts and value):
                raise refused(name, "choice must be a list of texts")
            return llguidance.grammar_from("choice", json.dumps(value))
    if not isinstance(value, str):
        raise refused(name, f"{kind} must be a text")
    try:
        return llguidance.grammar_from(kind, value)  # type: ignore[arg-type]
    except ValueError as error:
        raise refused(name, _first_line(str(error))) from error


def _of_schema(field: str, schema: Any, spaces: Mapping[str, Any]) -> str:
    if not isinstance(schema, str | dict):
        raise refused(field, "the schema must be an object, or its text")
    options: Any = {}
    if spaces.get("disable_any_whitespace"):
        options["whitespace_flexible"] = False
    if pattern := spaces.get("whitespace_pattern"):
        options["whitespace_pattern"] = pattern
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except (ValueError, TypeError) as error:
        raise refused(field, _first_line(str(error))) from error


def _vocabulary(tokenizer: Any, vocab: int) -> llguidance.LLTokenizer:
    found = _vocabularies.get(tokenizer)
    if found is None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError("structured output needs a model with a fast tokenizer")
        plain = copy.deepcopy(tokenizer.backend_tokenizer)
        plain.no_padding()
        plain.no_truncation()
        found = _vocabularies[tokenizer] = _of_text(plain.to_str(), vocab, tokenizer.eos_token_id)
    return found


@functools.lru_cache(maxsize=8)
def _of_text(text: str, vocab: int, end: int | None) -> llguidance.LLTokenizer:
    """Return the vocabulary of a tokenizer's JSON. Adapters' tokenizers are often equal ones."""
    return llguidance.LLTokenizer(text, n_vocab=vocab, eos_token=end)


def _set(words: np.ndarray, tokens: Collection[int], on: bool) -> None:
    """Set the bits of tokens."""
    for token in tokens:
        bit = np.uint32(1 << (token % 32))
        words[token // 32] = words[token // 32] | bit if on else words[token // 32] & ~bit


def _first_line(text: str) -> str:
    """Return the first line of an error of llguidance, without the grammar."""
    line = text.partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:200]}..."


_listed = ", ".join(_CONSTRAINTS)
