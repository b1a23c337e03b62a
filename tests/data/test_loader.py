"""The order of training is a function of seed and step, and loses and repeats nothing."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data import Example, Loader, Mixture, eval_batches, order
from lora_jax.errors import UserError


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

    empty = Example(np.zeros(0, np.int32), np.zeros(0, np.float32), "f:2")
    for packing in (True, False):
        with pytest.raises(ValueError, match="f:2: an example without tokens"):
            Loader([*some(1), empty], 2, 50, packing)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        Loader(some(1), 0, 50)


def both_kinds(batch_size: int = 8):
    """A loader of one source, and a mixture of three."""
    loaders = {name: Loader(some(40, seed=k), batch_size, 40) for k, name in enumerate("abc")}
    return loaders["a"], Mixture(loaders, {"a": 5, "b": 2, "c": 1})


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("kind", [0, 1])
def test_the_batch_does_not_depend_on_the_number_of_processes(kind, processes):
    whole = both_kinds()[kind]
    hosts = [both_kinds()[kind] for _ in range(processes)]
    size = 8 // processes
    for step in (0, 1, 5, 130):
        expected = whole.batch(step)
        slices = [slice(k * size, (k + 1) * size) for k in range(processes)]
        ranges = [range(*one.indices(8)) for one in slices]
        for picked in (slices, ranges):
            parts = [host.batch(step, rows) for host, rows in zip(hosts, picked, strict=True)]
            assert all(values.shape == (size, 40) for part in parts for values in part.values())
            for name, values in expected.items():
                together = np.concatenate([part[name] for part in parts])
                assert together.tobytes() == values.tobytes()


def test_rows_may_be_picked_in_steps():
    loader, _ = both_kinds()
    tokens = loader.batch(3)["tokens"]
    np.testing.assert_array_equal(loader.batch(3, range(6, 0, -2))["tokens"], tokens[6:0:-2])
    np.testing.assert_array_equal(loader.batch(3, slice(5, None))["tokens"], tokens[5:])


@pytest.mark.parametrize("rows", [slice(4, 9), slice(8, 9), slice(3, 3), slice(-2, None), range(9)])
@pytest.mark.parametrize("kind", [0, 1])
def test_rows_that_a_batch_does_not_have_are_refused(kind, rows):
    loader = both_kinds()[kind]
    with pytest.raises(ValueError, match="does not pick rows of a batch of 8"):
        loader.batch(0, rows)
    with pytest.raises(ValueError, match="step=-1 must be at least 0"):
        loader.batch(-1)


def test_the_position_of_a_step():
    loader = Loader(some(5), 3, 40, packing=False)
    assert loader.position(0) == {"step": 0, "epoch": 0, "row": 0}
    assert loader.position(4) == {"step": 4, "epoch": 2, "row": 2}
    loaders = {"b": loader, "a": Loader(some(7), 3, 40, packing=False)}
    mixture = Mixture(loaders, {"a": 1, "b": 1})
    position = mixture.position(5)  # 15 rows: a has had 8 of them and b 7
    assert position == {
        "step": 5,
        "sources": {"a": {"epoch": 1, "row": 1}, "b": {"epoch": 1, "row": 2}},
    }
    assert json.loads(json.dumps(position)) == position


# Mixtures


def sources(*counts: int, batch_size: int = 4, **options) -> dict[str, Loader]:
    """Loaders named a, b, ..; the tokens of each one's examples tell them apart."""
    return {
        "abcdef"[k]: Loader(
            [
                Example(e.tokens + 1000 * k, e.loss_weights, e.where)
                for e in some(count, 20, 20, seed=k)
            ],
            batch_size,
            40,
            **options,
        )
        for k, count in enumerate(counts)
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.05, 5), min_size=1, max_size=6), st.integers(0, 10**9))
def test_every_source_is_within_one_row_of_its_share_at_any_time(weights, far):
    loaders = sources(*([5] * len(weights)))
    mixture = Mixture(loaders, dict(zip(loaders, weights, strict=True)))
    assert sum(mixture.shares.values()) == pytest.approx(1, abs=1e-12)
    for name, weight in zip(loaders, weights, strict=True):
        assert abs(mixture.shares[name] - weight / sum(weights)) < 1 / 1000
    counts = Counter()
    for number in range(2001):
        for name, share in mixture.shares.items():
            assert abs(counts[name] - number * share) < 1
        name, row = mixture.place(number)
        assert row == counts[name]  # no row of a source is left out or given twice
        counts[name] += 1
    name, row = mixture.place(far)
    assert abs(row - far * mixture.shares[name]) < 1
    assert mixture.place(far + 1000) == (name, row + round(1000 * mixture.shares[name]))


def test_each_source_goes_through_epochs_of_its_own():
    loaders = sources(6, 25, packing=False)
    mixture = Mixture(loaders, {"a": 0.25, "b": 0.75})
    found = {"a": [], "b": []}
    for step in range(200):
        for tokens in mixture.batch(step)["tokens"]:
            source, number = divmod(int(tokens[0]), 1000)
            found["ab"[source]].append(number)
    assert (len(found["a"]), len(found["b"])) == (200, 600)
    for name, count in (("a", 6), ("b", 25)):
        epochs = [found[name][k : k + count] for k in range(0, len(found[name]) - count, count)]
        assert all(sorted(epoch) == list(range(1, count + 1)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_a_mixture_of_one_source_is_that_source():
    loaders = sources(30, packing=True)
    mixture = Mixture(loaders, {"a": 0.3})
    assert mixture.efficiency == loaders["a"].efficiency
    for step in (0, 7, 400):
        for name, values in loaders["a"].batch(step).items():
            np.testing.assert_array_equal(mixture.batch(step)[name], values)


def test_any_step_of_a_mixture_alone_equals_the_step_in_sequence():
    make = lambda: Mixture(sources(9, 14, 3), {"a": 1, "b": 2, "c": 0.5})  # noqa: E731
    mixture = make()
    in_sequence = [mixture.batch(step)["tokens"] for step in range(300)]
    for step in (299, 0, 250, 17):
        np.testing.assert_array_equal(make().batch(step)["tokens"], in_sequence[step])
    # the sources in another order, or weights of another sum, are the same mixture
    loaders = sources(9, 14, 3)
    turned = Mixture({n: loaders[n] for n in "cab"}, {"b": 20, "a": 10, "c": 5})
    np.testing.assert_array_equal(turned.batch(17)["tokens"], in_sequence[17])


def test_rows_of_a_mixture_are_as_long_as_the_longest_source_needs():
    loaders = {
        "short": Loader(some(3, 64, 64), 2, 512, packing=False),
        "long": Loader(some(3, 96, 96), 2, 512, packing=False),
    }
    mixture = Mixture(loaders, {"short": 3, "long": 1})
    assert mixture.row_length == 128
    assert mixture.batch(0)["tokens"].shape == (2, 128)
    assert mixture.efficiency == 0.75 * 64 / 128 + 0.25 * 96 / 128
    assert mixture.shares == {"short": 0.75, "long": 0.25}


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"a": 1, "b": 0}, "the weight 0 of 'b' must be a finite number above 0"),
        ({"a": 0, "b": 0}, "the weight 0 of 'a' .*\n.*the weight 0 of 'b'"),
        ({"a": -1, "b": 2}, "the weight -1 of 'a' must be"),
        ({"a": float("nan"), "b": 2}, "the weight nan of 'a' must be"),
        ({"a": float("inf"), "b": 2}, "the weight inf of 'a' must be"),
        ({"a": "1", "b": 2}, "the weight '1' of 'a' must be"),
        ({"a": True, "b": 2}, "the weight True of 'a' must be"),
        ({"a": 1, "b": 1e-5}, "the weight 1e-05 of 'b' is less than a row in 1000"),
        ({"a": 1}, "weights are given for 'a', and the sources are 'a', 'b'"),
        ({"a": 1, "c": 1}, "weights are given for 'a', 'c', and the sources are 'a', 'b'"),
        ({}, "weights are given for nothing"),
    ],
)
def test_weights_that_mix_nothing_are_refused(weights, problem):
    with pytest.raises(UserError, match=problem):
        Mixture(sources(3, 3), weights)


def test_sources_that_cannot_be_mixed():
    with pytest.raises(UserError, match="at least one source"):
        Mixture({}, {})
    loaders = sources(3) | {"b": Loader(some(3), 5, 40)}
    with pytest.raises(ValueError, match=r"different batch sizes: \[4, 5\]"):
        Mixture(loaders, {"a": 1, "b": 1})


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
