"""The order of training is a function of seed and step, and loses and repeats nothing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data import Example, Loader, eval_batches, order


def some(count: int, low: int = 2, high: int = 20, seed: int = 0) -> list[Example]:
    """Examples of random length whose tokens all are their number, from 1."""
    lengths = np.random.RandomState(seed).randint(low, high + 1, size=count)
    return [
        Example(np.full(n, k, np.int32), np.ones(n, np.float32), f"f:{k}")
        for k, n in enumerate(lengths, start=1)
    ]


def seen(loader: Loader, steps) -> list[int]:
    return [i for step in steps for row in loader.indices(step) for i in row]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    packing=st.booleans(),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_every_epoch_has_every_example_once(count, batch_size, packing, shuffle, seed):
    loader = Loader(some(count), batch_size, 40, packing, shuffle, seed)
    epochs = 3
    steps = -(-epochs * loader.rows_per_epoch // batch_size)
    rows = [row for step in range(steps) for row in loader.indices(step)]
    assert all(len(loader.indices(step)) == batch_size for step in range(steps))
    for epoch in range(epochs):
        start = epoch * loader.rows_per_epoch
        once = [i for row in rows[start : start + loader.rows_per_epoch] for i in row]
        assert sorted(once) == list(range(count))


@pytest.mark.parametrize("packing", [True, False])
def test_any_step_alone_equals_the_step_in_sequence(packing):
    examples = some(50)
    make = lambda: Loader(examples, 7, 40, packing, shuffle=True, seed=3)  # noqa: E731
    loader = make()
    in_sequence = [loader.batch(step) for step in range(40)]
    for step in (39, 0, 17, 18, 5):
        for batch in (make().batch(step), loader.batch(step)):
            assert batch.keys() == in_sequence[step].keys()
            for name, values in batch.items():
                np.testing.assert_array_equal(values, in_sequence[step][name])
    assert make().batch(10**12)["tokens"].shape == in_sequence[0]["tokens"].shape


def test_batches_hold_the_examples_of_their_indices():
    examples = some(30)
    loader = Loader(examples, 4, 40, packing=True, shuffle=True, seed=1)
    batch = loader.batch(2)
    for row, indices in enumerate(loader.indices(2)):
        for segment, index in enumerate(indices, start=1):
            tokens = batch["tokens"][row][batch["segment_ids"][row] == segment]
            np.testing.assert_array_equal(tokens, examples[index].tokens)
    assert {name: (values.shape, str(values.dtype)) for name, values in batch.items()} == {
        "tokens": ((4, 40), "int32"),
        "loss_weights": ((4, 40), "float32"),
        "segment_ids": ((4, 40), "int32"),
        "positions": ((4, 40), "int32"),
    }


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_and_seeds_differ_and_without_shuffling_nothing_does(packing):
    examples = some(60)
    steps = Loader(examples, 1, 40, packing).rows_per_epoch
    first, second = range(steps), range(steps, 2 * steps)
    loader = Loader(examples, 1, 40, packing, shuffle=True, seed=0)
    assert seen(loader, first) != seen(loader, second)
    other = Loader(examples, 1, 40, packing, shuffle=True, seed=1)
    assert seen(loader, first) != seen(other, range(other.rows_per_epoch))
    plain = Loader(examples, 1, 40, packing, shuffle=False, seed=0)
    steps = plain.rows_per_epoch
    assert seen(plain, range(steps)) == seen(plain, range(steps, 2 * steps))
    if not packing:
        assert seen(plain, range(steps)) == list(range(60))


def test_a_batch_straddles_epochs():
    loader = Loader(some(5), 3, 40, packing=False, shuffle=False)
    assert loader.indices(1) == [[3], [4], [0]]
    # and may be larger than several of them
    loader = Loader(some(2), 7, 40, packing=False, shuffle=True, seed=5)
    assert Counter(seen(loader, [0, 1])) == {0: 7, 1: 7}


def test_the_order_is_the_same_on_every_machine():
    assert order(8, seed=0, epoch=0).tolist() == [3, 4, 6, 0, 1, 2, 7, 5]
    assert order(8, seed=0, epoch=1).tolist() == [6, 4, 2, 3, 1, 7, 5, 0]
    assert order(4, seed=9, epoch=3, shuffle=False).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("longest", "max_length", "length"),
    [(20, 512, 64), (64, 512, 64), (65, 512, 128), (100, 100, 100), (20, 40, 40)],
)
def test_unpacked_rows_are_as_long_as_the_longest_needs(longest, max_length, length):
    loader = Loader(some(3, longest, longest), 2, max_length, packing=False)
    assert loader.row_length == length
    assert loader.batch(0)["tokens"].shape == (2, length)
    assert loader.rows_per_epoch == 3
    assert loader.efficiency == longest / length
    assert (loader.batch(0)["segment_ids"] <= 1).all()


def test_packed_rows_are_of_max_length():
    loader = Loader(some(10, 10, 10), 2, 50, packing=True)
    assert (loader.row_length, loader.rows_per_epoch, loader.efficiency) == (50, 2, 1.0)


def test_examples_that_cannot_be_loaded():
    with pytest.raises(ValueError, match="no examples to load"):
        Loader([], 2, 50)
    for packing in (True, False):
        with pytest.raises(ValueError, match="an example has 60 tokens, more than max_length=50"):
            Loader(some(1, 60, 60), 2, 50, packing)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 6))
def test_evaluation_sees_every_example_once_in_batches_of_one_shape(count, batch_size):
    examples = some(count)
    batches = list(eval_batches(examples, batch_size, 40))
    found = Counter()
    for batch in batches:
        assert all(values.shape == (batch_size, 40) for values in batch.values())
        assert (batch["loss_weights"][batch["segment_ids"] == 0] == 0).all()
        found.update(batch["tokens"][batch["segment_ids"] > 0].tolist())
        assert batch["segment_ids"].any()
    assert found == Counter({k: len(e.tokens) for k, e in enumerate(examples, start=1)})
    weights = sum(float(batch["loss_weights"].sum()) for batch in batches)
    assert weights == sum(len(e.tokens) - 1 for e in examples)
