"""Norms of DoRA: those of the dense matrix, finite, and constants of the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterConfig, lora
from lora_jax.adapters import dora
from lora_jax.adapters import low_rank as low_rank
from lora_jax.quantize import SCHEMES, dequantize, quantize
from lora_jax.targets import find_trainable

from ..methods import stirred
from ..test_methods import SEEDS, kernel_of, toy


def dense_norms(weight, a, b):
    return np.linalg.norm(
        np.asarray(weight, np.float64) + np.asarray(a, np.float64) @ np.asarray(b, np.float64),
        axis=-2,
    )


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", *SCHEMES])
def test_norms_are_those_of_the_dense_matrix(kind, size):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape = (3, 200, 72)
        kernel = jnp.asarray(rng.standard_normal(shape) * 200**-0.5, jnp.float32)
        weight = quantize(kernel, kind) if kind in SCHEMES else kernel.astype(kind)
        params = {"model": {"layers": {"q_proj": {"kernel": weight}}}}
        config = AdapterConfig(rank=5, rank_pattern={r"0\.q_proj": 2})
        (target,) = find_trainable(params, config).targets
        a = jnp.asarray(rng.standard_normal((3, 200, 5)) * target.rank_mask(), jnp.float32)
        b = jnp.asarray(size * rng.standard_normal((3, 5, 72)), jnp.float32)
        wide = dequantize(weight) if kind in SCHEMES else weight.astype(jnp.float32)
        expected = dense_norms(wide, a, b)
        norms = np.asarray(dora.column_norms(target, weight, a, b))
        assert norms.dtype == np.float32
        assert np.max(np.abs(norms - expected) / expected) <= 1e-5


def test_columns_of_zeros_and_columns_that_vanish_stay_finite():
    """Their direction is not defined: they stay zero, and no gradient is spoiled."""
    params = toy(2, 12, 9)
    kernel = params["model"]["layers"]["q_proj"]["kernel"].at[:, :, 4].set(0.0)
    kernel = kernel.at[:, :, 5].set(jnp.arange(12) / 8)
    params["model"]["layers"]["q_proj"]["kernel"] = kernel
    config = AdapterConfig(rank=2, alpha=2.0, use_dora=True)
    _, adapters = lora.init(jax.random.key(0), params, config)
    own = adapters["model"]["layers"]["q_proj"]
    # The update takes column 5 away exactly.
    own["lora_a"] = own["lora_a"].at[:, :, 0].set(jnp.arange(12) / 8)
    own["lora_b"] = own["lora_b"].at[:, 0, 5].set(-1.0)

    def total(adapters):
        return jnp.sum(kernel_of(lora.bind(params, adapters, config)) ** 2)

    merged = kernel_of(lora.bind(params, adapters, config))
    assert np.isfinite(merged).all() and not np.any(merged[:, :, 4:6])
    gradients = jax.tree.leaves(jax.grad(total)(adapters))
    assert all(np.isfinite(leaf).all() for leaf in gradients)
    norms = np.linalg.norm(np.asarray(merged), axis=1)
    others = [0, 1, 2, 3, 6, 7, 8]
    np.testing.assert_allclose(norms[:, others], own["magnitude"][:, others], rtol=1e-5)


def test_dora_trains_its_direction_with_the_norm_held_constant(error):
    """Section 4.3 of the paper: d(m V / c) = m / c dV."""
    params = toy(2, 12, 9)
    config = AdapterConfig(rank=2, alpha=6.0, use_dora=True)
    _, adapters = lora.init(jax.random.key(0), params, config)
    adapters = stirred(params, adapters, config, 0, 0.5)
    target = jnp.asarray(np.random.default_rng(2).standard_normal((2, 12, 9)), jnp.float32)

    def ours(adapters):
        return jnp.sum(kernel_of(lora.bind(params, adapters, config)) * target)

    weight = params["model"]["layers"]["q_proj"]["kernel"]
    own = adapters["model"]["layers"]["q_proj"]
    constant = jnp.linalg.norm(weight + own["lora_a"] @ (3.0 * own["lora_b"]), axis=1)

    def by_hand(own):
        moved = weight + own["lora_a"] @ (3.0 * own["lora_b"])
        return jnp.sum(own["magnitude"][:, None] * moved / constant[:, None] * target)

    found = jax.grad(ours)(adapters)["model"]["layers"]["q_proj"]
    for name, gradient in jax.grad(by_hand)(own).items():
        assert np.abs(gradient).max() > 0.1
        assert error(found[name], gradient) <= 1e-5, name
