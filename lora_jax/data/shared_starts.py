"""Rows in which texts that begin alike share their start, which is computed once.

The start of a text can be shared up to the token before its first supervised one: that token and
all after it are the text's own, as a token is predicted from the one before it in the row. See
`lora_jax.nn.texts` for the form of a row, and `lora_jax.data.packing` for rows without sharing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_jax.data.examples import Example


def shareable(example: Example) -> np.ndarray:
    """Return the tokens of a text that other texts may share."""
    first = int(np.argmax(example.loss_weights > 0)) if example.loss_weights.any() else 0
    return example.tokens[: max(0, first - 1)]


def common(first: np.ndarray, second: np.ndarray) -> int:
    """Return the number of tokens that both begin with."""
    size = min(len(first), len(second))
    differ = np.nonzero(first[:size] != second[:size])[0]
    return int(differ[0]) if differ.size else size


@dataclass(frozen=True)
class Branch:
    """The place of a text in a row.

    text: its index among the texts
    slots: of all its tokens; the first `shared` are also those of an earlier text
    """

    text: int
    slots: np.ndarray  # (tokens of the text,)
    shared: int = 0

    @property
    def own(self) -> np.ndarray:
        """Slots of the tokens that no earlier text has."""
        return self.slots[self.shared :]


def place(texts: Sequence[Example], share_prompts: bool) -> list[Branch]:
    """Place texts in a row, one after the other: in the order given or, where they share their
    starts, so that those that begin alike are adjacent.
    """
    order, starts = list(range(len(texts))), [np.zeros(0, np.int32)] * len(texts)
    if share_prompts:
        starts = [shareable(text) for text in texts]
        order.sort(key=lambda i: _sortable(starts[i]))
    found: list[Branch] = []
    end, before = 0, np.zeros(0, np.int32)
    for index in order:
        shared = common(before, starts[index])
        new = np.arange(end, end + len(texts[index].tokens) - shared)
        slots = np.concatenate([found[-1].slots[:shared], new]) if found else new
        found.append(Branch(index, slots, shared))
        end, before = end + len(new), starts[index]
    return found


def size(example: Example, share_prompts: bool) -> int:
    """Return the tokens of an example in a row of its own."""
    if not share_prompts or example.second_start is None:
        return len(example.tokens)
    return sum(len(one.own) for one in place(example.texts, share_prompts))


def _sortable(tokens: np.ndarray) -> bytes:
    """Return bytes that have the order of lists of tokens."""
    return tokens.astype(">i4").tobytes()


# Which examples go into one row


@dataclass(frozen=True)
class Group:
    """Examples whose texts all begin with the same `start` tokens."""

    start: int
    indices: list[int]


@dataclass
class _Interval:
    """Neighbours in sorted order with `start` tokens in common, while they are counted."""

    start: int
    first: int
    saved: float = 0.0
    groups: tuple[tuple[int, int, int], ...] = ()  # (start, first, end) of each


def groups(examples: Sequence[Example], max_length: int) -> list[Group]:
    """Return groups of examples to pack separately, so that their rows hold few tokens; the last
    group shares no start.

    A group of n examples with a start of c tokens in r rows saves (n - r) c tokens, and costs up
    to a row that is not full. The groups are those that save most: every common start of
    neighbours in the order of their tokens is compared with the longer starts within it.
    """
    prefixes = [_start_of(example) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: _sortable(prefixes[i]))
    sizes = np.cumsum([0, *(size(examples[i], True) for i in order)])

    def saving(start: int, first: int, end: int) -> float:
        count = end - first
        own = int(sizes[end] - sizes[first]) - count * start
        rows = -(-own // max(1, max_length - start))
        return float((count - rows) * start - max_length)

    stack = [_Interval(0, 0)]
    starts = [common(prefixes[i], prefixes[j]) for i, j in zip(order, order[1:], strict=False)]
    for end, start in enumerate([*starts, 0], start=1):
        first, inner = end - 1, _Interval(0, 0)
        while stack[-1].start > start:
            top = stack.pop()
            own = saving(top.start, top.first, end)
            if own > top.saved:
                top.saved, top.groups = own, ((top.start, top.first, end),)
            first, inner = top.first, top
            if stack[-1].start >= start:
                stack[-1].saved += top.saved
                stack[-1].groups += top.groups
                inner = _Interval(0, 0)
        if stack[-1].start < start:
            stack.append(_Interval(start, first, inner.saved, inner.groups))
    found = [Group(start, sorted(order[a:b])) for start, a, b in stack[0].groups]
    grouped = {index for group in found for index in group.indices}
    rest = [index for index in range(len(examples)) if index not in grouped]
    return [*found, *([Group(0, rest)] if rest else [])]


def _start_of(example: Example) -> np.ndarray:
    """Return the tokens that all texts of an example begin with, and may share."""
    first, *others = (shareable(text) for text in example.texts)
    for other in others:
        first = first[: common(first, other)]
    return first
