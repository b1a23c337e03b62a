"""Draws of tokens: the kept sets are those of transformers, and the draws repeat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lora_jax import formats
from lora_jax.errors import UserError
from lora_jax.generate import Engine, Request, Sampling
from lora_jax.generate.sampling import choose, draw_tokens, empty_seen, keep_likely, row_of

GREEDY = Sampling()
TEXTS = [[3, 5, 7, 11], [2], [13, 17, 19, 23, 29, 31, 37, 41]]


def kept(logits, top_k=None, top_p=1.0):
    top_k = top_k or logits.shape[-1]
    cut = keep_likely(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(1 - top_p))
    return np.asarray(cut)


def expected(logits, top_k=None, top_p=1.0):
    found = torch.tensor(logits)
    for warper in (
        *([TopKLogitsWarper(top_k)] if top_k else []),
        *([TopPLogitsWarper(top_p)] if top_p < 1 else []),
    ):
        found = warper(None, found)
    return found.numpy()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 300, 1000])
def test_what_is_kept_is_what_transformers_keeps(seed, top_p, top_k):
    logits = np.random.default_rng(seed).normal(0, 3, (4, 300)).astype(np.float32)
    found, wanted = kept(logits, top_k, top_p), expected(logits, top_k, top_p)
    assert np.array_equal(np.isfinite(found), np.isfinite(wanted))
    assert np.array_equal(found[np.isfinite(found)], wanted[np.isfinite(wanted)])
    assert np.isfinite(found).any(axis=-1).all()


@pytest.mark.parametrize("top_p", [1e-9, 0.2, 0.3, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [None, 2, 3])
def test_ties(top_p, top_k):
    logits = np.log(np.array([[0.1, 0.25, 0.25, 0.25, 0.15], [0.2] * 5], np.float32))
    found, wanted = kept(logits, top_k, top_p), expected(logits, top_k, top_p)
    assert np.array_equal(np.isfinite(found), np.isfinite(wanted))


@pytest.mark.parametrize("top_p", [0.5, 0.75, 0.875])
def test_what_adds_up_to_the_tail_exactly_is_dropped(top_p):
    logits = np.log(np.array([[1 / 2, 1 / 16, 1 / 4, 1 / 8, 1 / 16]], np.float32))
    found, wanted = kept(logits, None, top_p), expected(logits, None, top_p)
    assert np.array_equal(found, wanted)
    assert np.isfinite(found).sum() == {0.5: 1, 0.75: 2, 0.875: 3}[top_p]


def test_the_most_likely_token_is_kept_at_the_largest_min_p():
    logits = np.random.default_rng(0).normal(0, 3, (4, 300)).astype(np.float32)
    cut = np.asarray(keep_likely(jnp.asarray(logits), 300, 0.0, 1.0))
    assert np.array_equal(
        cut, np.where(logits == logits.max(axis=-1, keepdims=True), logits, -np.inf)
    )


def test_all_are_kept_at_one_even_those_without_probability():
    logits = np.array([[0.0, -200.0, 1.0]], np.float32)
    assert np.array_equal(kept(logits), logits)


def test_temperature_comes_first():
    logits = np.random.default_rng(0).normal(0, 3, (1, 50)).astype(np.float32)
    allowed = expected(TemperatureLogitsWarper(4.0)(None, torch.tensor(logits)).numpy(), 9, 0.8)
    allowed = set(np.flatnonzero(np.isfinite(allowed[0])).tolist())
    sampling, seen = Sampling(temperature=4.0, top_k=9, top_p=0.8), empty_seen(1, 50)

    @jax.jit
    def draw(row):
        rows = jax.tree.map(lambda x: x[None], row)
        return choose(jnp.asarray(logits), rows, jnp.zeros(1, jnp.int32), seen)[0]

    drawn = {int(draw(row_of(sampling, number, (), 50))) for number in range(300)}
    assert drawn == allowed and len(allowed) > 3


def test_draws_have_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    keys = jax.random.split(jax.random.key(0), 20_000)
    draws = draw_tokens(keys, jnp.tile(logits, (20_000, 1)), 4, 0.1, 0.0)
    shares = np.bincount(np.asarray(draws), minlength=4) / 20_000
    assert np.allclose(shares, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.015)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0"),
        ({"top_p": float("nan")}, "top_p=nan must be above 0"),
        ({"top_k": -2}, "top_k=-2 must be an integer, at least -1"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": float("nan")}, "temperature=nan must not be negative"),
        ({"temperature": float("inf")}, "temperature=inf must not be negative, and finite"),
    ],
)
def test_settings_out_of_range(options, text):
    with pytest.raises(UserError, match=text):
        Sampling(**options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from .conftest import TINY
    from .families import save, torch_model

    directory = tmp_path_factory.mktemp("model")
    save(torch_model("llama", 0, TINY), directory, "float32", "1GB")
    return formats.load(directory)


def test_an_answer_depends_on_its_number_and_not_on_the_batch(model):
    engine = Engine(model, rows=2, max_length=32)

    def answers(sampling=GREEDY, texts=TEXTS, numbers=(0, 1, 2)):
        requests = [
            Request(text, 9, sampling=sampling, number=number)
            for text, number in zip(texts, numbers, strict=True)
        ]
        return [found.tokens for found in engine.answer(requests)]

    drawn = Sampling(temperature=1.5, top_p=0.9, seed=3)
    together = answers(drawn)
    assert together == answers(drawn)
    for number in (0, 1, 2):
        assert answers(drawn, [TEXTS[number]], [number]) == [together[number]]
    twice = answers(drawn, [TEXTS[0]] * 2, (0, 1))
    assert twice[0] == together[0] != twice[1]
    assert answers(Sampling(temperature=1.5, top_p=0.9, seed=4)) != together
    greedy = answers()
    assert greedy != together
    assert answers(Sampling(temperature=1.5, top_p=1e-6)) == greedy


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5, seed=3)])
def test_events_are_the_answer_in_pieces(model, sampling):
    engine = Engine(model, max_length=32)

    def answer(stops):
        [found] = engine.answer([Request(TEXTS[0], 19, stops, sampling)])
        return found.tokens

    whole = answer(())
    assert len(whole) == 19
    for stops in ((), {whole[5]}, {whole[0]}):
        engine.submit(Request(TEXTS[0], 19, stops, sampling))
        events = list(engine.run())
        assert [token for event in events for token in event.tokens] == answer(stops)
        assert len(events) > 1 or stops
