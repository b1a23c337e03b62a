"""The leaf types: what each function computes on each of them, against the plain matrix they stand
for.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterConfig, lora
from lora_jax.generate.form import separate
from lora_jax.weights import LoraWeight, embed, linear, materialize, unembed, widen

ROWS, IN, RANK, OUT = 5, 7, 3, 4


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def lora_weight(seed=0, *, lead=(), gain=False, **fields) -> LoraWeight:
    return LoraWeight(
        normal(seed, *lead, IN, OUT),
        normal(seed + 1, *lead, IN, RANK),
        normal(seed + 2, *lead, RANK, OUT),
        1 + 0.5 * normal(seed + 3, *lead, 1, OUT) if gain else None,
        **fields,
    )


def dense(w: LoraWeight) -> np.ndarray:
    base, a, b = (np.asarray(x, np.float64) for x in (w.base, w.a, w.b))
    return (base + a @ b) * (1.0 if w.gain is None else np.asarray(w.gain, np.float64))


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("seed", [0, 10])
def test_linear_is_gain_times_base_plus_low_rank(error, seed, gain):
    w, x = lora_weight(seed, gain=gain), normal(seed + 4, 2, ROWS, IN)
    expected = np.asarray(x, np.float64) @ dense(w)
    assert error(linear(x, w), expected) < 1e-5
    assert error(linear(x, materialize(w)), expected) < 1e-5
    assert error(materialize(w), dense(w)) < 1e-6
    assert error(linear(x, w.base), expected) > 1e-1
    assert error(linear(x[0, 0], w), expected[0, 0]) < 1e-5  # no leading axes at all


def test_gradients_equal_those_of_the_plain_matrix(error):
    w, x, y = lora_weight(gain=True), normal(4, ROWS, IN), normal(5, ROWS, OUT)

    def loss(w, x, product):
        return ((product(x, w) - y) ** 2).sum()

    factored = jax.grad(loss, (0, 1))(w, x, linear)
    plain = jax.grad(loss, (0, 1))(w, x, lambda x, w: x @ ((w.base + w.a @ w.b) * w.gain))
    for ours, expected in zip(jax.tree.leaves(factored), jax.tree.leaves(plain), strict=True):
        assert np.abs(expected).max() > 0.1
        assert error(ours, expected) < 1e-5


def test_linear_computes_in_the_dtype_of_its_input():
    w = lora_weight(gain=True)
    assert linear(normal(4, ROWS, IN).astype(jnp.bfloat16), w).dtype == jnp.bfloat16
    half = LoraWeight(w.base.astype(jnp.bfloat16), w.a, w.b)
    assert linear(normal(4, ROWS, IN), half).dtype == jnp.float32
    assert materialize(half).dtype == jnp.bfloat16


def test_embed_and_unembed(error):
    w, ids = lora_weight(), jnp.array([[0, 3, 6], [6, 1, 1]])  # vocabulary IN, width OUT
    x = normal(4, 2, ROWS, OUT)
    for leaf, matrix in ((w, dense(w)), (w.base, np.asarray(w.base))):
        assert error(embed(ids, leaf), matrix[ids]) < 1e-6
        assert error(unembed(x, leaf), np.asarray(x) @ matrix.T) < 1e-5
    assert embed(ids, w.base.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert unembed(x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16
    assert unembed(x[0, 0], w).shape == (IN,)


def test_materialize_adds_in_float32_and_rounds_once():
    w = lora_weight()
    half = LoraWeight(w.base.astype(jnp.bfloat16), w.a, w.b)
    wide = np.asarray(half.base, np.float32) + np.asarray(w.a, np.float64) @ np.asarray(w.b)
    np.testing.assert_array_equal(materialize(half), wide.astype(np.float32).astype(jnp.bfloat16))
    small = LoraWeight(jnp.ones((1, 1), jnp.bfloat16), jnp.full((1, 2), 2.0**-9), jnp.ones((2, 1)))
    assert materialize(small)[0, 0] == 1 + 2.0**-8 or materialize(small)[0, 0] == 1
    above = LoraWeight(small.base, jnp.full((1, 2), 2.0**-9 + 2.0**-12), small.b)
    assert materialize(above)[0, 0] == 1 + 2.0**-7  # each half alone would round back to 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_update_of_zero_keeps_every_bit(dtype):
    base = jnp.array([[-0.0, 0.0, 1.5, -2.0]], dtype)
    w = LoraWeight(base, jnp.ones((1, 2)), jnp.zeros((2, 4)))
    assert np.asarray(materialize(w)).tobytes() == np.asarray(base).tobytes()
    moved = LoraWeight(base, w.a, w.b.at[0, 0].set(1.0))
    np.testing.assert_array_equal(np.asarray(materialize(moved), np.float32), [[1, 0, 1.5, -2]])


def test_stacked_leaves_are_sliced_by_a_scan(error):
    w = lora_weight(lead=(3,), gain=True)
    x = normal(4, ROWS, IN)
    _, y = jax.lax.scan(lambda carry, layer: (carry, linear(x, layer)), None, w)
    assert error(y, np.asarray(x, np.float64)[None] @ dense(w)) < 1e-5
    assert error(materialize(w), dense(w)) < 1e-6


def test_dropout_acts_on_the_input_of_a_alone(error):
    rate, w, x = 0.4, lora_weight(), jnp.ones((4000, IN))
    noisy = LoraWeight(w.base, w.a, w.b, key=jax.random.key(3), dropout=rate)
    y = np.asarray(linear(x, noisy), np.float64)
    low_rank = y - np.asarray(x @ w.base, np.float64)
    clean = np.asarray(x @ w.a @ w.b, np.float64)
    assert error(low_rank.mean(axis=0), clean.mean(axis=0)) < 0.1  # unbiased
    rows = len({tuple(row) for row in low_rank.round(4)})
    assert 100 < rows <= 2**IN  # every row drops some of its IN inputs, scaled by 1 / (1 - rate)
    kept = np.array(np.meshgrid(*[[0, 1]] * IN)).reshape(IN, -1).T / (1 - rate)
    possible = kept @ np.asarray(w.a, np.float64) @ np.asarray(w.b, np.float64)
    distances = np.abs(low_rank[:200, None] - possible[None]).max(axis=-1).min(axis=1)
    assert distances.max() < 1e-4
    np.testing.assert_array_equal(linear(x, noisy), linear(x, noisy))
    other = LoraWeight(w.base, w.a, w.b, key=jax.random.key(4), dropout=rate)
    assert error(linear(x, other), linear(x, noisy)) > 1e-2


@pytest.mark.parametrize("fields", [dict(dropout=0.4), dict(key=jax.random.key(0), dropout=0.0)])
def test_no_dropout_without_a_key_or_a_rate(fields):
    w, x = lora_weight(), normal(4, ROWS, IN)
    np.testing.assert_array_equal(linear(x, lora_weight(**fields)), linear(x, w))


def test_materialize_ignores_dropout():
    w = lora_weight()
    noisy = LoraWeight(w.base, w.a, w.b, key=jax.random.key(3), dropout=0.5)
    np.testing.assert_array_equal(materialize(noisy), materialize(w))


def small_tree():
    return {
        "model": {
            "layers": {
                "up_proj": {"kernel": normal(0, 2, IN, OUT)},
                "down_proj": {"kernel": normal(1, 2, OUT, IN)},
            }
        }
    }


def test_bind_gives_every_weight_and_layer_its_own_dropout():
    config = AdapterConfig(rank=2, dropout=0.5)
    params, adapters = lora.init(jax.random.key(0), small_tree(), config)
    keys = []
    for seed in (0, 1):
        layers = lora.bind(params, adapters, config, jax.random.key(seed))["model"]["layers"]
        for name in ("up_proj", "down_proj"):
            leaf = layers[name]["kernel"]
            assert leaf.dropout == 0.5
            keys += [tuple(row) for row in np.asarray(jax.random.key_data(leaf.key))]
    assert len(set(keys)) == len(keys) == 8
    evaluation = lora.bind(params, adapters, config)["model"]["layers"]["up_proj"]["kernel"]
    assert evaluation.key is None


def test_merge_equals_the_bound_tree_and_leaves_the_rest_alone(error):
    config = AdapterConfig(rank=2, alpha=6.0, target_modules=["up_proj"])
    params, adapters = lora.init(jax.random.key(0), small_tree(), config)
    up = adapters["model"]["layers"]["up_proj"]
    up["lora_b"] = normal(7, 2, 2, OUT)
    merged = lora.merge(lora.bind(params, adapters, config))["model"]["layers"]
    base = params["model"]["layers"]
    assert merged["down_proj"]["kernel"] is base["down_proj"]["kernel"]
    expected = np.asarray(base["up_proj"]["kernel"]) + 3.0 * np.asarray(up["lora_a"] @ up["lora_b"])
    assert error(merged["up_proj"]["kernel"], expected) < 1e-6


def test_modules_that_know_nothing_of_it_work(error):
    """Through `materialize`, and, where a module takes anything that passes for an array,
    directly.
    """
    w, x, bias = lora_weight(gain=True), normal(4, ROWS, IN), normal(5, OUT)
    expected = np.asarray(x, np.float64) @ dense(w) + np.asarray(bias)
    module = nn.Dense(OUT)
    for kernel in (materialize(w), w):
        variables = {"params": {"kernel": kernel, "bias": bias}}
        assert error(jax.jit(module.apply)(variables, x), expected) < 1e-5


def test_it_passes_for_an_array():
    w = lora_weight(lead=(2,))
    assert (w.shape, w.ndim, w.dtype) == ((2, IN, OUT), 3, jnp.float32)
    np.testing.assert_array_equal(w[1], materialize(w)[1])
    np.testing.assert_array_equal(jnp.asarray(w), materialize(w))


def test_separate_layers_may_take_over_the_stack():
    """Arrays of NumPy, as read from files, are copied to the device first."""
    base = jnp.arange(24.0).reshape(2, 3, 4)
    a, b = np.ones((2, 3, 1), np.float32), np.full((2, 1, 4), 2.0, np.float32)
    norm = jnp.ones(4)
    head = jnp.arange(8.0).reshape(4, 2)
    untouched, experts = np.array(head), jnp.ones((2, 3, 4))
    params = {
        "layers": {"proj": {"kernel": LoraWeight(base, a, b)}},
        "norm": {"scale": norm},
        "head": {"kernel": head},
        "experts": {"kernel": experts},
    }
    expected = [np.asarray(base[i] + a[i] @ b[i]) for i in range(2)]
    kept = separate(params)
    assert not base.is_deleted()
    taken = separate(params, donate=True)
    assert base.is_deleted() and head.is_deleted()
    assert not norm.is_deleted() and not experts.is_deleted()
    x = jnp.arange(6.0).reshape(2, 3)
    for tree in (kept, taken):
        leaf = tree["layers"]["proj"]["kernel"]
        assert (leaf.shape, leaf.ndim, leaf.dtype) == ((2, 3, 4), 3, jnp.float32)
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(tree))
        for layer, whole in zip(leaf.layers, expected, strict=True):
            assert layer.base.value.shape == (4, 3)
            assert np.array_equal(materialize(layer), whole)
            np.testing.assert_allclose(linear(x, layer), x @ whole, rtol=1e-6)
        own = tree["head"]["kernel"]
        assert (own.shape, own.ndim, own.dtype, own.value.shape) == ((4, 2), 2, jnp.float32, (2, 4))
        assert np.array_equal(materialize(own), untouched)
        assert widen(own).shape == (4, 2)
    assert separate(kept)["layers"]["proj"]["kernel"] is kept["layers"]["proj"]["kernel"]
