"""Rows with their own sampling settings: against transformers, alone and with any neighbours."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_jax.errors import UserError
from lora_jax.generate import sampling
from lora_jax.generate.log_probs import log_probs, log_probs_if
from lora_jax.generate.sampling import Sampling

VOCAB, DRAWS = 40, 3000
PROMPT, ANSWER, STOPS = [3, 5, 5, 7], [5, 9, 9, 9, 11], [9, 38]
choose = jax.jit(sampling.choose)


def logits_of(seed, rows=1, vocab=VOCAB):
    return np.random.default_rng(seed).normal(0, 2, (rows, vocab)).astype(np.float32)


def seen_of(rows, prompt=PROMPT, answer=ANSWER):
    """The state after the prompt and the answer, in all rows."""
    seen = sampling.empty_seen(rows, VOCAB)
    for row in range(rows):
        seen = sampling.start_row(seen, row, sampling.prompt_mask(prompt, VOCAB))
    for token in answer:
        seen = sampling.count_tokens(seen, jnp.full(rows, token), jnp.ones(rows, bool))
    return seen


def batch_of(settings, first=0, stops=STOPS):
    numbered = enumerate(settings, first)
    return sampling.stack_rows([sampling.row_of(one, n, stops, VOCAB) for n, one in numbered])


def name_of(setting):
    """What a setting changes, for the name of a test."""
    neutral = vars(Sampling())
    changed = {k: v for k, v in vars(setting).items() if v != neutral[k]}
    return " ".join(f"{name}={value}" for name, value in changed.items())


def probabilities(logits):
    return torch.tensor(logits).softmax(dim=-1).numpy()


def drawn_shares(logits, setting):
    """Shares of the tokens that many rows with one setting draw from logits (1, vocab)."""
    rows = batch_of([setting] * DRAWS)
    seen = jax.tree.map(lambda x: jnp.repeat(x, DRAWS, axis=0), seen_of(1))
    drawn = choose(jnp.tile(logits, (DRAWS, 1)), rows, jnp.full(DRAWS, len(ANSWER)), seen)
    return np.bincount(np.asarray(drawn), minlength=VOCAB) / DRAWS


def edited_by_hand(logits, setting):
    """Logits with bias, presence and frequency, token by token."""
    edited = logits.copy()
    for token, value in setting.logit_bias.items():
        edited[0, token] += value
    for token in set(ANSWER):
        edited[0, token] -= setting.frequency_penalty * ANSWER.count(token)
        edited[0, token] -= setting.presence_penalty
    return edited


def processors(setting):
    """Processors of transformers for a setting without bias, presence and frequency, in the order
    of vLLM: min_p before top_k and top_p.
    """
    length, least = len(PROMPT), setting.min_new_tokens
    return LogitsProcessorList(
        [
            MinNewTokensLengthLogitsProcessor(length, least, STOPS),
            RepetitionPenaltyLogitsProcessor(setting.repetition_penalty),
            TemperatureLogitsWarper(float(setting.temperature)),
            *([MinPLogitsWarper(setting.min_p)] if setting.min_p else []),
            *([TopKLogitsWarper(setting.top_k)] if setting.top_k else []),
            *([TopPLogitsWarper(setting.top_p)] if setting.top_p < 1 else []),
        ]
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "setting",
    [
        Sampling(temperature=1.5),
        Sampling(temperature=2.0, repetition_penalty=1.8),
        Sampling(temperature=2.0, repetition_penalty=0.6, top_k=12),
        Sampling(temperature=2.0, min_new_tokens=6, top_p=0.9),
        Sampling(temperature=2.0, min_new_tokens=5, top_p=0.9),
        Sampling(temperature=3.0, min_p=0.2),
        Sampling(temperature=3.0, min_p=0.1, top_k=9, top_p=0.6, repetition_penalty=1.3),
    ],
    ids=name_of,
)
def test_draws_follow_the_processors_of_transformers(seed, setting):
    logits = logits_of(seed)
    ids = torch.tensor([PROMPT + ANSWER])
    wanted = probabilities(processors(setting)(ids, torch.tensor(logits)).numpy())[0]
    found = drawn_shares(logits, setting)
    assert not found[wanted == 0].any()
    assert np.abs(found - wanted).max() < 5 * np.sqrt(0.25 / DRAWS)
    assert np.abs(found - wanted).sum() < 0.12


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "setting",
    [
        Sampling(presence_penalty=2.0),
        Sampling(presence_penalty=-1.5),
        Sampling(frequency_penalty=1.1),
        Sampling(frequency_penalty=-0.7, presence_penalty=0.9),
        Sampling(logit_bias={0: 1.5, 9: -3.0, 39: 2.0}, frequency_penalty=0.5),
    ],
    ids=name_of,
)
def test_bias_and_penalties_of_generated_tokens(seed, setting):
    logits = logits_of(seed)
    found = sampling._edited(jnp.asarray(logits), batch_of([setting]), jnp.array([0]), seen_of(1))
    assert np.allclose(found, edited_by_hand(logits, setting), atol=1e-6)
    # The same in a choice: the difference to the best token decides, for each token in turn.
    for token in (0, 3, 9, 11, 39):
        margin = edited_by_hand(np.zeros_like(logits), setting)[0, token]
        for push, chosen in ((0.01, True), (-0.01, False)):
            near = np.zeros_like(logits)
            near[0, 20], near[0, token] = 5, 5 - margin + push
            token_found = choose(near, batch_of([setting]), jnp.array([5]), seen_of(1))[0]
            assert (int(token_found) == token) is chosen


def test_edits_change_greedy_answers_and_cuts_do_not():
    logits = logits_of(3)
    best = int(logits.argmax())
    cut = Sampling(top_k=1, top_p=0.1, min_p=1.0)
    without = Sampling(logit_bias={best: -100.0})
    rows = batch_of([Sampling(), cut, without, Sampling(temperature=1e-6)])
    found = choose(np.tile(logits, (4, 1)), rows, jnp.zeros(4, int), sampling.empty_seen(4, VOCAB))
    second = int(np.argsort(logits[0])[-2])
    assert found.tolist() == [best, best, second, best]


def test_stop_tokens_wait_for_the_least_number_of_tokens():
    logits = np.zeros((3, VOCAB), np.float32)
    logits[:, 38], logits[:, 9], logits[:, 4] = 3, 2, 1
    rows = batch_of([Sampling(min_new_tokens=2), Sampling(min_new_tokens=3), Sampling()])
    seen = sampling.empty_seen(3, VOCAB)
    found = [choose(logits, rows, jnp.full(3, step), seen).tolist() for step in range(4)]
    assert found == [[4, 4, 38], [4, 4, 38], [38, 4, 38], [38, 38, 38]]


def test_min_p_comes_before_top_p():
    """In transformers min_p comes last; here and in vLLM it renormalises what top_p sees."""
    logits = np.full((1, VOCAB), -20.0, np.float32)
    logits[0, :4] = np.log([0.4, 0.25, 0.2, 0.15])
    found = drawn_shares(logits, Sampling(temperature=1.0, min_p=0.45, top_p=0.7))
    assert set(np.flatnonzero(found)) == {0, 1}  # of 0.85 left, 0.2 is more than 0.3 and less
    logits[0, :4] = np.log([0.44, 0.28, 0.16, 0.12])
    found = drawn_shares(logits, Sampling(temperature=1.0, min_p=0.5, top_p=0.6))
    assert set(np.flatnonzero(found)) == {0}


MIXED = [
    Sampling(),
    Sampling(temperature=1.0, seed=5),
    Sampling(temperature=1.3, top_k=5),
    Sampling(temperature=1.7, top_p=0.8, seed=9),
    Sampling(temperature=2.0, min_p=0.05),
    Sampling(temperature=1.0, presence_penalty=1.0, frequency_penalty=0.3),
    Sampling(temperature=1.0, repetition_penalty=1.4, min_new_tokens=50),
    Sampling(logit_bias={7: 4.0}),
]


def rows_at(tree, index):
    return jax.tree.map(lambda x: jnp.asarray(x)[np.asarray(index)], tree)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_does_not_depend_on_its_neighbours(seed):
    generator = np.random.default_rng(seed)
    many = 4 * len(MIXED)
    logits, rows = logits_of(seed, many), batch_of(MIXED * 4)
    step = jnp.asarray(generator.integers(0, 60, many))
    seen = seen_of(many)
    together = choose(logits, rows, step, seen)
    for _ in range(3):
        index = generator.permutation(many)
        found = choose(logits[index], rows_at(rows, index), step[index], rows_at(seen, index))
        assert np.array_equal(found, together[index])
    for size in (1, 3):
        for start in range(0, 2 * len(MIXED), size):
            index = np.arange(start, start + size)
            found = choose(logits[index], rows_at(rows, index), step[index], rows_at(seen, index))
            assert np.array_equal(found, together[index])


def test_logits_of_a_row_have_the_same_bits_with_any_neighbours():
    """A row without a cut or penalties keeps its bits when a neighbour has them."""
    logits = logits_of(0, 2, 1000)
    logits[0, 3] = -200  # without probability, and kept
    kept = sampling.keep_likely(jnp.asarray(logits), jnp.array([2000, 5]), jnp.array([0.0, 0.3]))
    assert np.array_equal(kept[0], logits[0]) and np.isfinite(kept[1]).sum() < 6
    odd = np.array([[0.0, -0.0, -np.inf, 1e-37, 3e38] + [1.1] * 35] * 2, np.float32)
    rows = batch_of([Sampling(), Sampling(frequency_penalty=1.0, logit_bias={1: 2.0})])
    edited = jax.jit(sampling._edited)(odd, rows, jnp.array([False, False]), seen_of(2))
    assert np.array_equal(edited[0], odd[0]) and not np.array_equal(edited[1], odd[1])


def test_draws_depend_on_seed_number_and_step():
    logits, wide = np.zeros((1, VOCAB), np.float32), Sampling(temperature=1.0)
    seen = sampling.empty_seen(1, VOCAB)

    def draws(setting, number, steps=range(12)):
        rows = batch_of([setting], number)
        return [int(choose(logits, rows, jnp.array([step]), seen)[0]) for step in steps]

    base = draws(wide, 3)
    assert base == draws(wide, 3) and len(set(base)) > 5
    assert base != draws(wide, 4) and base != draws(Sampling(temperature=1.0, seed=1), 3)
    key = jax.random.fold_in(jax.random.key(2**32 - 1), 2**32 - 1)
    wanted = [
        int(jax.random.categorical(jax.random.fold_in(key, step), jnp.zeros(VOCAB)))
        for step in range(12)
    ]
    assert draws(Sampling(temperature=1.0, seed=2**32 - 1), 2**32 - 1) == wanted


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_are_those_of_categorical(seed):
    many, setting = 300, Sampling(temperature=1.5, top_k=9, seed=seed)
    logits, rows = logits_of(seed, many), batch_of([setting] * many)
    found = choose(logits, rows, jnp.zeros(many, int), sampling.empty_seen(many, VOCAB))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(many))
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    kept = np.where(logits >= np.sort(logits)[:, [-9]], logits / np.float32(1.5), -np.inf)
    assert np.array_equal(found, jax.vmap(jax.random.categorical)(keys, kept))


def test_all_settings_share_one_program():
    chex.clear_trace_counter()
    once = jax.jit(chex.assert_max_traces(sampling.choose, n=1))
    write = jax.jit(chex.assert_max_traces(sampling.set_row, n=1), donate_argnums=0)
    start = jax.jit(chex.assert_max_traces(sampling.start_row, n=1), donate_argnums=0)
    rows = jax.tree.map(jnp.asarray, batch_of([Sampling()] * 2))
    seen, logits = sampling.empty_seen(2, VOCAB), logits_of(0, 2)
    for number, setting in enumerate(MIXED):
        row = sampling.row_of(setting, number, STOPS[: number % 3], VOCAB)
        rows = write(rows, number % 2, row)
        assert jax.tree.map(np.asarray, rows_at(rows, number % 2)).stops.tolist() == list(row.stops)
        seen = start(seen, number % 2, sampling.prompt_mask(PROMPT[: number % 4], VOCAB))
        once(logits, rows, jnp.array([number, 2]), seen)


def test_a_row_begins_anew_with_its_prompt():
    seen = sampling.start_row(seen_of(2), 1, sampling.prompt_mask([0, 39], VOCAB))
    assert np.flatnonzero(seen.in_prompt[1]).tolist() == [0, 39] and not seen.counts[1].any()
    assert np.flatnonzero(seen.in_prompt[0]).tolist() == [3, 5, 7] and seen.counts[0].sum() == 5
    seen = sampling.count_tokens(seen, jnp.array([39, 39]), jnp.array([False, True]))
    assert int(seen.counts[0, 39]) == 0 and int(seen.counts[1, 39]) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"min_p": 1.1}, "min_p=1.1 must be from 0 to 1"),
        ({"min_p": float("nan")}, "min_p=nan must be from 0 to 1"),
        ({"presence_penalty": 2.1}, "presence_penalty=2.1 must be from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan must be from -2 to 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be from 0.001 to 1000"),
        ({"repetition_penalty": 1e-4}, "repetition_penalty=0.0001 must be from 0.001"),
        ({"repetition_penalty": 1e300}, r"repetition_penalty=1e\+300 must be from 0.001 to 1000"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf must be from 0.001"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1 must be an integer, at least 0"),
        ({"min_new_tokens": None}, "min_new_tokens=None must be an integer"),
        ({"top_k": 2.5}, "top_k=2.5 must be an integer"),
        ({"seed": -1}, "seed=-1 must be an integer from 0 to 4294967295"),
        ({"seed": 2**32}, "must be an integer from 0"),
        ({"temperature": "hot"}, "temperature='hot' must not be negative"),
        ({"logit_bias": [1]}, r"logit_bias=\[1\] must map token ids to numbers"),
        ({"logit_bias": {"7": 1.0}}, "logit_bias: '7' is no token id"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: -1 is no token id"),
        ({"logit_bias": {7: float("inf")}}, "logit_bias: inf of token 7 must be a finite number"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias has 301 entries; .* most 300"),
    ],
)
def test_settings_out_of_range(options, text):
    with pytest.raises(UserError, match=text):
        Sampling(**options)


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1e300])
@pytest.mark.parametrize("repetition", [1e-3, 1e3])
def test_the_widest_settings_keep_logits_finite(temperature, repetition):
    """The largest bias wins, the smallest loses."""
    bias = {4: 1e30, 5: -1e30, 6: -1e30}
    extreme = Sampling(
        temperature=temperature,
        repetition_penalty=repetition,
        presence_penalty=2.0,
        frequency_penalty=-2.0,
        logit_bias=bias,
    )
    rows = sampling.stack_rows([sampling.row_of(extreme, 0, (), VOCAB)])
    seen = sampling.start_row(sampling.empty_seen(1, VOCAB), 0, sampling.prompt_mask([4, 5], VOCAB))
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((1, VOCAB)), jnp.float32)
    edited = sampling._edited(logits, rows, jnp.array([False]), seen)
    scaled = edited / jnp.maximum(rows.temperature, 1e-5)[:, None]
    assert np.isfinite(scaled).all()
    (token,) = np.asarray(sampling.choose(logits, rows, jnp.array([0]), seen)).tolist()
    assert token == 4 if temperature < 1 else token < VOCAB


def test_all_problems_are_raised_together():
    with pytest.raises(UserError) as raised:
        Sampling(temperature=-1, top_p=2, logit_bias={-3: 1.0, 4: float("nan")})
    assert len(str(raised.value).split("\n")) == 4
    with pytest.raises(UserError) as raised:
        sampling.row_of(Sampling(logit_bias={40: 1.0, 39: 1.0}), -1, range(65), VOCAB)
    assert str(raised.value).split("\n") == [
        "logit_bias: tokens [40] are outside the vocabulary of 40",
        "65 stop tokens are more than 64",
        "number=-1 must be from 0 to 4294967295",
    ]


@pytest.mark.parametrize("off", [None, 0, -1])
def test_top_k_is_off(off):
    assert sampling.row_of(Sampling(top_k=off), 0, (), VOCAB).top_k > VOCAB


@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize("seed", [0, 1])
def test_log_probabilities(seed, scale):
    logits = scale * logits_of(seed, 50, 300) + 17
    tokens = np.random.default_rng(seed).integers(0, 300, 50)
    tokens[:25] = logits[:25].argmax(axis=-1)
    found = jax.jit(log_probs)(logits, tokens)
    wanted = torch.tensor(logits).double().log_softmax(dim=-1)
    own = wanted[np.arange(50), tokens].numpy()
    values, ids = wanted.topk(20)
    assert np.allclose(found.own, own, rtol=1e-6, atol=1e-6)
    assert np.array_equal(found.top_ids, ids)
    assert np.allclose(found.top_values, values, rtol=1e-6, atol=1e-6)
    assert np.array_equal(found.own[:25], found.top_values[:25, 0])
    for rank in (1, 19):
        again = jax.jit(log_probs)(logits, found.top_ids[:, rank])
        assert np.array_equal(again.own, found.top_values[:, rank])


def test_log_probabilities_on_demand():
    logits, tokens = logits_of(0, 3, 10), jnp.array([1, 2, 3])
    on_demand = jax.jit(log_probs_if)
    wanted, found = log_probs(logits, tokens), on_demand(jnp.array([0, 1, 0]), logits, tokens)
    chex.assert_trees_all_close(found, wanted, rtol=1e-6)
    assert found.top_ids.shape == (3, 10)
    nothing = on_demand(jnp.array([0, 0, 0]), logits, tokens)
    chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, wanted))
