"""Theory of the scale of an adapter, as tests: each fails when the scale rule is broken.

W' = W + s a b,    s = alpha / rank, under rsLoRA alpha / sqrt(rank)
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import adapters as lora
from lora_jax.adapters import low_rank
from lora_jax.config import AdapterConfig, TrainConfig
from lora_jax.targets import Target
from lora_jax.train.optimizer import make_optimizer

SEEDS = (0, 1, 2)
ROWS, COLUMNS = 48, 32


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def weights(seed, flip=False):
    matrix = normal(seed, ROWS, COLUMNS) / ROWS**0.5
    return {"proj": {"kernel": matrix.T if flip else matrix}}


def matrix_of(params, adapters, config):
    return lora.merge(lora.bind(params, adapters, config))["proj"]["kernel"]


def loss_of(matrix, seed):
    """A loss whose gradient changes with the matrix, and which has a transposed twin."""
    target, slope = normal(seed + 10, ROWS, COLUMNS), normal(seed + 20, ROWS, COLUMNS)
    return jnp.sum(slope * matrix) + 0.5 * jnp.sum((matrix - target) ** 2)


def train(config, seed, steps=5, start=None, flip=False, rate=2.0**-7):
    """Return the update W' - W after some steps of AdamW without clipping and epsilon."""
    params = weights(seed, flip)
    params, adapters = lora.init(jax.random.key(seed), params, config)
    adapters = adapters if start is None else start
    settings = TrainConfig(
        steps=steps, learning_rate=rate, schedule="constant", grad_clip=None, epsilon=0.0
    )
    optimizer = make_optimizer(settings, config)
    state = optimizer.init(adapters)

    def loss(adapters):
        matrix = matrix_of(params, adapters, config)
        return loss_of(matrix.T if flip else matrix, seed)

    for _ in range(steps):
        updates, state = optimizer.update(jax.grad(loss)(adapters), state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    a, b = (adapters["proj"][name] for name in ("lora_a", "lora_b"))
    (target,) = lora.find_targets(params, config)
    return np.asarray(a @ (b * target.scales(config.use_rslora)))


def check_adam_invariance(seed):
    """alpha c times as large, with a rate of lora_b c times smaller, trains the same: b / c takes
    the place of b, its gradient is c times as large, and Adam divides by it.
    """
    one = train(AdapterConfig(rank=4, alpha=8, lora_plus_ratio=4), seed)
    other = train(AdapterConfig(rank=4, alpha=32, lora_plus_ratio=1), seed)
    np.testing.assert_array_equal(one, other)
    assert np.abs(one).max() > 0


def check_lora_plus(seed):
    """LoRA+ is another alpha: its ratio moves from the rate of lora_b to the scale."""
    for ratio in (2.0, 16.0):
        plus = train(AdapterConfig(rank=4, alpha=4, lora_plus_ratio=ratio), seed)
        plain = train(AdapterConfig(rank=4, alpha=4 * ratio), seed)
        np.testing.assert_array_equal(plus, plain)


def first_move(rank, seed, use_rslora):
    """Return the distance of the first update down the gradient."""
    config = AdapterConfig(rank=rank, alpha=16, use_rslora=use_rslora)
    gradient = jax.grad(loss_of)(weights(seed)["proj"]["kernel"], seed)
    return float(-np.sum(train(config, seed, steps=1) * np.asarray(gradient)))


def check_first_update(seed):
    """Columns of lora_a are alike, and Adam moves each row of lora_b by the rate: their sum over
    the rank is divided by it. Under alpha / sqrt(rank), the root of the rank remains.
    """
    small, large = (first_move(rank, seed, False) for rank in (4, 16))
    assert small > 0 and abs(large / small - 1) < 0.25
    small, large = (first_move(rank, seed, True) for rank in (4, 16))
    assert abs(large / small - 2) < 0.5


def check_no_op_starts(seed):
    """Training begins at the base, whatever the start."""
    params = weights(seed)
    for init in ("default", "gaussian", "zero_a", "orthogonal", "pissa", "olora"):
        config = AdapterConfig(rank=4, alpha=32, init=init)
        base, adapters = lora.init(jax.random.key(seed), params, config)
        found = matrix_of(base, adapters, config)
        np.testing.assert_allclose(found, params["proj"]["kernel"], atol=2e-6)


def check_swapped_factors(seed):
    """LoRA does not know which factor is which: b^T and a^T train the transposed matrix alike."""
    config = AdapterConfig(rank=4, alpha=16)
    a, b = normal(seed + 30, ROWS, 4), normal(seed + 40, 4, COLUMNS)
    one = train(config, seed, start={"proj": {"lora_a": a, "lora_b": b}})
    other = train(config, seed, start={"proj": {"lora_a": b.T, "lora_b": a.T}}, flip=True)
    np.testing.assert_allclose(one, other.T, atol=1e-4)


CHECKS = {
    check_adam_invariance: lambda target: 1 / target.rank,
    check_lora_plus: lambda target: target.alphas[0] ** 2 / target.rank,
    check_first_update: lambda target: target.alphas[0],
    check_swapped_factors: lambda target: target.alphas[0] / target.shape[0],
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("check", [*CHECKS, check_no_op_starts], ids=lambda one: one.__name__)
def test_theory(check, seed):
    check(seed)


@pytest.mark.parametrize("check", CHECKS, ids=lambda one: one.__name__)
def test_a_broken_scale_rule_is_seen(check, monkeypatch):
    rule = CHECKS[check]
    monkeypatch.setattr(Target, "scales", lambda self, use_rslora: np.float32(rule(self)))
    with pytest.raises(AssertionError):
        check(0)


def test_a_start_with_another_scale_is_seen(monkeypatch):
    def unscaled(target, small, found):
        return tuple(small[(*target.path, name)] for name in ("lora_a", "lora_b"))

    monkeypatch.setattr(low_rank, "factors", unscaled)
    with pytest.raises(AssertionError):
        check_no_op_starts(0)
