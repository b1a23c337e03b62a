"""Examples: the tokens of rows with a loss weight each, and counts of what became of the rows."""

import dataclasses
from dataclasses import dataclass

import numpy as np

CHOSEN, REJECTED, OTHER = 1, 2, 3  # roles of the texts of a pair of answers; 0 is padding
Roles = tuple[int, int]  # of the first text and the second


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised row; `loss_weights[i]` is the weight of `tokens[i]` as a target.

    Two answers to compare are one example: their texts one after the other, each with its prompt.
    """

    tokens: np.ndarray  # (time,) int32
    loss_weights: np.ndarray  # (time,) float32, above 0 for tokens to be predicted
    where: str  # the place of its row, for messages
    # Start of the second text of a pair, if the last token is a label; else None.
    pair_start: int | None = None
    second_start: int | None = None  # start of the second text, of two answers; else None
    roles: Roles = (0, 0)  # of the texts of two answers
    reference: np.ndarray | None = None  # (time,) float32: log-probabilities by the reference model
    replay: bool = False  # general text to compare with the base on, and not to learn

    @property
    def length(self) -> int:
        """Number of tokens of its text, without a label; of two answers, of the longer text."""
        if self.second_start is not None:
            return max(self.second_start, len(self.tokens) - self.second_start)
        return len(self.tokens) - (self.pair_start is not None)

    @property
    def texts(self) -> tuple["Example", ...]:
        """The texts of two answers as examples of their own; else the example itself."""
        if self.second_start is None:
            return (self,)
        parts = slice(self.second_start), slice(self.second_start, None)
        return tuple(
            Example(self.tokens[part], self.loss_weights[part], self.where) for part in parts
        )


def join(first: Example, second: Example, roles: Roles) -> Example:
    """Return two texts with their roles as one example."""
    return Example(
        np.concatenate([first.tokens, second.tokens]),
        np.concatenate([first.loss_weights, second.loss_weights]),
        first.where,
        second_start=len(first.tokens),
        roles=roles,
    )


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

    Return None if a longer one is to be dropped, or has no supervised token left after the cut. Of
    two answers, both need one, and they must still differ.
    """
    if len(example.tokens) <= max_length:
        return example
    if example.second_start is not None:
        return _cut_pair(example, max_length, too_long)
    weights = example.loss_weights[:max_length].copy()
    if too_long == "drop" or not weights.any():
        return None
    return Example(example.tokens[:max_length].copy(), weights, example.where)


def _cut_pair(example: Example, max_length: int, too_long: str) -> Example | None:
    """Cut two answers that have more than `max_length` tokens together: the longer text first, then
    both alike.
    """
    shorter = min(len(text.tokens) for text in example.texts)
    limit = max(max_length // 2, max_length - shorter)
    first, second = (cut(text, limit, too_long) for text in example.texts)
    if first is None or second is None:
        return None
    if example.roles == (CHOSEN, REJECTED) and np.array_equal(first.tokens, second.tokens):
        return None  # they differed behind the cut
    return join(first, second, example.roles)
