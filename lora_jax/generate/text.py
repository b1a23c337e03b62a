"""Text of an answer while its tokens are generated, and the strings that end it.

stream = TextStream(tokenizer, stop=["\\n\\n"])
piece  = stream.add(tokens)             # text that no later token changes
last   = stream.end()                   # the rest, when the answer has ended

Held back until they are certain: a character of which only some bytes are generated, and text that
may be the beginning of a stop string.
"""

import os.path
import re
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax.errors import UserError, raise_all

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a token of one byte, with byte fallback
_CONTEXT = 32  # tokens of the prompt that decide how the answer begins
# `clean_up_tokenization` of transformers replaces ten strings of at most four characters, one after
# the other; each replacement depends on at most three characters that follow.
_CLEANED = 30


def check_stop_strings(stop: Any) -> tuple[str, ...]:
    """Return stop strings as a tuple; one string is a tuple of one.

    Raises:
        UserError: a stop string that is not a string, or empty.

    >>> check_stop_strings("END")
    ('END',)
    """
    if stop is None:
        return ()
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Sequence | set | frozenset) or isinstance(stop, bytes):
        raise UserError(f"stop={stop!r} must be a string or several")
    own = tuple(stop)
    bad = [one for one in own if not isinstance(one, str) or not one]
    raise_all([f"stop strings must be non-empty strings, not {one!r}" for one in bad])
    return own


class TextStream:
    """Text of one answer from its tokens, in pieces.

    The pieces together are the text that the tokenizer decodes from all tokens: with
    `prompt_tokens`, the part of decode(prompt_tokens + tokens) after decode(prompt_tokens).
    Tokenizers that drop a space at the beginning of a text keep that of an answer with it.

    The answer ends at the stop string that is complete first; of several that end with the same
    character, at the longest. The result does not depend on how tokens are passed to `add`.

    Attributes:
        text: the pieces so far.
        tokens: number of tokens read; those after a stop string are not.
        stopped_by: the stop string that ended the answer, or None.

    Args:
        tokenizer: of transformers.
        prompt_tokens: token ids before the answer.
        stop: strings that end the answer.
        include_stop: keep the stop string in the text.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        UserError: as `check_stop_strings`.

    Example:
        >>> from lora_jax.generate.text import TextStream
        >>> stream = TextStream(tokenizer, stop="lo w")
        >>> [stream.add([token]) for token in tokenizer("hello world")["input_ids"]][:5]
        ['h', 'e', '', 'l', '']
        >>> stream.text, stream.stopped_by, stream.end()
        ('hel', 'lo w', '')
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_tokens: Sequence[int] = (),
        *,
        stop: str | Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ):
        self.text = ""
        self.tokens = 0
        self.stopped_by: str | None = None
        self._stop = check_stop_strings(stop)
        self._include_stop = include_stop
        self._held = ""  # certain text that may begin a stop string
        self._ended = False
        prompt = list(map(int, prompt_tokens))
        self._decoder, self._is_byte = _pieces(tokenizer, prompt, skip_special_tokens)
        # A run of tokens of one byte is decoded as a whole: an invalid one changes all of them.
        self._run: list[int] = []

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that is certain after further tokens. Tokens after a stop string are not
        read.
        """
        pieces = []
        for token in map(int, tokens):
            if self.stopped_by is not None:
                break
            self.tokens += 1
            self._run.append(token)
            # A token without text, as a special one, does not end a run.
            goes_on = len(self._run) > 1 and not self._decoder.decode([token])
            if goes_on or self._is_byte(token):
                continue
            new, self._run = self._decoder.add(self._run), []
            pieces.append(self._give(new, is_last=False))
        return "".join(pieces)

    def end(self) -> str:
        """Return the rest of the text; no tokens follow."""
        if self._ended or self.stopped_by is not None:
            return ""
        self._ended = True
        return self._give(self._decoder.end(self._run), is_last=True)

    def _give(self, new: str, is_last: bool) -> str:
        """Return the part of the held and the new text that can be given, cut at a stop string."""
        if not self._stop:
            self.text += new
            return new
        given = len(self.text)
        text = self.text + self._held + new
        start = len(text) - len(new)
        if (found := _find(text, start, self._stop)) is not None:
            end, size = found
            self.stopped_by = text[end - size : end]
            self._held = ""
            self.text = text[: end if self._include_stop else end - size]
            return self.text[given:]
        hold = 0 if is_last or self._include_stop else _held_back(text[given:], self._stop)
        self.text = text[: len(text) - hold]
        self._held = text[len(text) - hold :]
        return self.text[given:]


def _find(text: str, start: int, stops: Sequence[str]) -> tuple[int, int] | None:
    """Return the end and the length of the stop string that is complete first, among those that end
    after `start`; of several with this end, the longest.
    """
    found = []
    for stop in stops:
        at = text.find(stop, max(0, start - len(stop) + 1))
        if at >= 0:
            found.append((at + len(stop), -len(stop)))
    if not found:
        return None
    end, size = min(found)
    return end, -size


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that begins a stop string."""
    longest = min(len(text), max(map(len, stops)) - 1)
    return next(
        (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0
    )


class _Window:
    """Text of tokens decoded with a few tokens before them: for fast tokenizers, whose decoders
    look at neighbours and at the beginning of a text only.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: list[int]):
        self.decode = decode
        self._ids = prompt[-_CONTEXT:] if decode(prompt[-_CONTEXT:]).strip() else prompt
        # The answer completes a character that the prompt begins.
        self._given = decode(self._ids).removesuffix("\ufffd")
        self._context = len(self._ids)  # number of ids whose text is given

    def add(self, tokens: list[int]) -> str:
        self._ids = self._ids + tokens
        text = self.decode(self._ids)
        if text.endswith("\ufffd") or not text.startswith(self._given):
            return ""
        new = text[len(self._given) :]
        if new:
            rest = self._ids[self._context :]
            own = self.decode(rest)
            # Spaces at the beginning may be dropped: the context begins with more than these.
            self._ids, self._given = (rest, own) if own.strip() else (self._ids, text)
            self._context = len(self._ids)
        return new

    def end(self, tokens: list[int]) -> str:
        return self.decode(self._ids + tokens)[len(self._given) :]


class _Whole:
    """Text of all tokens, decoded each time: for tokenizers in Python, and those that remove spaces
    from the whole text. The text of the last token is held back, and the last `hold` characters
    after a space.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: list[int], hold: int):
        self.decode = decode
        self._ids = prompt
        self._text = decode(prompt)
        self._given = self._text.removesuffix("\ufffd")
        self._hold = hold

    def add(self, tokens: list[int]) -> str:
        self._ids = self._ids + tokens
        text = self.decode(self._ids)
        if text == self._text:  # a token without text does not settle that before it
            return ""
        before, self._text = self._text, text
        certain = os.path.commonprefix([before, text]).rstrip("\ufffd")
        space = certain.find(" ", max(0, len(certain) - self._hold))
        certain = certain[:space] if self._hold and space >= 0 else certain
        if not certain.startswith(self._given):
            return ""
        new, self._given = certain[len(self._given) :], certain
        return new

    def end(self, tokens: list[int]) -> str:
        return self.decode(self._ids + tokens)[len(self._given) :]


def _removes_spaces(tokenizer: Any) -> bool:
    """Tell if `decode` of the tokenizer applies `clean_up_tokenization`: not to byte-pair encoding,
    unless another setting says so.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    if backend is None or type(backend.model).__name__ != "BPE":
        return True
    name = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return bool(getattr(tokenizer, name, False))


def _pieces(
    tokenizer: Any, prompt: list[int], skip_special_tokens: bool
) -> tuple[_Window | _Whole, Callable[[int], bool]]:
    """Return the decoder of a tokenizer, and a function that tells if a token is a single byte."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    removes = _removes_spaces(tokenizer)
    source = tokenizer if backend is None or removes else backend

    def decode(ids: list[int]) -> str:
        return source.decode(ids, skip_special_tokens=skip_special_tokens)

    def is_byte(token: int) -> bool:
        find = tokenizer.convert_ids_to_tokens if backend is None else backend.id_to_token
        return _BYTE.fullmatch(find(token) or "") is not None

    if source is backend:
        return _Window(decode, prompt), is_byte
    return _Whole(decode, prompt, _CLEANED if removes else 0), is_byte
