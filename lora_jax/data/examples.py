"""Examples: the tokens of rows with a loss weight each, and counts of what became of the rows."""

import dataclasses
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised row; `loss_weights[i]` is the weight of `tokens[i]` as a target."""

    tokens: np.ndarray  # (time,) int32
    loss_weights: np.ndarray  # (time,) float32, above 0 for tokens to be predicted
    where: str  # the place of its row, for messages
    # Start of the second text of a pair, if the last token is a label; else None.
    pair_start: int | None = None

    @property
    def length(self) -> int:
        """Number of tokens of its text, without a label."""
        return len(self.tokens) - (self.pair_start is not None)


@dataclass(frozen=True)
class Counts:
    """Counts of the rows of a data set that were kept, cut and left out."""

    examples: int  # rows kept
    supervised_tokens: int  # of the kept rows
    total_tokens: int  # of the kept rows
    truncated: int  # kept rows that were cut at max_length
    dropped: int  # rows left out: too long, or without a supervised token after the cut
    longest: int  # tokens of the longest row before any cut
    unaligned: int  # rows whose prompt gives other tokens if tokenised alone, as for generation
    bad: int = 0  # rows left out under on_bad_row="drop"
    packed: int = 0  # packed rows of tokens, each of whose sequences is a row of its own
    left_out: int = 0  # sequences of packed rows without a supervised token
    empty_answers: int = 0  # kept rows with an empty answer, of which only the end is supervised
    unended_answers: int = 0  # kept rows with an answer before the last that no special token ends

    def with_bad(self, more: int) -> "Counts":
        """Return the counts with `more` bad rows, such as records that could not be parsed."""
        return dataclasses.replace(self, bad=self.bad + more)


def prompt_key(example: Example) -> bytes:
    """Return the tokens before the first supervised one. Examples with equal prompts share it."""
    first = int(np.argmax(example.loss_weights > 0))
    return example.tokens[:first].tobytes()


def has_prompt(example: Example) -> bool:
    """Return True if an example has a prompt; plain texts have none.

    A first token is never supervised, so a single token before the answer is no prompt.
    """
    return not example.loss_weights[:2].any()


def cut(example: Example, max_length: int, too_long: str) -> Example | None:
    """Return an example of at most `max_length` tokens.

    Return None if a longer one is to be dropped, or has no supervised token left after the cut.
    """
    if len(example.tokens) <= max_length:
        return example
    weights = example.loss_weights[:max_length].copy()
    if too_long == "drop" or not weights.any():
        return None
    return Example(example.tokens[:max_length].copy(), weights, example.where)
