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

import numpy as np

from lora_jax.data.examples import Example, join


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


def to_row(examples: Sequence[Example], max_length: int) -> dict[str, np.ndarray]:
    """Return one row of `tokens`, `loss_weights`, `segment_ids` and `positions`: (max_length,).

    Integers are int32 and weights float32; the rest is padding with zeros. Labelled texts also have
    `token_types`, 1 in the second text of a pair. The position of a label is padding, and the only
    target. Two answers are two segments, and have `pair_ids`, `roles` and, if it is known,
    `reference_log_probs` (`lora_jax.objectives.pairs`).

    Raises:
        ValueError: the examples have more than `max_length` tokens in total.
    """
    total = sum(len(example.tokens) for example in examples)
    if total > max_length:
        raise ValueError(f"{len(examples)} examples of {total} tokens do not fit into {max_length}")
    row = {
        "tokens": np.zeros(max_length, np.int32),
        "loss_weights": np.zeros(max_length, np.float32),
        "segment_ids": np.zeros(max_length, np.int32),
        "positions": np.zeros(max_length, np.int32),
    }
    start = segment = 0
    for number, example in enumerate(examples, start=1):
        for text in example.texts:
            segment += 1
            _put_text(row, text, start, segment)
            start += len(text.tokens)
        if example.second_start is not None:
            _put_pair(row, example, start, number)
    return row


def _put_text(row: dict[str, np.ndarray], example: Example, start: int, segment: int) -> None:
    """Write a text into a row, from `start` on."""
    end = start + len(example.tokens)
    row["tokens"][start:end] = example.tokens
    row["loss_weights"][start:end] = example.loss_weights
    row["loss_weights"][start : start + 1] = 0
    row["segment_ids"][start:end] = segment
    row["positions"][start:end] = np.arange(end - start)
    if example.pair_start is not None:  # the last token is a label, not text
        row["segment_ids"][end - 1] = row["positions"][end - 1] = 0
        types = row.setdefault("token_types", np.zeros_like(row["tokens"]))
        types[start + example.pair_start : end - 1] = 1


def _put_pair(row: dict[str, np.ndarray], example: Example, end: int, number: int) -> None:
    """Write the number, the roles and the reference of two answers that end at `end`."""
    assert example.second_start is not None
    start = end - len(example.tokens)
    middle = start + example.second_start
    for name in ("pair_ids", "roles"):
        row.setdefault(name, np.zeros_like(row["tokens"]))
    row["pair_ids"][start:end] = number
    row["roles"][start:middle], row["roles"][middle:end] = example.roles
    if example.reference is not None:
        known = row.setdefault("reference_log_probs", np.zeros_like(row["loss_weights"]))
        known[start:end] = example.reference
