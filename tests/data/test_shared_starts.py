"""Rows whose texts share their starts, against the texts themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data import CHOSEN, REJECTED, Example, Loader, eval_batches, join, to_row
from lora_jax.data.packing import slots
from lora_jax.data.shared_starts import groups, shareable, size
from lora_jax.data.stream import Blocks, StreamLoader


def text(tokens, answer=1):
    """An example of these tokens, of which the last `answer` are supervised."""
    weights = np.zeros(len(tokens), np.float32)
    weights[len(tokens) - answer :] = 1
    return Example(np.asarray(tokens, np.int32), weights, "row")


def pair(prompt, chosen, rejected):
    """Two answers to a prompt."""
    texts = [text([*prompt, *answer], len(answer)) for answer in (chosen, rejected)]
    return join(*texts, (CHOSEN, REJECTED))


def test_a_row_by_hand():
    """The answers are 4, `5 6` and 9: each text keeps the token before its answer."""
    texts = [text([1, 2, 3, 4]), text([8, 9]), text([1, 2, 3, 5, 6], answer=2)]
    row = to_row(texts, 12, share_prompts=True)
    assert row["tokens"].tolist() == [8, 9, 1, 2, 3, 4, 3, 5, 6, 0, 0, 0]
    assert row["seen_until"].tolist() == [2, 2, 9, 9, 6, 6, 9, 9, 9, 12, 12, 12]
    assert row["positions"].tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 2, 2, 2, 2, 3, 3, 3, 0, 0, 0]
    assert row["loss_weights"].tolist() == [0, 1, 0, 0, 0, 1, 0, 1, 1, 0, 0, 0]
    places = [[2, 3, 4, 5], [0, 1], [2, 3, 6, 7, 8]]
    assert [one.tolist() for one in slots(texts, share_prompts=True)] == places


def test_two_answers_have_one_prompt():
    row = to_row([pair([1, 2, 3], [4], [5, 6])], 8, share_prompts=True)
    assert row["tokens"].tolist() == [1, 2, 3, 4, 3, 5, 6, 0]
    assert row["seen_until"].tolist() == [7, 7, 4, 4, 7, 7, 7, 8]
    assert row["roles"].tolist() == [1, 1, 1, 1, 2, 2, 2, 0]
    assert row["pair_ids"].tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    assert row["loss_weights"].tolist() == [0, 0, 0, 1, 0, 1, 1, 0]


def draw_example(rng):
    """A text or a pair of few distinct tokens, so that many begin alike."""
    prompt = rng.integers(1, 3, rng.integers(0, 6)).tolist()
    answers = [rng.integers(1, 4, rng.integers(1, 4)).tolist() for _ in range(2)]
    if rng.random() < 0.5:
        return pair([1, *prompt], *answers)
    return text([*prompt, *answers[0]], len(answers[0]))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_every_token_sees_its_text_and_nothing_else(seed, count):
    rng = np.random.default_rng(seed)
    examples = [draw_example(rng) for _ in range(count)]
    length = sum(len(one.tokens) for one in examples) + 2
    row = to_row(examples, length, share_prompts=True)
    placed = slots(examples, share_prompts=True)
    time = np.arange(length)
    visible = (time <= time[:, None]) & (time[:, None] < row["seen_until"])
    predicted = 0
    for number, (example, own) in enumerate(zip(examples, placed, strict=True), start=1):
        ends = np.cumsum([len(one.tokens) for one in example.texts])
        for one, here in zip(example.texts, np.split(own, ends[:-1]), strict=True):
            np.testing.assert_array_equal(row["tokens"][here], one.tokens)
            np.testing.assert_array_equal(row["positions"][here], np.arange(len(here)))
            for place, slot in enumerate(here):
                assert np.flatnonzero(visible[slot]).tolist() == here[: place + 1].tolist()
            # A supervised token follows the token before it, in the row too.
            answer = np.flatnonzero(one.loss_weights[1:]) + 1
            assert (here[answer] == here[answer - 1] + 1).all()
            assert (row["loss_weights"][here[answer]] == 1).all()
            predicted += len(answer)
            if example.second_start is not None:
                assert (row["pair_ids"][here[answer]] == number).all()
    assert row["loss_weights"].sum() == predicted
    assert (row["segment_ids"] > 0).sum() <= sum(len(one.tokens) for one in examples)


def questions(preamble, count, rng):
    """Texts of 10 tokens behind a preamble, each another first one; the last 3 are answers."""
    return [text([*preamble, 1000 + i, *rng.integers(100, 999, 9)], 3) for i in range(count)]


def test_groups_are_those_of_the_preambles():
    """Both preambles begin with the same three tokens, as those of a template do."""
    rng = np.random.default_rng(0)
    first, second = ([1, 2, 3, *range(start, start + 57)] for start in (10, 200))
    few = [text([1, 2, 3, *rng.integers(1000, 2000, 20)]) for _ in range(5)]
    examples = [*questions(first, 40, rng), *questions(second, 40, rng), *few]
    order = rng.permutation(len(examples))
    found = groups([examples[i] for i in order], 160)
    assert [group.start for group in found] == [60, 60, 0]
    for group, name in zip(found, (range(40), range(40, 80), range(80, 85)), strict=True):
        assert sorted(order[group.indices]) == list(name)


def test_an_epoch_has_the_tokens_computed_by_hand():
    """100 texts of 30 + 10 tokens in rows of 130: 3 texts a row apart, and 10 that share."""
    rng = np.random.default_rng(1)
    examples = questions(range(1, 31), 100, rng)
    apart = Loader(examples, 2, 130)
    shared = Loader(examples, 2, 130, share_prompts=True)
    assert (apart.rows_per_epoch, apart.tokens) == (34, 4000)
    assert (shared.rows_per_epoch, shared.tokens) == (10, 10 * 30 + 100 * 10)
    assert shared.efficiency == 1
    batches = [shared.batch(step) for step in range(5)]
    assert sum((batch["segment_ids"] > 0).sum() for batch in batches) == shared.tokens
    assert sum(batch["loss_weights"].sum() for batch in batches) == 300


def test_pairs_of_an_epoch_have_the_tokens_computed_by_hand():
    """20 pairs of 41 + 9 tokens: of each, 40 tokens of the prompt are left out once."""
    rng = np.random.default_rng(2)
    examples = []
    for _ in range(20):
        prompt, *answers = (rng.integers(1, 999, n) for n in (41, 4, 5))
        examples.append(pair(prompt, *answers))
    assert size(examples[0], share_prompts=True) == 41 + 4 + 1 + 5
    assert size(examples[0], share_prompts=False) == 41 + 4 + 41 + 5
    shared = Loader(examples, 4, 153, share_prompts=True)
    assert shared.tokens == 20 * 51 and shared.rows_per_epoch == 7
    alone = Loader(examples, 4, 153, packing=False, share_prompts=True)
    assert alone.row_length == 64 and alone.tokens == 20 * 51


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.booleans())
def test_every_example_is_in_one_row_that_holds_it(seed, count, shuffle):
    rng = np.random.default_rng(seed)
    preambles = [rng.integers(1, 9, 20).tolist() for _ in range(3)]
    examples = [
        text([*preambles[rng.integers(3)], *rng.integers(1, 9, 1 + rng.integers(20))])
        for _ in range(count)
    ]
    loader = Loader(examples, 2, 48, shuffle=shuffle, share_prompts=True)
    rows = loader.packed
    assert sorted(index for row in rows for index in row) == list(range(count))
    for row in rows:
        to_row([examples[i] for i in row], 48, share_prompts=True)  # raises if it is too long
    if not shuffle:
        assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert loader.tokens <= sum(len(one.tokens) for one in examples)
    batches = eval_batches(examples, 2, 48, share_prompts=True)
    weights = sum(float(batch["loss_weights"].sum()) for batch in batches)
    assert weights == sum(float(one.loss_weights[1:].sum()) for one in examples)


def test_a_start_ends_before_the_first_answer():
    """Plain texts, and answers within the part that is alike, are nobody else's."""
    assert shareable(text(range(9), answer=9)).size == shareable(text(range(9), 8)).size == 0
    assert shareable(text(range(9), answer=3)).tolist() == [0, 1, 2, 3, 4]
    conversation = text(range(9), answer=2)
    conversation.loss_weights[3] = 1
    row = to_row([conversation, conversation], 18, share_prompts=True)
    assert row["tokens"][:16].tolist() == [*range(9), *range(2, 9)]
    assert row["loss_weights"].sum() == 6


def test_a_stream_shares_within_its_blocks():
    rng = np.random.default_rng(3)
    examples = questions(range(1, 31), 40, rng)
    blocks = Blocks(lambda start: iter(examples[start:]), list, 20, share_prompts=True)
    stream = StreamLoader(blocks, 2, 130)
    batch = stream.batch(0)
    assert "seen_until" in batch
    assert (batch["loss_weights"].sum(axis=1) == 30).all()  # ten texts in each row


@pytest.mark.parametrize("share", [False, True])
def test_a_reference_is_read_where_it_was_written(share):
    rng = np.random.default_rng(4)
    examples = [pair(rng.integers(1, 9, 6), [1, 2], [3]) for _ in range(3)]
    row = to_row(examples, 64, share)
    values = rng.normal(size=64).astype(np.float32) * (row["loss_weights"] > 0)
    known = [
        Example(**(vars(one) | {"reference": values[own]}))
        for one, own in zip(examples, slots(examples, share), strict=True)
    ]
    again = to_row(known, 64, share)["reference_log_probs"]
    np.testing.assert_array_equal(again, values)
    assert np.count_nonzero(values) == 9
