"""Requests in the rows of an engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.errors import UserError
from lora_jax.generate.decode import Chunk
from lora_jax.generate.device import chunk_size
from lora_jax.generate.requests import Guide, Request
from lora_jax.generate.versions import Version


@dataclass
class Running:
    """A request in a row."""

    id: int
    request: Request
    versions: list[Version]
    row: int
    places: int  # placeholders of virtual tokens
    text: list[int]  # placeholders, prompt and answer
    start: int  # of the answer in it
    read: int = 0  # tokens that the cache has
    limit: int = 0  # tokens of the answer after which the row pauses
    decoding: bool = False
    guide: Guide | None = None
    allowed: np.ndarray | None = None  # bits of the tokens that may come next, by the guide
    error: UserError | None = None  # of the guide

    def advance(self, tokens: Sequence[int], vocab: int) -> str | None:
        """Tell the guide of new tokens of the answer; return the finish_reason if it ends here."""
        if self.guide is None:
            return None
        try:
            for token in tokens:
                self.guide.accept(token)
            self.allowed = self.guide.allowed(vocab)
        except UserError as error:
            self.error = error
            return "error"
        return "stop" if self.allowed is None else None

    def next_chunk(self) -> Chunk:
        """Return the next chunk of the text. Its size depends on the text alone, as do its bits."""
        left = len(self.text) - self.read
        time = chunk_size(left)
        piece = self.text[self.read : self.read + time]
        return Chunk(
            rows=np.array([self.row], np.int32),
            tokens=filled(piece, time, np.int32)[None],
            start=np.array([self.read], np.int32),
            count=np.array([len(piece)], np.int32),
            length=np.array([len(self.text)], np.int32),
        )


def filled(values: Sequence[Any], length: int, dtype: Any) -> np.ndarray:
    """Return values with zeros behind them, up to a length."""
    return np.array([*values, *[0] * (length - len(values))], dtype)[:length]
