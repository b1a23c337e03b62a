"""Batches of rows in an order that is a pure function of seed, epoch and step.

    loader = Loader(examples, batch_size=8, max_length=512, packing=True, shuffle=True, seed=0)
    batch = loader.batch(step)  # any step, in any order: nothing to save but the step, to resume

Examples are packed into rows once; every epoch goes through all rows in an order of its own.
Epochs follow one another without end: a batch may begin in one and end in the next, so that every
example is seen once an epoch, whatever the batch size.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lora_jax.data.packing import pack, to_row
from lora_jax.data.templates import Example

_MULTIPLE = 64  # unpacked rows are padded to a multiple of it


def order(count: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """(count,) integers: the order of `count` things in an epoch, the same on every machine."""
    if not shuffle:
        return np.arange(count)
    # RandomState's stream is fixed for good, Generator's may change with numpy's version.
    state = np.random.SeedSequence([seed, epoch]).generate_state(8)
    return np.random.RandomState(state).permutation(count)


class Loader:
    """Training batches by step.

    rows_per_epoch: rows in which every example stands exactly once
    row_length: tokens per row: `max_length` when packing, else the longest example rounded up
    efficiency: the share of the tokens of an epoch that is not padding

    Raises:
        ValueError: no examples, or one that is longer than `max_length`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        max_length: int,
        packing: bool = True,
        shuffle: bool = True,
        seed: int = 0,
    ):
        if not examples:
            raise ValueError("no examples to load")
        self.examples = examples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        lengths = [len(example.tokens) for example in examples]
        longest = max(lengths)
        if longest > max_length:
            raise ValueError(f"an example has {longest} tokens, more than max_length={max_length}")
        if packing:
            # Shuffled before packing, so that neighbours in the file do not always train together.
            # Epochs count from 1 in `_epoch`: this order is not that of any of them.
            first = order(len(examples), seed, 0, shuffle)
            rows = pack([lengths[i] for i in first], max_length)
            self._rows = [[int(first[i]) for i in row] for row in rows]
            self.row_length = max_length
        else:
            self._rows = [[i] for i in range(len(examples))]
            self.row_length = min(max_length, -(-longest // _MULTIPLE) * _MULTIPLE)
        self.rows_per_epoch = len(self._rows)
        self.efficiency = sum(lengths) / (self.rows_per_epoch * self.row_length)
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Batch number `step` from 0: arrays of (batch_size, row_length), as `packing.to_row`."""
        return _stack([self._examples(row) for row in self.indices(step)], self.row_length)

    def indices(self, step: int) -> list[list[int]]:
        """The indices of the examples in each row of batch `step`."""
        first = step * self.batch_size
        places = (divmod(n, self.rows_per_epoch) for n in range(first, first + self.batch_size))
        return [self._rows[self._epoch(epoch)[place]] for epoch, place in places]

    def _examples(self, row: list[int]) -> list[Example]:
        return [self.examples[i] for i in row]

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) >= 2:  # a batch that straddles two epochs must not thrash
                self._orders.pop(min(self._orders))
            self._orders[epoch] = order(self.rows_per_epoch, self.seed, epoch + 1, self.shuffle)
        return self._orders[epoch]


def eval_batches(
    examples: Sequence[Example], batch_size: int, max_length: int
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, packed in order: arrays of (batch_size, max_length), as `packing.to_row`.

    The last batch is filled up with rows of padding, so that every batch has the same shape.
    """
    rows = pack([len(example.tokens) for example in examples], max_length)
    for first in range(0, len(rows), batch_size):
        chosen = [[examples[i] for i in row] for row in rows[first : first + batch_size]]
        yield _stack(chosen + [[]] * (batch_size - len(chosen)), max_length)


def _stack(rows: Sequence[Sequence[Example]], length: int) -> dict[str, np.ndarray]:
    built = [to_row(row, length) for row in rows]
    return {name: np.stack([row[name] for row in built]) for name in built[0]}
