"""Batches of rows in an order that is a pure function of seed, epoch and step.

    loader = Loader(examples, batch_size=8, max_length=512, packing=True, shuffle=True, seed=0)
    batch = loader.batch(step)  # any step, in any order: nothing to save but the step, to resume

Examples are packed into rows once; every epoch goes through all rows in an order of its own.
Epochs follow one another without end: a batch may begin in one and end in the next, so that every
example is seen once an epoch, whatever the batch size.

    mixture = Mixture({"a": loader_a, "b": loader_b}, {"a": 3, "b": 1})
    batch = mixture.batch(step)  # three rows of a to one of b, each through epochs of its own

`batch(step, rows)` builds some rows of a batch alone, for a host that needs no others. What is in
a batch never depends on who asks for which of its rows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.data.packing import pack, to_row
from lora_jax.data.templates import Example
from lora_jax.errors import UserError, raise_all

_MULTIPLE = 64  # unpacked rows are padded to a multiple of it
_CYCLE = 1000  # rows of a mixture after which its sources alternate as before


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
        ValueError: no examples, one without tokens or with more than `max_length`; a batch size
            below 1.
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
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.examples = examples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        lengths = [len(example.tokens) for example in examples]
        longest = max(lengths)
        if longest > max_length:
            raise ValueError(f"an example has {longest} tokens, more than max_length={max_length}")
        if min(lengths) < 1:
            raise ValueError(f"{examples[lengths.index(0)].where}: an example without tokens")
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

    def batch(self, step: int, rows: slice | range = slice(None)) -> dict[str, np.ndarray]:
        """Batch number `step` from 0: arrays of (rows, row_length), as `packing.to_row`; all
        `batch_size` rows, or those that `rows` picks.

        Raises:
            ValueError: a step below 0; `rows` that are none, or not all inside the batch.
        """
        numbers = batch_rows(step, self.batch_size, rows)
        return stack([self.row(number) for number in numbers], self.row_length)

    def indices(self, step: int) -> list[list[int]]:
        """The indices of the examples in each row of batch `step`."""
        return [self._row(n) for n in batch_rows(step, self.batch_size, slice(None))]

    def row(self, number: int) -> list[Example]:
        """The examples of row `number` from 0, of the rows of all epochs one after the other."""
        return [self.examples[i] for i in self._row(number)]

    def position(self, step: int) -> dict[str, Any]:
        """Where batch `step` begins: its epoch, and the row in it, both from 0."""
        epoch, row = divmod(step * self.batch_size, self.rows_per_epoch)
        return {"step": step, "epoch": epoch, "row": row}

    def _row(self, number: int) -> list[int]:
        epoch, place = divmod(number, self.rows_per_epoch)
        if epoch not in self._orders:
            if len(self._orders) >= 2:  # a batch that straddles two epochs must not thrash
                self._orders.pop(min(self._orders))
            self._orders[epoch] = order(self.rows_per_epoch, self.seed, epoch + 1, self.shuffle)
        return self._rows[self._orders[epoch][place]]


class Mixture:
    """Training batches from several sources, by step, with the methods of `Loader`.

    A weight is a source's share of the rows, so roughly of the tokens: rows are of one length, and
    padding is small when packing. Every source is packed on its own and goes through epochs of its
    own: in one of them each of its examples stands once. In any number of rows from the start each
    source has its share to within one row.

    loaders: one for each source by name; their batch size is that of the mixture
    weights: by the same names, above 0; they need not add up to 1
    shares: by name, the share of rows that each source gets: its weight in thousandths
    row_length: tokens per row, the largest of the sources
    efficiency: the share of the tokens of all rows that is not padding

    Raises:
        UserError: no sources; weights that are not finite, negative, below a thousandth of their
            sum, or not those of the sources.
        ValueError: loaders of different batch sizes.
    """

    def __init__(self, loaders: Mapping[str, Loader], weights: Mapping[str, float]):
        counts = _thousandths(loaders, weights)
        sizes = {loader.batch_size for loader in loaders.values()}
        if len(sizes) > 1:
            raise ValueError(f"the sources have different batch sizes: {sorted(sizes)}")
        self.loaders = dict(loaders)
        self.batch_size = sizes.pop()
        self.row_length = max(loader.row_length for loader in loaders.values())
        self.shares = {name: counts[name] / _CYCLE for name in loaders}
        self.efficiency = sum(
            share * loaders[name].efficiency * loaders[name].row_length / self.row_length
            for name, share in self.shares.items()
        )
        self._names = sorted(loaders)  # a mapping written in another order is the same mixture
        self._counts = np.array([counts[name] for name in self._names])
        self._cycle = _spread(self._counts)
        # used[r, s]: rows of source s among the first r of a cycle
        drawn = self._cycle[:, None] == np.arange(len(self._names))
        self._used = np.concatenate([np.zeros_like(drawn[:1], int), drawn.cumsum(axis=0)])

    def batch(self, step: int, rows: slice | range = slice(None)) -> dict[str, np.ndarray]:
        """As `Loader.batch`."""
        numbers = batch_rows(step, self.batch_size, rows)
        return stack([self.row(number) for number in numbers], self.row_length)

    def row(self, number: int) -> list[Example]:
        """The examples of row `number` from 0 of the mixture."""
        name, row = self.place(number)
        return self.loaders[name].row(row)

    def place(self, number: int) -> tuple[str, int]:
        """The source of row `number` of the mixture, and the number of that row in its source."""
        source = self._cycle[number % _CYCLE]
        return self._names[source], int(self._rows_before(number)[source])

    def position(self, step: int) -> dict[str, Any]:
        """Where batch `step` begins: for every source its epoch, and the row in it, from 0."""
        before = self._rows_before(step * self.batch_size)
        sources = {}
        for name, row in zip(self._names, before, strict=True):
            epoch, row = divmod(int(row), self.loaders[name].rows_per_epoch)
            sources[name] = {"epoch": epoch, "row": row}
        return {"step": step, "sources": sources}

    def _rows_before(self, number: int) -> np.ndarray:
        cycle, place = divmod(number, _CYCLE)
        return cycle * self._counts + self._used[place]


def _thousandths(loaders: Mapping[str, Loader], weights: Mapping[str, float]) -> dict[str, int]:
    """Rows of a cycle by source, `_CYCLE` together: rounded by the largest remainder."""
    if not loaders:
        raise UserError("a mixture needs at least one source")
    given, known = ", ".join(map(repr, weights)), ", ".join(map(repr, loaders))
    if set(weights) != set(loaders):
        raise UserError(f"weights are given for {given or 'nothing'}, and the sources are {known}")
    raise_all(
        [
            f"the weight {weight!r} of {name!r} must be a finite number above 0"
            for name, weight in weights.items()
            if isinstance(weight, bool | str) or not 0 < weight < math.inf
        ]
    )
    total = math.fsum(weights.values())
    exact = {name: _CYCLE * (weights[name] / total) for name in sorted(weights)}
    counts = {name: int(rows) for name, rows in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: _CYCLE - sum(counts.values())]:
        counts[name] += 1
    raise_all(
        [
            f"the weight {weights[name]!r} of {name!r} is less than a row in {_CYCLE} of all "
            f"{total:g}: raise it or leave the source out"
            for name, count in counts.items()
            if not count
        ]
    )
    return counts


def _spread(counts: np.ndarray) -> np.ndarray:
    """(sum of counts,) the source of each row of a cycle, `counts[s]` times source s, evenly.

    Row j of a source is due in slots floor(j * cycle / count) to ceil((j + 1) * cycle / count): the
    earliest end first keeps all of them, so every source is always within one row of its share.
    """
    total = int(counts.sum())
    done = [0] * len(counts)
    cycle = []
    for slot in range(total):
        _, source = min(
            (-(-(done[s] + 1) * total // count), s)
            for s, count in enumerate(counts.tolist())
            if done[s] * total // count <= slot
        )
        done[source] += 1
        cycle.append(source)
    return np.array(cycle)


def eval_batches(
    examples: Sequence[Example], batch_size: int, max_length: int
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, packed in order: arrays of (batch_size, max_length), as `packing.to_row`.

    The last batch is filled up with rows of padding, so that every batch has the same shape.
    """
    rows = pack([len(example.tokens) for example in examples], max_length)
    for first in range(0, len(rows), batch_size):
        chosen = [[examples[i] for i in row] for row in rows[first : first + batch_size]]
        yield stack(chosen + [[]] * (batch_size - len(chosen)), max_length)


def batch_rows(step: int, batch_size: int, rows: slice | range) -> range:
    """The numbers, counted over all batches, of the rows of batch `step` that `rows` picks.

    Raises:
        ValueError: a step below 0; `rows` that are none, or not all inside the batch.
    """
    if step < 0:
        raise ValueError(f"step={step} must be at least 0")
    chosen = range(*rows.indices(batch_size)) if isinstance(rows, slice) else rows
    ends = (rows.start, rows.stop) if isinstance(rows, slice) else ()
    # A slice is cut to what there is without a word; rows that are missing are a mistake.
    if any(end is not None and not 0 <= end <= batch_size for end in ends):
        chosen = range(0)
    if not chosen or not (0 <= min(chosen) and max(chosen) < batch_size):
        raise ValueError(f"{rows} does not pick rows of a batch of {batch_size}")
    first = step * batch_size
    return range(first + chosen.start, first + chosen.stop, chosen.step)


def stack(rows: Sequence[Sequence[Example]], length: int) -> dict[str, np.ndarray]:
    """Arrays of (rows, length), as `packing.to_row` makes each row."""
    built = [to_row(row, length) for row in rows]
    names = dict.fromkeys(name for row in built for name in row)
    empty = np.zeros(length, np.int32)  # of a row without labelled texts
    return {name: np.stack([row.get(name, empty) for row in built]) for name in names}
