"""Training batches whose order is a pure function of seed, epoch and step.

    loader = Loader(examples, batch_size=8, max_length=512, packing=True, shuffle=True, seed=0)
    batch = loader.batch(step)  # any step, in any order: to resume, only the step is needed

Examples are packed into rows once, and every epoch visits all rows in a new order. A batch may
begin in one epoch and end in the next, so every example is seen once per epoch for any batch size.

    mixture = Mixture({"a": loader_a, "b": loader_b}, {"a": 3, "b": 1})
    batch = mixture.batch(step)  # three rows of a to one of b; each source has its own epochs

`batch(step, rows)` builds only some rows of a batch, for a host that needs no others. The contents
of a batch do not depend on which rows are requested.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.data.examples import Example
from lora_jax.data.packing import pack_examples, to_row, tokens_of
from lora_jax.data.shared_starts import size
from lora_jax.errors import UserError, raise_all

_MULTIPLE = 64  # the length of unpacked rows is rounded up to a multiple
_CYCLE = 1000  # rows after which the order of the sources of a mixture repeats


def order(count: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Return (count,) integers: a permutation for an epoch, the same on every machine."""
    if not shuffle:
        return np.arange(count)
    # RandomState is frozen across versions of numpy; Generator may change.
    state = np.random.SeedSequence([seed, epoch]).generate_state(8)
    return np.random.RandomState(state).permutation(count)


class Loader:
    """Training batches by step.

    rows_per_epoch: number of rows that hold every example exactly once
    row_length: tokens per row: `max_length` when packing, else the longest example rounded up
    tokens: of the rows of an epoch; a start that texts of a row share counts once
    efficiency: fraction of the tokens of an epoch that is not padding

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
        share_prompts: bool = False,
    ):
        if not examples:
            raise ValueError("no examples to load")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.examples = examples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.share_prompts = share_prompts
        lengths = [len(example.tokens) for example in examples]
        longest = max(lengths)
        if longest > max_length:
            raise ValueError(f"an example has {longest} tokens, more than max_length={max_length}")
        if min(lengths) < 1:
            raise ValueError(f"{examples[lengths.index(0)].where}: an example without tokens")
        if packing:
            # Shuffled before packing, so that neighbours in the file do not always share a row.
            # Epochs are shuffled with 1, 2, ..: 0 gives an order that no epoch has.
            first = order(len(examples), seed, 0, shuffle)
            self._rows = pack_examples(examples, first.tolist(), max_length, share_prompts)
            self.row_length = max_length
        else:
            self._rows = [[i] for i in range(len(examples))]
            longest = max(size(example, share_prompts) for example in examples)
            self.row_length = min(max_length, -(-longest // _MULTIPLE) * _MULTIPLE)
        self.rows_per_epoch = len(self._rows)
        self.tokens = tokens_of(examples, self._rows, share_prompts)
        self.efficiency = self.tokens / (self.rows_per_epoch * self.row_length)
        self._orders: dict[int, np.ndarray] = {}

    @property
    def packed(self) -> list[list[int]]:
        """Indices of the examples of every row of an epoch, before it is shuffled."""
        return self._rows

    def with_examples(self, examples: Sequence[Example]) -> "Loader":
        """Return this loader with other examples of the same lengths."""
        found = copy.copy(self)
        found.examples = examples
        return found

    def batch(self, step: int, rows: slice | range = slice(None)) -> dict[str, np.ndarray]:
        """Return batch `step`, counted from 0: the arrays of `packing.to_row`, (rows, row_length).

        rows: selects some of the `batch_size` rows

        Raises:
            ValueError: a step below 0; `rows` selects no row, or one outside of the batch.
        """
        numbers = batch_rows(step, self.batch_size, rows)
        return self.stack([self.row(number) for number in numbers], self.row_length)

    def stack(self, rows: Sequence[Sequence[Example]], length: int) -> dict[str, np.ndarray]:
        """Return a batch of rows of `length` tokens."""
        return stack(rows, length, self.share_prompts)

    def indices(self, step: int) -> list[list[int]]:
        """Return the indices of the examples in each row of batch `step`."""
        return [self._row(n) for n in batch_rows(step, self.batch_size, slice(None))]

    def row(self, number: int) -> list[Example]:
        """Return the examples of row `number`, counted from 0 over all epochs."""
        return [self.examples[i] for i in self._row(number)]

    def position(self, step: int) -> dict[str, Any]:
        """Return the epoch at which batch `step` begins and the row in it, both counted from 0."""
        epoch, row = divmod(step * self.batch_size, self.rows_per_epoch)
        return {"step": step, "epoch": epoch, "row": row}

    def _row(self, number: int) -> list[int]:
        epoch, index = divmod(number, self.rows_per_epoch)
        if epoch not in self._orders:
            if len(self._orders) >= 2:  # two: a batch may span two epochs
                self._orders.pop(min(self._orders))
            self._orders[epoch] = order(self.rows_per_epoch, self.seed, epoch + 1, self.shuffle)
        return self._rows[self._orders[epoch][index]]


class Mixture:
    """Training batches from several sources, with the methods of `Loader`.

    A weight is a source's share of the rows, and roughly of the tokens: rows have one length, and
    packing leaves little padding. Every source is packed separately and has its own epochs, each of
    which visits every example once. After any number of rows, each source has had its share to
    within one row.

    loaders: one for each source, by name; the mixture has their batch size
    weights: by the same names, above 0; they need not add up to 1
    shares: by name, the fraction of rows that a source gets: its weight in thousandths
    row_length: tokens per row, the largest of the sources
    efficiency: fraction of the tokens of all rows that is not padding

    Raises:
        UserError: no sources; weights for other names, or weights that are not finite, not above 0
            or less than a thousandth of their sum.
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
        self._arrays = {
            name: np.zeros(self.row_length, array.dtype)
            for loader in loaders.values()
            for name, array in to_row(
                loader.row(0), loader.row_length, loader.share_prompts
            ).items()
        }
        self._names = sorted(loaders)  # the order of the mapping must not matter
        self._counts = np.array([counts[name] for name in self._names])
        self._cycle = _spread(self._counts)
        # _used[r, s]: rows of source s among the first r of a cycle
        drawn = self._cycle[:, None] == np.arange(len(self._names))
        self._used = np.concatenate([np.zeros_like(drawn[:1], int), drawn.cumsum(axis=0)])

    def with_loaders(self, loaders: Mapping[str, Loader]) -> "Mixture":
        """Return this mixture with other loaders of as many rows, by the same names."""
        found = copy.copy(self)
        found.loaders = dict(loaders)
        return found

    def batch(self, step: int, rows: slice | range = slice(None)) -> dict[str, np.ndarray]:
        """Return batch `step`; see `Loader.batch`."""
        numbers = batch_rows(step, self.batch_size, rows)
        shares = any(loader.share_prompts for loader in self.loaders.values())
        found = stack([self.row(number) for number in numbers], self.row_length, shares)
        # A batch without rows of some source has its arrays all the same.
        missing = {n: x for n, x in self._arrays.items() if n not in found}
        size = len(found["tokens"])
        return found | {name: np.stack([zeros] * size) for name, zeros in missing.items()}

    def row(self, number: int) -> list[Example]:
        """Return the examples of row `number` of the mixture, counted from 0."""
        name, row = self.place(number)
        return self.loaders[name].row(row)

    def place(self, number: int) -> tuple[str, int]:
        """Return the source of row `number` of the mixture, and the number of that row in it."""
        source = self._cycle[number % _CYCLE]
        return self._names[source], int(self._rows_before(number)[source])

    def position(self, step: int) -> dict[str, Any]:
        """Return the position of every source at the beginning of batch `step`; see `Loader`."""
        before = self._rows_before(step * self.batch_size)
        sources = {}
        for name, row in zip(self._names, before, strict=True):
            epoch, row = divmod(int(row), self.loaders[name].rows_per_epoch)
            sources[name] = {"epoch": epoch, "row": row}
        return {"step": step, "sources": sources}

    def _rows_before(self, number: int) -> np.ndarray:
        cycle, index = divmod(number, _CYCLE)
        return cycle * self._counts + self._used[index]


def _thousandths(loaders: Mapping[str, Loader], weights: Mapping[str, float]) -> dict[str, int]:
    """Return rows of a cycle by source, `_CYCLE` in all, rounded by the largest remainder."""
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
    """Return (sum of counts,) the source of each row of a cycle: `counts[s]` rows of s, evenly.

    Row j of a source is due in slots floor(j * cycle / count) to ceil((j + 1) * cycle / count).
    Taking the earliest deadline first meets all of them, so every source is always within one row
    of its share.
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
    examples: Sequence[Example], batch_size: int, max_length: int, share_prompts: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """Yield every example once, packed in order: the arrays of `packing.to_row`.

    Every batch is (batch_size, max_length); the last one is filled with rows of padding.
    """
    rows = pack_examples(examples, range(len(examples)), max_length, share_prompts)
    for first in range(0, len(rows), batch_size):
        chosen = [[examples[i] for i in row] for row in rows[first : first + batch_size]]
        yield stack(chosen + [[]] * (batch_size - len(chosen)), max_length, share_prompts)


def batch_rows(step: int, batch_size: int, rows: slice | range) -> range:
    """Return the numbers, counted over all batches, of the rows that `rows` selects of a batch.

    Raises:
        ValueError: a step below 0; `rows` selects no row, or one outside of the batch.
    """
    if step < 0:
        raise ValueError(f"step={step} must be at least 0")
    chosen = range(*rows.indices(batch_size)) if isinstance(rows, slice) else rows
    ends = (rows.start, rows.stop) if isinstance(rows, slice) else ()
    # Python silently clips a slice to the batch; here, missing rows are an error.
    if any(end is not None and not 0 <= end <= batch_size for end in ends):
        chosen = range(0)
    if not chosen or not (0 <= min(chosen) and max(chosen) < batch_size):
        raise ValueError(f"{rows} does not pick rows of a batch of {batch_size}")
    first = step * batch_size
    return range(first + chosen.start, first + chosen.stop, chosen.step)


def stack(
    rows: Sequence[Sequence[Example]], length: int, share_prompts: bool = False
) -> dict[str, np.ndarray]:
    """Stack the rows of `packing.to_row`: arrays of (rows, length)."""
    built = [to_row(row, length, share_prompts) for row in rows]
    # Rows without labelled texts or pairs lack some arrays.
    empty = {name: np.zeros_like(array) for row in built for name, array in row.items()}
    return {
        name: np.stack([row.get(name, zeros) for row in built]) for name, zeros in empty.items()
    }
