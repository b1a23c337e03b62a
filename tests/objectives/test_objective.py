"""Objectives from Python: preferences, a divergence from the base, and mistakes in their form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import adapters as methods
from lora_jax.errors import UserError
from lora_jax.objectives import (
    Bound,
    Compute,
    Forward,
    negative_log_prob,
    segment_sums,
    supervised_weight,
)
from lora_jax.train.step import make_train_step

from ..train.test_step import KEEP_GRADIENT
from ..train.tiny import distance, make_config, random_adapters, random_batch, tiny_model

BETA = 0.2


def dpo(forward, batch, key):
    """Direct preference optimisation (arXiv 2305.18290): a row holds the chosen answer as segment
    1 and the rejected one as segment 2.
    """
    ours, base = (forward(tree, batch) for tree in (forward.bound, forward.reference))
    gains = segment_sums(ours.log_probs() - base.log_probs(), batch["segment_ids"], 2)
    margin = BETA * (gains[:, 0] - gains[:, 1])
    losses = -jax.nn.log_sigmoid(margin)
    return losses.sum(), len(losses), {"accuracy": (margin > 0).sum()}


def divergence(logits, targets, base):
    """KL(p || base) at every token."""
    log_p, log_base = jax.nn.log_softmax(logits), jax.nn.log_softmax(base)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_base), axis=-1)


def near_the_base(forward, batch, key):
    """Cross-entropy with a penalty on the divergence from the base, in one pass over the logits."""

    def parts(logits, targets, base):
        nll, kl = negative_log_prob(logits, targets), divergence(logits, targets, base)
        return nll + BETA * kl, nll, kl

    ours, base = (forward(tree, batch) for tree in (forward.bound, forward.reference))
    total, nll, kl = ours.sums(parts, base)
    return total, ours.weight, {"loss": nll, "kl": kl}


def settings(*overrides):
    common = ("train.batch_size=4", "train.micro_batch_size=2", "train.remat=none")
    return make_config(
        *common,
        *("train.loss_chunk=10", "adapter.rank=4", "adapter.target_modules=[q_proj, lm_head]"),
        *overrides,
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_hidden_layers=1, tie_word_embeddings=False)


def pairs(seed):
    """Four rows, each with a chosen and a rejected answer of 4 to 6 tokens after a prompt of 2."""
    rng, batch = np.random.default_rng(seed), random_batch(4, 16, seed=seed)
    for row in range(4):
        first, second = rng.integers(4, 7, 2) + 2
        ids = np.r_[np.full(first, 1), np.full(second, 2), np.zeros(16 - first - second)]
        place = np.r_[np.arange(first), np.arange(second), np.zeros(16 - first - second)]
        batch["segment_ids"][row], batch["positions"][row] = ids, place
        batch["loss_weights"][row] = (ids > 0) & (place >= 2)
    return batch


def dense_log_probs(model, params, batch):
    """log softmax at tokens 1 to t - 1 of all logits at once, (b, t - 1, vocab)."""
    inputs = {name: batch[name] for name in ("positions", "segment_ids")}
    return jax.nn.log_softmax(model.apply(params, batch["tokens"], **inputs)[:, :-1])


def pick(log_probs, batch):
    return jnp.take_along_axis(log_probs, batch["tokens"][:, 1:, None], axis=-1)[..., 0]


def dense_dpo(model, config, adapters, batch):
    bound = methods.bind(model.params, adapters, config.adapter)
    ours, base = (pick(dense_log_probs(model, x, batch), batch) for x in (bound, model.params))
    ids, weights = batch["segment_ids"][:, 1:], batch["loss_weights"][:, 1:]
    chosen, rejected = ((((ids == i) * weights) * (ours - base)).sum(1) for i in (1, 2))
    margin = BETA * (chosen - rejected)
    losses = jnp.log1p(jnp.exp(-margin))
    return losses.mean(), {"loss": losses.mean(), "accuracy": (margin > 0).mean()}


def dense_near_the_base(model, config, adapters, batch):
    bound = methods.bind(model.params, adapters, config.adapter)
    ours, base = (dense_log_probs(model, params, batch) for params in (bound, model.params))
    weights = batch["loss_weights"][:, 1:]
    kl = (weights * (jnp.exp(ours) * (ours - base)).sum(-1)).sum() / weights.sum()
    nll = -(weights * pick(ours, batch)).sum() / weights.sum()
    return nll + BETA * kl, {"loss": nll, "kl": kl}


@pytest.mark.parametrize("targets", ["[q_proj, lm_head]", "[q_proj, up_proj]"])
@pytest.mark.parametrize(
    ("objective", "dense"), [(dpo, dense_dpo), (near_the_base, dense_near_the_base)]
)
def test_an_objective_from_python_uses_both_models(model, objective, dense, targets):
    """Values and gradients over micro-batches are those of all logits at once, of a head that
    trains and of one that does not.
    """
    config = settings(f"adapter.target_modules={targets}")
    _, start = methods.init(jax.random.key(0), model.params, config.adapter)
    step = make_train_step(model, config, KEEP_GRADIENT, objective=objective)
    by_hand = jax.jit(jax.value_and_grad(lambda a, b: dense(model, config, a, b), has_aux=True))
    for seed in (0, 1):
        adapters, batch = random_adapters(start, seed), pairs(seed)
        (_, expected), slopes = by_hand(adapters, batch)
        own, state = (jax.tree.map(jnp.copy, adapters) for _ in range(2))
        _, found, metrics = step(own, state, model.params, batch, jax.random.key(0))
        assert metrics.keys() == {*expected, "grad_norm", "supervised_tokens"}
        assert all(distance(metrics[name], value) <= 1e-5 for name, value in expected.items())
        assert distance(found, slopes) <= 1e-5
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slopes)) > 1e-3


def test_without_a_prefix_the_reference_does_not_see_its_places(model):
    """The log-probabilities of a batch for prompt tuning are those of the texts alone."""
    config = make_config("adapter.method=prompt", "adapter.num_virtual_tokens=3").adapter
    _, adapters = methods.init(
        jax.random.key(0), model.params, config, methods.as_model_sees(model, config)
    )
    alone = random_batch(2, 9, weights=(1.0,))
    alone["loss_weights"][:, 0] = 0
    batch = {name: np.pad(x, ((0, 0), (3, 0))) for name, x in alone.items()}
    batch["positions"] = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    batch["segment_ids"] = np.ones((2, 12), np.int32)

    @jax.jit
    def log_probs(adapters, batch, alone):
        bound = Bound(model.params, methods.prefix(adapters, config))
        forward = Forward(model, Compute(), bound, model.params, None, batch)
        values = [forward(x, batch).log_probs() for x in (forward.bound, forward.reference)]
        inputs = {name: alone[name] for name in ("positions", "segment_ids")}
        dense = jax.nn.log_softmax(model.apply(model.params, alone["tokens"], **inputs))
        return *values, jnp.take_along_axis(dense[:, :-1], alone["tokens"][:, 1:, None], -1)[..., 0]

    ours, base, expected = log_probs(adapters, batch, alone)
    assert distance(base[:, 4:], expected) <= 1e-5
    assert distance(ours[:, 4:], expected) > 1e-2
    assert not np.any(base[:, :4])


def trace(model, objective, *overrides):
    """Trace a step, without compiling it."""
    config = settings("adapter.target_modules=[q_proj]", *overrides)
    params, adapters = methods.init(jax.random.key(0), model.params, config.adapter)
    step = make_train_step(model, config, optax.sgd(1.0), objective=objective)
    jax.eval_shape(step, adapters, (), params, random_batch(), jax.random.key(0))


def returns(*result):
    def mine(forward, batch, key):
        return result if len(result) != 1 else result[0]

    return mine


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ((jnp.zeros(()),), r"and returned an array float32\[\]"),
        ((0.0, 1.0), "and returned 2 values"),
        ((None,), "and returned None"),
        ((jnp.zeros(4), 1.0, {}), r"the weighted sum must be .* not an array float32\[4\]"),
        ((0.0, jnp.ones((4, 12)), {}), r"the weight must be .* not an array float32\[4, 12\]"),
        ((0.0, "4", {}), "the weight must be a real scalar, not a str"),
        ((0.0, 1.0, 0.5), "the third is a dict of scalars by name, not a float"),
        ((0.0, 1.0, {"kl": jnp.zeros(2)}), r"the sum 'kl' must be .* float32\[2\]"),
        ((0.0, 1.0, {"grad_norm": 0.0}), "other metrics have the names grad_norm"),
    ],
    ids=str,
)
def test_what_an_objective_must_return(model, result, message):
    with pytest.raises(UserError, match=f"the objective mine must return .*{message}"):
        trace(model, returns(*result))


def test_a_function_of_logits_gives_a_value_per_token(model):
    def summed(logits, targets):
        return negative_log_prob(logits, targets).sum()

    def mine(forward, batch, key):
        (total,) = forward(forward.bound, batch).sums(summed)
        return total, supervised_weight(batch), {}

    with pytest.raises(UserError, match="summed must return a value for each token"):
        trace(model, mine)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.method=full", "adapter.method=full keeps no copy of it"),
        ("adapter.init=pissa", "adapter.init=pissa subtracts its factors from the weights"),
    ],
)
def test_a_reference_that_is_not_kept(model, override, message):
    with pytest.raises(UserError, match=message):
        trace(model, dpo, override, "adapter.target_modules=all-linear")


@pytest.mark.parametrize(
    ("objective", "override", "message"),
    [
        ("dpo", "seed=0", "objective must be a function .forward, batch, key., not a str: 'dpo'"),
        (dpo, "train.label_smoothing=0.1", "train.label_smoothing=0.1: .* the cross-entropy"),
    ],
    ids=["no function", "an option that it does not read"],
)
def test_an_objective_that_cannot_take_the_place_of_the_config(model, objective, override, message):
    with pytest.raises(UserError, match=message):
        trace(model, objective, override)
