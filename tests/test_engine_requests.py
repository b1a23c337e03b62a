"""Many requests over few rows and slots: every answer is that of its request alone."""

import jax
import numpy as np
import pytest

from lora_jax import AdapterConfig, lora
from lora_jax.errors import UserError
from lora_jax.generate import Completion, Engine, Request, Sampling, for_decoding

from .engines import random_adapters
from .families import FAMILIES, random_model

REQUESTS, ROWS, SLOTS = 300, 4, 4
CONFIGS = {
    "small": AdapterConfig(rank=2, alpha=4, target_modules="all-linear"),
    "wide": AdapterConfig(rank=8, alpha=8, target_modules="all-linear", use_rslora=True),
    "queries": AdapterConfig(rank=5, alpha=3, target_modules=["q_proj", "v_proj"]),
    "norms": AdapterConfig(rank=3, alpha=6, target_modules="all-linear", use_dora=True),
    "down": AdapterConfig(rank=4, alpha=9, target_modules=["down_proj"]),
    "patterns": AdapterConfig(
        rank=2,
        target_modules="all-linear",
        rank_pattern={"up_proj": 7},
        alpha_pattern={"up_proj": 9},
    ),
}


@pytest.fixture(scope="module")
def model():
    return random_model("llama", **FAMILIES["llama"].fields)


def merged(model, trees, weights):
    """The base with a weighted sum of updates."""
    whole = [lora.merge(lora.bind(model.params, *tree)) for tree in trees]

    def add(base, *others):
        return base + sum(w * (x - base) for w, x in zip(weights, others, strict=True))

    return jax.tree.map(add, model.params, *whole)


def draw_request(rng, number, names):
    adapter = names[rng.integers(len(names))]
    if rng.random() < 0.15:
        adapter = {"small": 0.7, "wide": -0.4}
    settings = [
        Sampling(),
        Sampling(temperature=0.8, seed=int(rng.integers(9))),
        Sampling(temperature=1.2, top_k=5, top_p=0.9, seed=1),
        Sampling(temperature=0.7, min_p=0.05, presence_penalty=0.5, frequency_penalty=0.2),
        Sampling(repetition_penalty=1.2, logit_bias={int(rng.integers(97)): 3.0}, min_new_tokens=2),
    ]
    return Request(
        rng.integers(1, 97, rng.integers(1, 30)).tolist(),
        int(rng.integers(1, 25)),
        rng.integers(0, 97, rng.integers(0, 4)).tolist(),
        settings[rng.integers(len(settings))],
        adapter,
        number,
        log_probs=int(rng.integers(3)) if rng.random() < 0.3 else None,
        prompt_log_probs=1 if rng.random() < 0.1 else None,
    )


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_answer_is_that_of_its_request_alone(model, error, seed):
    """Requests of random length, adapter, sampling and budget, while others are cancelled and names
    are published again: six names share three slots.
    """
    rng, base = np.random.default_rng(seed), for_decoding(model)
    bank = lora.bank(base.params, slots=SLOTS, rank=8, use_dora=True)
    engine = Engine(base, rows=ROWS, max_length=64, bank=bank, max_terms=2)
    trees = {name: (random_adapters(model, config, 7), config) for name, config in CONFIGS.items()}
    for name, tree in trees.items():
        engine.publish(name, *tree)
    programs = engine.warm_up()
    requests, ids, cancelled, found = [], {}, set(), {}

    def take(events):
        for event in events:
            found.setdefault(event.id, Completion()).add(event)

    for number in range(REQUESTS):
        request = draw_request(rng, number, [None, *CONFIGS])
        id = engine.submit(request)
        ids[id] = len(requests)
        requests.append((request, dict(trees)))
        if rng.random() < 0.2:
            victim = int(rng.choice(list(ids)[-6:]))
            if found.get(victim, Completion()).finish_reason is None:
                engine.cancel(victim)
                cancelled.add(victim)
        if rng.random() < 0.08:
            name = str(rng.choice(list(CONFIGS)))
            trees[name] = (random_adapters(model, CONFIGS[name], 100 + number), CONFIGS[name])
            engine.publish(name, *trees[name])
        for _ in range(rng.integers(0, 2)):
            take(engine.step())
    take(engine.run())
    assert engine.compiled_programs == programs
    assert 10 < len(cancelled) < REQUESTS / 4
    alone = Engine(model, rows=1, max_length=64)
    for id, index in ids.items():
        if id in cancelled:
            assert found.get(id, Completion()).finish_reason is None
        else:
            check_alone(alone, model, *requests[index], found[id], error)


def check_alone(alone, model, request, trees, found, error):
    adapter = request.adapter
    weights = {adapter: 1.0} if isinstance(adapter, str) else adapter or {}
    own = [trees[name] for name in weights]
    alone.use(merged(model, own, weights.values()) if own else model.params)
    settings = vars(request) | {"adapter": None}
    (expected,) = alone.answer([Request(**settings)])
    assert found.tokens == expected.tokens
    assert found.finish_reason == expected.finish_reason
    assert found.stop_token == expected.stop_token
    for name in ("log_probs", "prompt_log_probs"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None and one.own.size:
            assert error(one.own, other.own) < 1e-4
            assert one.top_ids.shape == other.top_ids.shape


@pytest.fixture
def engine(model):
    bank = lora.bank(model.params, slots=2, rank=4)
    return Engine(model, rows=2, max_length=64, bank=bank, max_terms=2)


def test_a_running_request_keeps_its_version(model, engine):
    """One slot: the new version waits for the request that runs on the old one."""
    config, prompt = CONFIGS["small"], [5, 6, 7]
    first, second = (random_adapters(model, config, seed) for seed in (1, 2))
    identity = engine.publish("a", first, config)
    assert engine.publish("a", first, config) == identity
    (old,) = engine.answer([Request(prompt, 30, adapter="a")])
    running = engine.submit(Request(prompt, 30, adapter="a"))
    engine.step()
    assert engine.publish("a", second, config) != identity
    later = engine.submit(Request(prompt, 30, adapter="a"))
    found = {running: Completion(), later: Completion()}
    order = []
    for event in engine.run():
        found[event.id].add(event)
        order += [event.id] if event.finish_reason else []
    assert order == [running, later]
    (new,) = engine.answer([Request(prompt, 30, adapter="a")])
    assert old.tokens[9:] == found[running].tokens[-len(old.tokens[9:]) :]
    assert found[later].tokens == new.tokens != old.tokens


def test_a_withdrawn_adapter_answers_its_requests(model, engine):
    config = CONFIGS["small"]
    engine.publish("a", random_adapters(model, config, 1), config)
    (wanted,) = engine.answer([Request([3, 4], 20, adapter="a")])
    id = engine.submit(Request([3, 4], 20, adapter="a"))
    engine.withdraw("a")
    with pytest.raises(UserError, match="adapter 'a' is not published; there are: none"):
        engine.submit(Request([3, 4], 20, adapter="a"))
    with pytest.raises(UserError, match="adapter 'a' is not published"):
        engine.withdraw("a")
    assert [t for e in engine.run() if e.id == id for t in e.tokens] == wanted.tokens


def test_a_published_tree_is_a_copy(model, engine):
    """As a training loop donates its adapters to the next step."""
    config = CONFIGS["small"]
    adapters = random_adapters(model, config, 1)
    engine.publish("a", adapters, config)
    engine.publish("b", random_adapters(model, config, 2), config)
    (wanted,) = engine.answer([Request([3, 4], 20, adapter="a")])
    jax.tree.map(lambda x: x.delete(), adapters)
    engine.answer([Request([3, 4], 20, adapter="b")])
    assert engine.answer([Request([3, 4], 20, adapter="a")])[0].tokens == wanted.tokens
    assert list(engine.adapters) == ["a", "b"]


def test_adapters_that_the_engine_refuses(model, engine):
    config = CONFIGS["wide"]
    with pytest.raises(UserError, match="rank"):
        engine.publish("a", random_adapters(model, config, 1), config)
    small = CONFIGS["small"]
    engine.publish("abc", random_adapters(model, small, 1), small)
    with pytest.raises(UserError, match="'abd' is not published; there are: abc. Did you mean"):
        engine.submit(Request([1], 2, adapter="abd"))
    with pytest.raises(UserError, match="more than max_terms=2; open .* with max_terms=3"):
        for name in "xyz":
            engine.publish(name, random_adapters(model, small, 1), small)
        engine.submit(Request([1], 2, adapter=dict.fromkeys("xyz", 1.0)))
    with pytest.raises(UserError, match="2 adapters in one request need as many slots; .* has 1"):
        engine.submit(Request([1], 2, adapter={"x": 0.5, "y": 0.5}))
    with pytest.raises(UserError, match="its weight nan is not finite"):
        engine.submit(Request([1], 2, adapter={"abc": float("nan")}))
    with pytest.raises(UserError, match="its weight '1' is no number"):
        engine.submit(Request([1], 2, adapter={"abc": "1"}))
    with pytest.raises(UserError, match="the engine has no slots; give it a bank"):
        Engine(model, rows=1, max_length=8).publish("a", random_adapters(model, small, 1), small)
    assert not engine.busy


def test_a_gain_has_no_weighted_sum(model):
    bank = lora.bank(model.params, slots=3, rank=4, use_dora=True)
    engine = Engine(model, rows=1, max_length=16, bank=bank, max_terms=2)
    for name in ("norms", "small"):
        engine.publish(name, random_adapters(model, CONFIGS[name], 1), CONFIGS[name])
    for weights in ({"norms": 0.5}, {"norms": 1.0, "small": 0.1}):
        with pytest.raises(UserError, match="'norms' has a gain"):
            engine.submit(Request([1], 2, adapter=weights))
    assert len(engine.answer([Request([1], 2, adapter={"norms": 1.0})])[0].tokens) == 2


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_of_some_rows(error, family, method):
    """Beside rows of the base and of a low-rank adapter, as when all rows have them."""
    model = random_model(family, **FAMILIES[family].fields)
    own = AdapterConfig(method=method, num_virtual_tokens=5, prompt_init="random")
    low = AdapterConfig(rank=3, target_modules=FAMILIES[family].targets)
    form = {"mistral": for_decoding, "gpt2": lambda model: model}[family](model)
    bank = lora.bank(form.params, slots=2, rank=3, modules=FAMILIES[family].targets)
    engine = Engine(form, rows=3, max_length=64, bank=bank, max_virtual_tokens=7)
    trees = {"soft": (random_adapters(model, own, 1), own)}
    trees["low"] = random_adapters(model, low, 1), low
    for name, tree in trees.items():
        engine.publish(name, *tree)
    programs = engine.warm_up()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 97, n).tolist() for n in (20, 7, 3, 33)]
    requests = [
        Request(prompt, 12, adapter=name, prompt_log_probs=0)
        for prompt in prompts
        for name in ("soft", None, "low")
    ]
    found = engine.answer(requests)
    assert engine.compiled_programs == programs
    alone = Engine(model, rows=1, max_length=64)
    for name in ("soft", None, "low"):
        params, prefix = model.params, None
        if name is not None:
            params = lora.bind(params, *trees[name])
            prefix = lora.prefix(*trees[name])
        alone.use(params, prefix)
        mine = [one for one in zip(requests, found, strict=True) if one[0].adapter == name]
        expected = alone.answer([Request(r.prompt, 12, prompt_log_probs=0) for r, _ in mine])
        for (_, one), other in zip(mine, expected, strict=True):
            assert one.tokens == other.tokens
            assert error(one.prompt_log_probs.own, other.prompt_log_probs.own) < 1e-5


def test_virtual_tokens_that_rows_cannot_have(model):
    engine = Engine(model, rows=1, max_length=16, max_virtual_tokens=3)
    for more, text in (
        ({"num_virtual_tokens": 4}, "it has 4 virtual tokens, and the engine has room for max_vir"),
        ({"method": "prefix", "prefix_gate": True, "num_virtual_tokens": 2}, "has a gate"),
    ):
        config = AdapterConfig(**{"method": "prompt", "prompt_init": "random", **more})
        with pytest.raises(UserError, match=text):
            engine.publish("a", random_adapters(model, config, 1), config)
    config = AdapterConfig(method="prompt", prompt_init="random", num_virtual_tokens=3)
    engine.publish("a", random_adapters(model, config, 1), config)
    with pytest.raises(UserError, match="'a' has virtual tokens and no weighted sum"):
        engine.submit(Request([1], 2, adapter={"a": 0.5}))
    with pytest.raises(UserError, match="10 tokens, 3 virtual ones and max_new_tokens=4 are more"):
        engine.submit(Request([1] * 10, 4, adapter="a"))
    assert len(engine.answer([Request([1], 2, adapter="a")])[0].tokens) == 2  # without a bank
