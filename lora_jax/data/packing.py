"""Several examples in one row, kept apart by segment ids and positions.

    tokens        a b c d e f 0 0
    loss_weights  0 0 1 0 1 1 0 0     belongs to the token at the same index, as a target
    segment_ids   1 1 1 2 2 2 0 0     0 is padding
    positions     0 1 2 0 1 2 0 0

The loss predicts tokens[i + 1] from position i with weight loss_weights[i + 1]. The first token of
every segment has weight 0, so no prediction ever crosses from one example into the next.
"""

import dataclasses
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from lora_jax.data.templates import Example


def pack(lengths: Sequence[int], max_length: int, window: int = 256) -> list[list[int]]:
    """Indices of examples, row by row: every example in exactly one row, none split.

    Best fit decreasing among neighbours: the examples are taken in the order given, as many at a
    time as fill `window` rows; the longest of those goes first, each into the fullest row that has
    room for it. So the order given is kept but for a window, and the time is O(n log n). Rows and
    what is in them stand in the order of their indices.

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
    by_room: dict[int, list[int]] = {}  # room -> the rows that have it
    rooms: list[int] = []  # those of `by_room` that have a row, sorted
    for index in sorted(indices, key=lambda i: -lengths[i]):
        place = bisect_left(rooms, lengths[index])
        if place == len(rooms):
            room, row = max_length, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        rows[row].append(index)
        room -= lengths[index]
        if room:
            same = by_room.setdefault(room, [])
            if not same:
                insort(rooms, room)
            same.append(row)
    return sorted(sorted(row) for row in rows)


def with_places(examples: Sequence[Example], count: int) -> list[Example]:
    """The examples with `count` tokens in front that stand for virtual ones: what they are does not
    matter, and none is predicted.
    """
    if not count:
        return list(examples)
    return [
        dataclasses.replace(
            example,
            tokens=np.pad(example.tokens, (count, 0)),
            loss_weights=np.pad(example.loss_weights, (count, 0)),
        )
        for example in examples
    ]


def to_row(examples: Sequence[Example], max_length: int) -> dict[str, np.ndarray]:
    """One row of `tokens`, `loss_weights`, `segment_ids` and `positions`, each (max_length,).

    Integers are int32 and weights float32; what the examples leave is padding of zeros. Labelled
    texts have `token_types` besides, 1 in the second text of a pair; the place of the label is
    padding that is predicted.

    Raises:
        ValueError: the examples have more than `max_length` tokens together.
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
    start = 0
    for segment, example in enumerate(examples, start=1):
        end = start + len(example.tokens)
        row["tokens"][start:end] = example.tokens
        row["loss_weights"][start:end] = example.loss_weights
        row["loss_weights"][start : start + 1] = 0
        row["segment_ids"][start:end] = segment
        row["positions"][start:end] = np.arange(end - start)
        if example.pair_start is not None:  # its label is no part of the text
            row["segment_ids"][end - 1] = row["positions"][end - 1] = 0
            types = row.setdefault("token_types", np.zeros(max_length, np.int32))
            types[start + example.pair_start : end - 1] = 1
        start = end
    return row
