"""Log-probabilities of a trainer against those of an engine."""

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterConfig, lora
from lora_jax.errors import UserError
from lora_jax.generate import (
    Completion,
    Engine,
    Gap,
    Request,
    Sampling,
    for_decoding,
    make_log_prob_gap,
)

from .engines import random_adapters
from .families import FAMILIES, random_model

CONFIGS = {
    "a": AdapterConfig(rank=3, alpha=6, target_modules="all-linear"),
    "b": AdapterConfig(rank=2, target_modules=["q_proj", "v_proj"]),
}
SLOTS = {None: 0, "a": 1, "b": 2}


@pytest.fixture(scope="module")
def model():
    return random_model("llama", **FAMILIES["llama"].fields)


def requests_of(names, seed=0):
    """Prompts and answers of many lengths, some of them drawn."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            rng.integers(1, 97, 1 + 7 * index % 20).tolist(),
            1 + 5 * index,
            sampling=Sampling(temperature=0.9 * (index % 2)),
            adapter=name,
            number=index,
            log_probs=0,
        )
        for index, name in enumerate(names)
    ]


def test_rows_of_a_bank_have_the_log_probabilities_of_the_engine(model):
    form = for_decoding(model)
    bank = lora.bank(form.params, slots=3, rank=3)
    trees = {name: random_adapters(model, config, 1) for name, config in CONFIGS.items()}
    engine = Engine(form, rows=3, max_length=64, bank=bank)
    own = lora.bank(model.params, slots=3, rank=3)
    for name, config in CONFIGS.items():
        engine.publish(name, trees[name], config)
        own = own.put(SLOTS[name], trees[name], config)
    requests = requests_of(["a", None, "b", "a", "b"])
    found = engine.answer(requests)
    gap = make_log_prob_gap(model)
    rows = [SLOTS[request.adapter] for request in requests]
    right = gap(own.bind(model.params, rows), requests, found)
    assert right.mean <= right.largest < 1e-5 and right.tokens == 1 + 6 + 11 + 16 + 21
    wrong = gap(own.bind(model.params, [1, 0, 2, 2, 2]), requests, found)
    assert wrong.largest > 0.1 and wrong.mean > 1e-2
    assert gap(model.params, requests[1:2], found[1:2]).largest < 1e-5
    (mine,) = (gap(lora.bind(model.params, trees["a"], CONFIGS["a"]), requests[:1], found[:1]),)
    assert mine.largest < 1e-5 and mine.tokens == 1


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_are_before_each_prompt(model, method):
    config = AdapterConfig(method=method, num_virtual_tokens=5, prompt_init="random")
    adapters = random_adapters(model, config, 2)
    prefix = lora.prefix(adapters, config)
    engine = Engine(model, rows=2, max_length=64)
    engine.use(model.params, prefix)
    requests = requests_of([None, None, None])
    found, gap = engine.answer(requests), make_log_prob_gap(model)
    assert gap(model.params, requests, found, prefix).largest < 1e-5
    assert gap(model.params, requests, found).largest > 1e-2


def test_a_coarser_trainer_has_a_gap(model):
    requests = requests_of([None, None, None])
    found = Engine(model, rows=1, max_length=64).answer(requests)
    coarse = make_log_prob_gap(model, jnp.bfloat16)(model.params, requests, found)
    assert 1e-4 < coarse.mean < coarse.largest < 0.5


def test_answers_without_tokens_have_no_gap(model):
    (first,) = Engine(model, rows=1, max_length=64).answer([Request([1, 2], 1)])
    request = Request([1, 2], 5, {first.tokens[0]}, log_probs=0)
    found = Engine(model, rows=1, max_length=64).answer([request])
    assert found[0].tokens == []
    assert make_log_prob_gap(model)(model.params, [request], found) == Gap(0.0, 0.0, 0)


def test_completions_that_cannot_be_compared(model):
    gap, request = make_log_prob_gap(model), Request([1, 2], 3)
    with pytest.raises(UserError, match="1 request and 2 completions; give one or more"):
        gap(model.params, [request], [Completion(), Completion()])
    with pytest.raises(UserError, match="0 requests and 0 completions"):
        gap(model.params, [], [])
    with pytest.raises(UserError, match="completion 0 has no log-probabilities; submit its"):
        gap(model.params, [request], [Completion([5, 6, 7])])
