"""Leaves that are not plain or adapted kernels: quantised, untied, with a gain per feature or per
token, and what `materialize` promises of bits and gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.quantize import SCHEMES, dequantize, quantize
from lora_jax.weights import Absent, LoraWeight, Untied, embed, linear, materialize, unembed

ROWS, IN, RANK, OUT = 5, 70, 3, 6
VOCAB, D = 11, 7


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def wide(x):
    return np.asarray(x, np.float64)


def over(base, seed=1, *, gain=None):
    a, b = normal(seed, *base.shape[:-1], RANK), normal(seed + 1, RANK, base.shape[-1])
    return LoraWeight(base, a, b, gain)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", [0, 10])
def test_adapters_over_a_quantised_base_stand_on_what_it_stands_for(scheme, seed, error):
    base = quantize(normal(seed, IN, OUT), scheme)
    gain = 1 + 0.3 * normal(seed + 3, 1, OUT)
    x = normal(seed + 4, 2, ROWS, IN)
    expected = (wide(dequantize(base)) + wide(over(base).a) @ wide(over(base).b)) * wide(gain)
    assert error(linear(x, over(base, gain=gain)), wide(x) @ expected) <= 1e-5
    assert error(materialize(over(base, gain=gain)), expected) <= 1e-6
    assert error(linear(x, base), wide(x) @ wide(dequantize(base))) <= 1e-5
    np.testing.assert_array_equal(materialize(base), dequantize(base))
    assert over(base).shape == (IN, OUT) and over(base).ndim == 2
    assert over(base).dtype == jnp.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_a_quantised_base(scheme, error):
    """To the input and to the adapters, as from the plain matrix; the base has none."""
    base = quantize(normal(0, IN, OUT), scheme)
    plain, x = dequantize(base), normal(4, ROWS, IN)

    def loss(parts, x, base):
        return jnp.sum(jnp.sin(linear(x, LoraWeight(base, *parts))))

    parts = (0.3 * normal(1, IN, RANK), 0.3 * normal(2, RANK, OUT))
    found, expected = (jax.grad(loss, (0, 1))(parts, x, leaf) for leaf in (base, plain))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(theirs).max() > 0.1
        assert error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stacks_of_quantised_leaves_are_sliced_by_a_scan(scheme, error):
    base, x = quantize(normal(0, 3, IN, OUT), scheme), normal(4, ROWS, IN)
    w = LoraWeight(base, normal(1, 3, IN, RANK), normal(2, 3, RANK, OUT))
    _, y = jax.lax.scan(lambda carry, layer: (carry, linear(x, layer)), None, w)
    assert error(y, wide(x)[None] @ wide(materialize(w))) <= 1e-5


@pytest.mark.parametrize("axis", [-1, -2], ids=["of features", "of tokens"])
def test_gain_of_an_embedding(axis, error):
    """Over features where the embedding is adapted, over tokens where the head is, turned round."""
    shape = (1, D) if axis == -1 else (VOCAB, 1)
    w = over(normal(0, VOCAB, D), gain=1 + 0.3 * normal(3, *shape))
    dense = (wide(w.base) + wide(w.a) @ wide(w.b)) * wide(w.gain)
    ids, x = jnp.array([[0, 10, 3], [3, 7, 7]]), normal(4, 2, ROWS, D)
    assert error(materialize(w), dense) <= 1e-6
    assert error(embed(ids, w), dense[ids]) <= 1e-6
    assert error(unembed(x, w), wide(x) @ dense.T) <= 1e-5
    assert error(unembed(x[0, 0], w), wide(x[0, 0]) @ dense.T) <= 1e-5
    bare = LoraWeight(w.base, w.a, w.b)
    assert error(embed(ids, bare), dense[ids]) > 0.1 < error(unembed(x, bare), wide(x) @ dense.T)


def test_untied_uses_one_side_for_tokens_and_the_other_for_logits(error):
    base = normal(0, VOCAB, D)
    ids, x = jnp.array([[0, 10, 3]]), normal(4, ROWS, D)
    for leaf in (Untied(over(base), base), Untied(base, over(base)), Untied(base, 2 * base)):
        np.testing.assert_array_equal(embed(ids, leaf), embed(ids, leaf.embed))
        np.testing.assert_array_equal(unembed(x, leaf), unembed(x, leaf.head))
        merged = materialize(leaf)
        assert isinstance(merged, Untied)
        assert error(embed(ids, merged), embed(ids, leaf)) <= 1e-6
        assert error(unembed(x, merged), unembed(x, leaf)) <= 1e-5
        assert (leaf.shape, leaf.ndim, leaf.dtype) == ((VOCAB, D), 2, jnp.float32)
        assert error(wide(merged.embed), wide(merged.head)) > 0.1
        through = jax.jit(lambda leaf: leaf)(leaf)
        jax.tree.map(np.testing.assert_array_equal, through, leaf)


def test_an_adapted_embedding_is_looked_up_in_float32():
    base = normal(0, VOCAB, D).astype(jnp.bfloat16)
    ids = jnp.array([1, 2])
    assert embed(ids, base).dtype == jnp.bfloat16
    assert embed(ids, over(base)).dtype == jnp.float32
    assert embed(ids, Untied(over(base), base)).dtype == jnp.float32
    assert unembed(normal(1, 2, D).astype(jnp.bfloat16), over(base)).dtype == jnp.bfloat16


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_materialize_of_a_fresh_adapter_has_its_gradient_and_every_bit_of_the_base(scheme, error):
    """Modules that know nothing of adapters train through it, from the very first step."""
    base = normal(0, IN, OUT).at[0, 0].set(-0.0).at[1, 0].set(0.0)
    base = base if scheme is None else quantize(base, scheme)
    x, nothing = normal(4, ROWS, IN), jnp.zeros((RANK, OUT))
    drawn = normal(1, IN, RANK), normal(2, RANK, OUT)
    for a, b in ((drawn[0], nothing), (drawn[0], -nothing), (jnp.zeros((IN, RANK)), drawn[1])):
        for call in (materialize, jax.jit(materialize)):
            merged = call(LoraWeight(base, a, b))
            expected = base if scheme is None else dequantize(base)
            assert np.asarray(merged).tobytes() == np.asarray(expected).tobytes()

        def loss(parts, product):
            return jnp.sum(jnp.sin(product(x, LoraWeight(base, *parts))))

        factored = jax.grad(loss)((a, b), linear)
        dense = jax.grad(loss)((a, b), lambda x, w: x @ materialize(w))
        assert max(float(jnp.abs(g).max()) for g in factored) > 0.1
        for ours, theirs in zip(dense, factored, strict=True):
            assert error(ours, theirs) <= 1e-5


def test_a_gain_alone_moves_what_is_materialised(error):
    """DoRA with a zero update still scales, and its gradient reaches the gain."""
    base = normal(0, IN, OUT)
    w = LoraWeight(base, normal(1, IN, RANK), jnp.zeros((RANK, OUT)), 2 * jnp.ones((1, OUT)))
    np.testing.assert_array_equal(materialize(w), 2 * base)
    slope = jax.grad(lambda gain: jnp.sum(materialize(LoraWeight(base, w.a, w.b, gain))))(w.gain)
    assert error(slope[0], wide(base).sum(axis=0)) <= 1e-5


def test_leaves_are_pytrees_whose_forms_are_told_apart():
    base = normal(0, IN, OUT)
    leaves = [
        base,
        over(base),
        over(base, gain=jnp.ones((1, OUT))),
        Untied(base, base),
        Untied(over(base), base),
        Absent((IN, OUT), jnp.dtype("float32")),
        Absent((OUT, IN), jnp.dtype("float32")),
        *(quantize(base, scheme) for scheme in SCHEMES),
    ]
    forms = [jax.tree.structure(leaf) for leaf in leaves]
    assert len(set(forms)) == len(leaves)
    for leaf in leaves:
        again = jax.tree.map(lambda x: x, leaf)
        assert jax.tree.structure(again) == jax.tree.structure(leaf)


def test_linear_over_a_quantised_base_keeps_no_matrix_for_the_backward_pass():
    """What the forward pass hands to the backward one has codes, inputs and adapters in it, and
    never the dequantised matrix.
    """
    for scheme in SCHEMES:
        w = over(quantize(normal(0, IN, OUT), scheme))
        _, pull = jax.vjp(functools.partial(linear, w=w), normal(4, ROWS, IN))
        shapes = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32]
        assert (IN, OUT) not in shapes
    _, pull = jax.vjp(functools.partial(linear, w=normal(0, IN, OUT)), normal(4, ROWS, IN))
    assert (IN, OUT) in [leaf.shape for leaf in jax.tree.leaves(pull)]
