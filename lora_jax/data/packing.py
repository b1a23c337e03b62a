"""Several examples in one row, kept apart by segment ids and positions.

    tokens        a b c d e f 0 0
    loss_weights  0 0 1 0 1 1 0 0     belongs to the token at the same index, as a target
    segment_ids   1 1 1 2 2 2 0 0     0 is padding
    positions     0 1 2 0 1 2 0 0

The loss predicts tokens[i + 1] from position i with weight loss_weights[i + 1]. The first token of
every segment has weight 0, so no prediction ever crosses from one example into the next.
"""

from collections.abc import Sequence

import numpy as np

from lora_jax.data.templates import Example


def pack(lengths: Sequence[int], max_length: int, window: int = 64) -> list[list[int]]:
    """Indices of examples, row by row: every example in exactly one row, none split.

    Best fit in the order given: each example goes to the fullest of at most `window` open rows that
    has room for it, else to a new one, which closes the fullest when too many are open.

    Raises:
        ValueError: a length that is not in 1..max_length.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row)
    for index, length in enumerate(lengths):
        if not 1 <= length <= max_length:
            raise ValueError(f"example {index} has {length} tokens: not between 1 and {max_length}")
        fits = min((entry for entry in open_rows if entry[0] >= length), default=None)
        if fits is None:
            fits = (max_length, len(rows))
            rows.append([])
        else:
            open_rows.remove(fits)
        room, row = fits
        rows[row].append(index)
        if room > length:
            open_rows.append((room - length, row))
        if len(open_rows) > window:
            open_rows.remove(min(open_rows))
    return rows


def to_row(examples: Sequence[Example], max_length: int) -> dict[str, np.ndarray]:
    """One row of `tokens`, `loss_weights`, `segment_ids` and `positions`, each (max_length,).

    Integers are int32 and weights float32; what the examples leave is padding of zeros.

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
        start = end
    return row
