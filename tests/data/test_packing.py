"""Packing loses nothing, splits nothing, and keeps examples apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data import Example, pack, to_row


def example(tokens, weights=None) -> Example:
    weights = np.ones(len(tokens)) if weights is None else weights
    return Example(np.asarray(tokens, np.int32), np.asarray(weights, np.float32), "f:1")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=200), st.integers(1, 8))
def test_every_example_once_and_no_row_overfull(lengths, window):
    rows = pack(lengths, 40, window)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert row
        assert sum(lengths[i] for i in row) <= 40
        assert row == sorted(row)
    assert rows == pack(np.array(lengths, int), 40, window)


def test_the_longest_goes_first_into_the_fullest_row_with_room():
    # 7 and 6 and 5 open rows; 4 fills that of 6, 3 that of 7, and 2 and 1 go to the 5
    assert pack([1, 2, 3, 7, 6, 5, 4], 10) == [[0, 1, 5], [2, 3], [4, 6]]
    assert pack([6, 7, 3, 4], 10) == [[0, 3], [1, 2]]
    assert pack([5, 5, 5], 10) == [[0, 1], [2]]
    assert pack([], 10) == []


def test_the_order_given_is_kept_but_for_a_window():
    assert pack([8, 3, 2, 7], 10, window=1) == [[0], [1], [2, 3]]
    assert pack([8, 3, 2, 7], 10, window=2) == [[0, 2], [1, 3]]
    lengths = np.random.RandomState(0).randint(1, 41, size=2000)
    rows = pack(lengths, 40, window=10)
    assert rows == sorted(rows)
    assert all(lengths[row[0] : row[-1] + 1].sum() < 11 * 40 for row in rows)


@pytest.mark.parametrize(
    ("low", "high", "max_length"), [(20, 130, 512), (40, 120, 512), (40, 120, 256)]
)
def test_few_tokens_are_padding_for_lengths_of_short_answers(low, high, max_length):
    for seed in range(10):
        lengths = np.random.RandomState(seed).randint(low, high + 1, size=1200).tolist()
        rows = pack(lengths, max_length)
        assert sum(lengths) / (max_length * len(rows)) >= 0.95


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(0, 2**31))
def test_packed_rows_hold_what_the_examples_hold(lengths, seed):
    random = np.random.RandomState(seed)
    examples = [example(random.randint(1, 99, n), random.rand(n)) for n in lengths]
    found = {}
    for indices in pack(lengths, 30, window=3):
        row = to_row([examples[i] for i in indices], 30)
        ids = row["segment_ids"]
        used = np.flatnonzero(ids)
        assert used.tolist() == list(range(len(used)))  # padding at the end alone
        assert (np.diff(ids[used]) >= 0).all() and set(ids[used]) == set(range(1, ids.max() + 1))
        for segment, index in enumerate(indices, start=1):
            assert index not in found
            found[index] = {name: values[ids == segment] for name, values in row.items()}
    assert sorted(found) == list(range(len(lengths)))
    for index, one in enumerate(examples):
        np.testing.assert_array_equal(found[index]["tokens"], one.tokens)
        np.testing.assert_array_equal(found[index]["loss_weights"][1:], one.loss_weights[1:])
        assert found[index]["loss_weights"][0] == 0
        np.testing.assert_array_equal(found[index]["positions"], np.arange(len(one.tokens)))


@pytest.mark.parametrize("lengths", [[3, 11], [0]])
def test_lengths_out_of_range_are_refused(lengths):
    with pytest.raises(ValueError, match=r"example \d has \d+ tokens: not between 1 and 10"):
        pack(lengths, 10)


def test_a_row_by_hand():
    row = to_row([example([5, 6, 7], [0, 0.5, 1]), example([8, 9], [1, 1])], 7)
    expected = {
        "tokens": [5, 6, 7, 8, 9, 0, 0],
        "loss_weights": [0, 0.5, 1, 0, 1, 0, 0],  # 8 has nothing before it in its segment
        "segment_ids": [1, 1, 1, 2, 2, 0, 0],
        "positions": [0, 1, 2, 0, 1, 0, 0],
    }
    assert {name: values.tolist() for name, values in row.items()} == expected
    assert {name: str(values.dtype) for name, values in row.items()} == {
        "tokens": "int32",
        "loss_weights": "float32",
        "segment_ids": "int32",
        "positions": "int32",
    }


def test_examples_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 examples of 5 tokens do not fit into 4"):
        to_row([example([1, 2, 3]), example([4, 5])], 4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=6))
def test_no_prediction_crosses_segments(lengths):
    examples = [example(np.arange(1, n + 1) + 100 * k) for k, n in enumerate(lengths)]
    row = to_row(examples, 54)
    predicted = np.flatnonzero(row["loss_weights"][1:])  # position i predicts token i + 1
    segments = row["segment_ids"]
    assert (segments[predicted] == segments[predicted + 1]).all()
    assert (segments[predicted] > 0).all()
    assert row["loss_weights"][0] == 0
    assert row["loss_weights"].sum() == sum(n - 1 for n in lengths)
    for k, one in enumerate(examples, start=1):
        np.testing.assert_array_equal(row["tokens"][segments == k], one.tokens)
        np.testing.assert_array_equal(row["positions"][segments == k], np.arange(len(one.tokens)))
    assert (row["tokens"][segments == 0] == 0).all()
