"""A stream gives every example once an epoch, and goes on exactly where it was cut."""

import json
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data import Example, StreamLoader
from lora_jax.errors import UserError

LENGTH = 24


class Record:
    """A record that can be watched."""

    def __init__(self, number: int):
        self.number = number


def reader(count: int):
    return lambda start: map(Record, range(start, count))


def encoder(every: int = 1, first: int = 0):
    """Examples of 2 to 12 tokens that all are the record's number, from 1; only those of every
    `every`-th record.
    """

    def encode(records):
        return [
            Example(np.full(n, r.number + 1, np.int32), np.ones(n, np.float32), f"f:{r.number}")
            for r in records
            if r.number % every == first
            for n in [2 + r.number * 7 % 11]
        ]

    return encode


def make(count, batch_size=3, block_rows=7, every=1, first=0, state=None, **options):
    return StreamLoader(
        reader(count),
        encoder(every, first),
        batch_size,
        LENGTH,
        block_rows=block_rows,
        state=state,
        **options,
    )


def numbers(batch) -> list[int]:
    """The records in a batch, in order."""
    starts = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    return (batch["tokens"][starts] - 1).tolist()


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        one[name].tobytes() == other[name].tobytes() and one[name].dtype == other[name].dtype
        for name in one
    )


settings_of_a_stream = given(
    count=st.integers(1, 30),
    batch_size=st.integers(1, 7),
    block_rows=st.integers(1, 12),
    every=st.integers(1, 4),
    packing=st.booleans(),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**40),
)


@settings(max_examples=80, deadline=None)
@settings_of_a_stream
def test_every_epoch_has_every_example_once(count, **options):
    loader, every = make(count, **options), options["every"]
    examples = set(range(0, count, every))
    found = [n for step in range(3 * count) for n in numbers(loader.batch(step))]
    for start in range(0, len(found) - len(examples), len(examples)):
        assert set(found[start : start + len(examples)]) == examples
    assert len(found) >= 3 * len(examples)


@settings(max_examples=80, deadline=None)
@settings_of_a_stream
def test_cut_anywhere_it_goes_on_to_the_bit(count, **options):
    whole = make(count, **options)
    batches, states = [], [whole.state]
    for step in range(14):
        batches.append(whole.batch(step))
        states.append(whole.state)
    for cut in range(14):
        state = json.loads(json.dumps(states[cut]))
        assert state["step"] == cut
        later = make(count, state=state, **options)
        assert later.state == state
        for step in range(cut, min(cut + 4, 14)):
            assert same(later.batch(step), batches[step])
            assert later.state == states[step + 1]


def test_without_shuffling_or_packing_it_is_the_source():
    loader = make(10, batch_size=4, block_rows=3, packing=False, shuffle=False)
    assert [numbers(loader.batch(step)) for step in range(4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 0, 1],
        [2, 3, 4, 5],
    ]
    assert loader.state == {"step": 4, "block": 5, "offset": 3, "epoch": 1, "row": 3}
    assert loader.batch(4)["tokens"].shape == (4, LENGTH)


def test_the_order_is_the_same_on_every_machine():
    loader = make(10, batch_size=5, block_rows=5, packing=False, seed=3)
    assert [numbers(loader.batch(step)) for step in range(4)] == [
        [0, 4, 1, 2, 3],
        [6, 9, 8, 7, 5],
        [2, 1, 0, 3, 4],
        [5, 9, 6, 7, 8],
    ]


def test_blocks_epochs_and_seeds_differ():
    def orders(seed):
        loader = make(40, batch_size=10, block_rows=10, packing=False, seed=seed)
        return [[n % 10 for n in numbers(loader.batch(step))] for step in range(8)]

    assert len({tuple(order) for seed in (0, 1) for order in orders(seed)}) == 16


def test_packing_fills_rows_from_one_block():
    packed = make(200, batch_size=10, block_rows=100)
    batch = packed.batch(0)
    assert (batch["segment_ids"] > 0).mean() > 0.9
    assert max(numbers(batch)) < 100
    unpacked = make(200, batch_size=10, block_rows=100, packing=False)
    assert (unpacked.batch(0)["segment_ids"] <= 1).all()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_batch_does_not_depend_on_the_number_of_processes(processes):
    whole = make(50, batch_size=8)
    hosts = [make(50, batch_size=8) for _ in range(processes)]
    size = 8 // processes
    for step in range(20):
        expected = whole.batch(step)
        parts = [h.batch(step, slice(k * size, (k + 1) * size)) for k, h in enumerate(hosts)]
        together = {name: np.concatenate([part[name] for part in parts]) for name in expected}
        assert same(together, expected)


def test_rows_of_the_last_batch_may_be_asked_for_again():
    loader, whole = make(50, batch_size=8), make(50, batch_size=8)
    for step in range(5):
        expected = whole.batch(step)
        for rows in (slice(0, 2), range(6, 8), slice(2, 6), slice(None)):
            part = loader.batch(step, rows)
            picked = range(8)[rows] if isinstance(rows, slice) else rows
            assert same(part, {name: values[list(picked)] for name, values in expected.items()})
        assert loader.state == whole.state
    assert loader.position(4)["step"] == 4
    again = make(50, batch_size=8, state=loader.position(4))
    assert same(again.batch(4), expected)
    assert loader.position(5) == loader.state


def test_only_one_step_after_the_other():
    loader = make(50)
    with pytest.raises(
        ValueError, match="batch 1 of a stream was requested, but the next one is 0"
    ):
        loader.batch(1)
    loader.batch(0)
    loader.batch(1)
    for step in (0, 3, -1):
        with pytest.raises(ValueError, match=f"batch {step} of a stream .* the next one is 2"):
            loader.batch(step)
        with pytest.raises(ValueError, match=f"batch {step} of a stream"):
            loader.position(step)
    state = loader.state
    with pytest.raises(ValueError, match="does not pick rows of a batch of 3"):
        loader.batch(2, slice(2, 5))
    assert loader.state == state  # a refused batch is not used up
    later = make(50, state=state)
    with pytest.raises(ValueError, match="batch 0 of a stream .* the next one is 2"):
        later.batch(0)


def test_never_more_than_two_blocks_in_memory():
    records, examples = weakref.WeakSet(), weakref.WeakSet()
    read, most = 0, [0, 0]

    def watched(start):
        nonlocal read
        for number in range(start, 2000):
            record = Record(number)
            records.add(record)
            read += 1
            most[0] = max(most[0], len(records))
            yield record

    def encode(chosen):
        for example in (made := encoder()(chosen)):
            examples.add(example)
        most[1] = max(most[1], len(examples))
        return made

    loader = StreamLoader(watched, encode, 4, LENGTH, block_rows=50)
    assert read == 0
    seen = 0
    for step in range(250):
        seen += len(numbers(loader.batch(step)))
        assert read <= seen + 50
    assert read > 1000
    assert most[0] <= 51
    assert 50 < most[1] <= 100 + 4 * 12  # the rows of the last batch may be of a third block


def test_a_failed_read_uses_nothing_up():
    whole = make(30)
    expected = [whole.batch(step) for step in range(12)]
    failures = [9, 9, 20, 25]

    def read(start):
        for number in range(start, 30):
            if failures and number == failures[0]:
                failures.pop(0)
                raise OSError("connection lost")
            yield Record(number)

    loader = StreamLoader(read, encoder(), 3, LENGTH, block_rows=7)
    for step, batch in enumerate(expected):
        while True:
            state = loader.state
            try:
                found = loader.batch(step)
            except OSError:
                assert loader.state == state
            else:
                break
        assert same(found, batch)
    assert not failures


@pytest.mark.parametrize("block_rows", [3, 4, 6, 100])
def test_a_source_without_examples_ends_with_an_error(block_rows):
    with pytest.raises(UserError, match="the source holds no records"):
        make(0, block_rows=block_rows).batch(0)
    with pytest.raises(UserError, match="none of the 12 records of the source makes an example"):
        make(12, block_rows=block_rows, every=100, first=50).batch(0)


def test_an_epoch_that_has_no_example_any_more_ends_with_an_error():
    reads = []

    def read(start):
        reads.append(start)
        assert len(reads) < 5, "reads without end"
        return iter([Record(0 if len(reads) < 3 else 1)])

    loader = StreamLoader(read, encoder(every=2), 1, LENGTH)
    assert [numbers(loader.batch(step)) for step in range(2)] == [[0], [0]]
    with pytest.raises(UserError, match="none of the 1 records of the source makes an example"):
        loader.batch(2)


def test_one_example_at_the_end_is_enough():
    loader = make(12, batch_size=5, block_rows=3, every=100, first=11)
    assert numbers(loader.batch(0)) == [11] * 5
    later = make(12, batch_size=5, block_rows=3, every=100, first=11, state=loader.state)
    assert numbers(later.batch(1)) == [11] * 5


def test_a_source_that_loses_its_records_is_reported():
    loader = make(20, batch_size=9, packing=False)
    loader.batch(0)
    assert (loader.state["offset"], loader.state["row"]) == (7, 2)
    for count, problem in (
        (5, "0 records of the source from number 7"),
        (8, "1 records .* make 1 "),
    ):
        later = make(count, batch_size=9, packing=False, state=loader.state)
        with pytest.raises(UserError, match=problem):
            later.batch(1)


@pytest.mark.parametrize(
    "change",
    [
        {"row": -1},
        {"row": 1.0},
        {"row": "1"},
        {"row": True},
        {"epoch": None},
        {"more": 1},
        None,
    ],
)
def test_a_damaged_state_is_refused(change):
    state = {} if change is None else make(5).state | change
    with pytest.raises(UserError, match="the state of the data is damaged: .* must have whole num"):
        make(5, state=state)


def test_a_state_of_other_blocks_is_refused():
    loader = make(50)
    for step in range(5):
        loader.batch(step)
    assert loader.state["offset"] > 0
    with pytest.raises(UserError, match="no block of data.stream_rows=8 begins"):
        make(50, block_rows=8, state=loader.state)


def test_what_cannot_be_streamed():
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        make(5, batch_size=0)
    with pytest.raises(ValueError, match="block_rows=0 must be at least 1"):
        make(5, block_rows=0)
    long = Example(np.ones(60, np.int32), np.ones(60, np.float32), "f:1")
    loader = StreamLoader(reader(5), lambda records: [long], 2, LENGTH)
    with pytest.raises(ValueError, match="an example has 60 tokens, more than max_length=24"):
        loader.batch(0)
