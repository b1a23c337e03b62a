"""Training batches from a source that is read as needed, never entirely.

    read(0) -> records -> blocks -> encode -> pack and shuffle -> rows -> batches

    blocks = Blocks(read, encode, rows=4096)
    loader = StreamLoader(blocks, batch_size=8, max_length=512)
    for step in range(100):
        batch = loader.batch(step)
    later = StreamLoader(blocks, batch_size=8, max_length=512, state=loader.state)
    later.batch(100)  # bit for bit the next batch of `loader`

Records are shuffled and packed only inside their block. A source that is sorted by topic needs
large blocks, or shuffling beforehand. Blocks are in the order of the source. At its end, the source
is read from the start again, and every block is shuffled anew. A batch may have the end of one
block and the beginning of the next.

Every process reads and encodes the entire source, and builds only the rows that it requests. So the
contents of a batch do not depend on the number of processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from lora_jax.data.examples import Example
from lora_jax.data.loader import Loader, batch_rows, stack
from lora_jax.errors import UserError


@dataclass(frozen=True)
class Blocks:
    """A source as blocks of examples, each shuffled and packed separately."""

    read: Callable[[int], Iterator[Any]]  # (start): records from that index on, always the same
    encode: Callable[[list[Any]], Sequence[Example]]  # examples, maybe fewer than records
    rows: int = 4096  # records of a block; at most two blocks are in memory
    share_prompts: bool = False  # as `Loader`


class StreamLoader:
    """Training batches in the order of their steps.

    blocks: of examples with at most `max_length` tokens
    state: of another loader with the same arguments, to continue from

    row_length: tokens per row, always `max_length`

    Raises:
        UserError: a state that is damaged, or was made with blocks of another size; on the first
            batch, a state that does not fit the source; a source without records, or an epoch
            without an example.
        ValueError: sizes below 1; from `batch`, see `Loader`.
    """

    def __init__(
        self,
        blocks: Blocks,
        batch_size: int,
        max_length: int,
        packing: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        state: Mapping[str, int] | None = None,
    ):
        for name, size in (("batch_size", batch_size), ("block_rows", blocks.rows)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self.batch_size = batch_size
        self.row_length = max_length
        self._blocks = blocks
        self._options = (batch_size, max_length, packing, shuffle)
        self._seed = seed
        start = dict.fromkeys(_STATE, 0) if state is None else state
        self._state = _checked(start, blocks.rows)
        self._rows = self._all_rows()
        self._last: tuple[dict[str, int], list[list[Example]]] | None = None

    @property
    def state(self) -> dict[str, int]:
        """Position of the next batch: its step; its block, counted over all epochs; the index of
        the first record of the block (offset); the epoch; and the used rows of the block (row).
        """
        return dict(self._state)

    def position(self, step: int) -> dict[str, int]:
        """Return the state before batch `step`, which must be the next or the last one.

        Raises:
            ValueError: any other step.
        """
        if self._last and step == self._last[0]["step"]:
            return dict(self._last[0])
        if step != self._state["step"]:
            raise ValueError(self._out_of_turn(step))
        return self.state

    def batch(self, step: int, rows: slice | range = slice(None)) -> dict[str, np.ndarray]:
        """Return batch `step`, the next one, or other rows of the last one; see `Loader.batch`.

        Raises:
            ValueError: any other step; `rows` selects no row, or one outside of the batch.
        """
        chosen = batch_rows(0, self.batch_size, rows)
        if self.position(step) == self._state:
            before = self.state
            try:
                self._last = before, [next(self._rows) for _ in range(self.batch_size)]
                self._state["step"] += 1
            except BaseException:  # also an interrupt: no row of this batch counts as used
                self._state, self._rows = before, self._all_rows()
                raise
        assert self._last
        texts = [self._last[1][row] for row in chosen]
        return stack(texts, self.row_length, self._blocks.share_prompts)

    def _all_rows(self) -> Iterator[list[Example]]:
        """Yield rows from the state on, without end, and update the state."""
        _, block, offset, epoch, used = (self._state[name] for name in _STATE)
        records = iter(self._blocks.read(offset))
        found = False  # an example in this epoch; the block of a resumed state always has one
        while True:
            count, loader = self._next_block(records, block)
            if not (count or offset):
                raise UserError("the source holds no records")
            rows = loader.rows_per_epoch if loader else 0
            if used > rows:
                raise UserError(
                    f"{count} records of the source from number {offset} make {rows} rows, but "
                    f"{used} of them were used already: the source has changed"
                )
            for row in range(used, rows):
                assert loader
                self._state.update(block=block, offset=offset, epoch=epoch, row=row + 1)
                yield loader.row(row)
            block, offset, used, found = block + 1, offset + count, 0, found or rows > 0
            if count < self._blocks.rows:
                if not found:
                    raise UserError(f"none of the {offset} records of the source makes an example")
                records = iter(self._blocks.read(0))
                epoch, offset, found = epoch + 1, 0, False

    def _next_block(self, records: Iterator[Any], block: int) -> tuple[int, Loader | None]:
        """Return the number of records of the next block, and a loader of its rows, if any."""
        chosen = list(islice(records, self._blocks.rows))
        examples = self._blocks.encode(chosen) if chosen else ()
        if not examples:
            return len(chosen), None
        seed = np.random.SeedSequence([self._seed, block]).generate_state(1, np.uint64)
        shares = self._blocks.share_prompts
        return len(chosen), Loader(examples, *self._options, int(seed[0]), shares)

    def _out_of_turn(self, step: int) -> str:
        return (
            f"batch {step} of a stream was requested, but the next one is {self._state['step']}: "
            "a stream yields batches in order"
        )


_STATE: tuple[str, ...] = ("step", "block", "offset", "epoch", "row")


def _checked(state: Mapping[str, Any], block_rows: int) -> dict[str, int]:
    damaged = set(state) != set(_STATE) or any(
        type(value) is not int or value < 0 for value in state.values()
    )
    if damaged:
        raise UserError(
            f"the state of the data is damaged: {dict(state)!r} must have whole numbers from 0 for "
            + ", ".join(_STATE)
        )
    if state["offset"] % block_rows:
        raise UserError(
            f"the state of the data is at record {state['offset']}, where no block of "
            f"data.stream_rows={block_rows} begins: it was made with another value"
        )
    return dict(state)
