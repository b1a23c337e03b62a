"""Packing of several examples into one row, separated by segment IDs and positions.

    tokens        a b c d e f 0 0
    loss_weights  0 0 1 0 1 1 0 0     weight of the token at the same index, as a target
    segment_ids   1 1 1 2 2 2 0 0     0 is padding
    positions     0 1 2 0 1 2 0 0

Position i predicts tokens[i + 1] with weight loss_weights[i + 1]. The first token of every segment
has weight 0, so no prediction crosses from one example into the next.
"""

import dataclasses
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_jax.data.examples import Example, join
from lora_jax.data.shared_starts import Branch, groups, place, size


def pack(lengths: Sequence[int], max_length: int, window: int = 256) -> list[list[int]]:
    """Return the indices of the examples in each row. Every example is in one row, and not split.

    Best fit decreasing inside a window: the examples are taken in the given order, as many at a
    time as fill `window` rows. Of these, the longest goes first, into the fullest row that has room
    for it. So the given order is kept except within a window, and the time is O(n log n). Rows and
    the examples in them are in the order of their indices.

    Raises:
        ValueError: a length that is not in 1..max_length.

    Example:
        >>> from lora_jax.data import pack
        >>> pack([5, 2, 3, 6], max_length=8)
        [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    start = tokens = 0
    for index, length in enumerate(lengths):
        if not 1 <= length <= max_length:
            raise ValueError(f"example {index} has {length} tokens: not between 1 and {max_length}")
        tokens += length
        if tokens >= window * max_length:
            rows += _pack_window(lengths, range(start, index + 1), max_length)
            start, tokens = index + 1, 0
    return rows + _pack_window(lengths, range(start, len(lengths)), max_length)


def _pack_window(lengths: Sequence[int], indices: range, max_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free tokens -> rows that have so many
    rooms: list[int] = []  # sorted keys of `by_room` that have a row
    for index in sorted(indices, key=lambda i: -lengths[i]):
        found = bisect_left(rooms, lengths[index])
        if found == len(rooms):
            room, row = max_length, len(rows)
            rows.append([])
        else:
            room = rooms[found]
            row = by_room[room].pop()
            if not by_room[room]:
                del rooms[found]
        rows[row].append(index)
        room -= lengths[index]
        if room:
            same = by_room.setdefault(room, [])
            if not same:
                insort(rooms, room)
            same.append(row)
    return sorted(sorted(row) for row in rows)


def pack_examples(
    examples: Sequence[Example], first: Sequence[int], max_length: int, share_prompts: bool
) -> list[list[int]]:
    """Return the indices of the examples of each row, packed in the order `first`. Where texts
    share their starts, each of the `groups` is packed by itself.
    """
    if not share_prompts:
        rows = pack([len(examples[i].tokens) for i in first], max_length)
        return [[int(first[i]) for i in row] for row in rows]
    found = []
    rank = {int(index): place for place, index in enumerate(first)}
    for group in groups(examples, max_length):
        own = sorted(group.indices, key=rank.__getitem__)
        lengths = [size(examples[i], share_prompts) - group.start for i in own]
        found += [[own[i] for i in row] for row in pack(lengths, max_length - group.start)]
    return sorted(found, key=lambda row: rank[row[0]])


def tokens_of(
    examples: Sequence[Example], rows: Sequence[Sequence[int]], share_prompts: bool
) -> int:
    """Return the tokens of rows, which hold the examples of these indices."""
    if not share_prompts:
        return sum(len(examples[i].tokens) for row in rows for i in row)
    texts = ([text for i in row for text in examples[i].texts] for row in rows)
    return sum(len(branch.own) for row in texts for branch in place(row, share_prompts))


def with_places(examples: Sequence[Example], count: int) -> list[Example]:
    """Return the examples with `count` tokens in front, to be replaced by virtual tokens.

    Their value has no effect, and none is predicted.
    """
    if not count:
        return list(examples)
    return [_with_places(example, count) for example in examples]


def _with_places(example: Example, count: int) -> Example:
    if example.second_start is not None:
        first, second = (_with_places(text, count) for text in example.texts)
        return join(first, second, example.roles)
    return dataclasses.replace(
        example,
        tokens=np.pad(example.tokens, (count, 0)),
        loss_weights=np.pad(example.loss_weights, (count, 0)),
    )


def to_row(
    examples: Sequence[Example], max_length: int, share_prompts: bool = False
) -> dict[str, np.ndarray]:
    """Return one row of `tokens`, `loss_weights`, `segment_ids` and `positions`: (max_length,).

    Integers are int32 and weights float32; the rest is padding with zeros. Labelled texts also have
    `token_types`, 1 in the second text of a pair. The position of a label is padding, and the only
    target. Two answers are two segments, and have `pair_ids`, `roles` and, if it is known,
    `reference_log_probs` (`lora_jax.objectives.pairs`). Texts that are compared with the base have
    `replay_weights` in place of `loss_weights`.

    With `share_prompts` there is one more array, `seen_until` (`lora_jax.nn.texts`), and a start
    that texts share belongs to the segment of the first of them.

    Raises:
        ValueError: the examples have more than `max_length` tokens in total.
    """
    texts = _texts_of(examples)
    branches = place([one.text for one in texts], share_prompts)
    total = sum(len(one.own) for one in branches)
    if total > max_length:
        raise ValueError(f"{len(examples)} examples of {total} tokens do not fit into {max_length}")
    row = {
        "tokens": np.zeros(max_length, np.int32),
        "loss_weights": np.zeros(max_length, np.float32),
        "segment_ids": np.zeros(max_length, np.int32),
        "positions": np.zeros(max_length, np.int32),
    }
    for segment, branch in enumerate(branches, start=1):
        one = texts[branch.text]
        _put_text(row, one.text, branch, segment)
        if one.role:
            _put_answer(row, one, branch)
    if share_prompts:
        row["seen_until"] = until = np.full(max_length, max_length, np.int32)
        for branch in branches:
            until[branch.slots] = branch.slots[-1:] + 1
    return row


def slots(examples: Sequence[Example], share_prompts: bool = False) -> list[np.ndarray]:
    """Return the slots in `to_row` of the tokens of each example."""
    texts = _texts_of(examples)
    branches = place([one.text for one in texts], share_prompts)
    found: list[list[np.ndarray]] = [[] for _ in examples]
    for branch in sorted(branches, key=lambda one: one.text):
        found[texts[branch.text].number - 1].append(branch.slots)
    return [np.concatenate(parts) for parts in found]


@dataclass(frozen=True)
class _Text:
    """A text of a row: its example, counted from 1, and its role and reference in that."""

    text: Example
    number: int
    role: int = 0
    reference: np.ndarray | None = None


def _texts_of(examples: Sequence[Example]) -> list[_Text]:
    found = []
    for number, example in enumerate(examples, start=1):
        if example.second_start is None:
            found.append(_Text(example, number))
            continue
        known = example.reference
        parts = [slice(example.second_start), slice(example.second_start, None)]
        for text, role, part in zip(example.texts, example.roles, parts, strict=True):
            found.append(_Text(text, number, role, None if known is None else known[part]))
    return found


def _put_text(row: dict[str, np.ndarray], text: Example, branch: Branch, segment: int) -> None:
    """Write the tokens of a text that no earlier one has written."""
    own = branch.own
    row["tokens"][own] = text.tokens[branch.shared :]
    weights = "loss_weights"
    if text.replay:
        weights = "replay_weights"
        row.setdefault(weights, np.zeros_like(row["loss_weights"]))
    row[weights][own] = text.loss_weights[branch.shared :]
    row[weights][own[:1]] = 0
    row["segment_ids"][own] = segment
    row["positions"][own] = np.arange(branch.shared, len(text.tokens))
    if text.pair_start is not None:  # the last token is a label, not text
        row["segment_ids"][own[-1]] = row["positions"][own[-1]] = 0
        types = row.setdefault("token_types", np.zeros_like(row["tokens"]))
        types[own[text.pair_start : -1]] = 1


def _put_answer(row: dict[str, np.ndarray], one: _Text, branch: Branch) -> None:
    """Write the number of a pair, the role of the text in it, and the reference of its tokens."""
    for name, value in (("pair_ids", one.number), ("roles", one.role)):
        row.setdefault(name, np.zeros_like(row["tokens"]))[branch.own] = value
    if one.reference is not None:
        known = row.setdefault("reference_log_probs", np.zeros_like(row["loss_weights"]))
        known[branch.own] = one.reference[branch.shared :]
