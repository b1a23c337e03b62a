"""The gated delta rule in chunks and step by step against its recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.nn import delta
from lora_jax.nn.delta import Delta
from lora_jax.nn.texts import Texts

N, K, V = 2, 5, 3


def draw(rng, time):
    """Keys of length one and moderate decays, some of which forget all before."""
    q, k = (rng.standard_normal((1, time, N, K)) for _ in range(2))
    decay = -np.exp(rng.standard_normal((1, time, N)))
    decay[:, 3::7] *= 60  # not the first, or the state before a text would not matter
    return Delta(
        q=q / np.sqrt(K),
        k=k / np.linalg.norm(k, axis=-1, keepdims=True),
        v=rng.standard_normal((1, time, N, V)),
        decay=decay,
        strength=1 / (1 + np.exp(-rng.standard_normal((1, time, N)))),
    )


def by_hand(inputs):
    """Outputs (t, n, v) of one text, and the last state (n, k, v)."""
    q, k, v, decay, strength = (np.asarray(x, np.float64)[0] for x in inputs)
    state, out = np.zeros((N, K, V)), []
    for t in range(len(q)):
        state = np.exp(decay[t])[:, None, None] * state
        change = strength[t][:, None] * (v[t] - np.einsum("nkv,nk->nv", state, k[t]))
        state = state + k[t][..., None] * change[:, None]
        out.append(np.einsum("nkv,nk->nv", state, q[t]))
    return np.stack(out), state


def narrow(inputs):
    return Delta(*(jnp.asarray(x, jnp.float32) for x in inputs))


def joined(parts):
    return Delta(*(np.concatenate(each, axis=1) for each in zip(*parts, strict=True)))


@pytest.mark.parametrize("size", [4, 64])
def test_texts_of_a_row_begin_anew(monkeypatch, error, size):
    """Texts end inside of chunks, at their ends, and go through several."""
    monkeypatch.setattr(delta, "CHUNK", size)
    rng = np.random.default_rng(size)
    texts = [draw(rng, length) for length in (3, 1, 4, 21, 2, 70)]
    segments = np.concatenate([[i] * x.q.shape[1] for i, x in enumerate(texts, 1)])[None]
    found = np.asarray(delta.whole(narrow(joined(texts)), jnp.asarray(segments)))[0]
    expected = np.concatenate([by_hand(text)[0] for text in texts])
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("size", [4, 64])
def test_gradients_are_those_of_the_recurrence(monkeypatch, error, size):
    monkeypatch.setattr(delta, "CHUNK", size)
    inputs = narrow(draw(np.random.default_rng(1), 11))
    segments = jnp.asarray([[1] * 7 + [2] * 4])
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((1, 11, N, V)), jnp.float32)

    def steps(inputs):
        state, out = jnp.zeros((1, N, K, V)), []
        for t in range(11):
            one = Delta(*(x[:, t : t + 1] for x in inputs))
            begins = jnp.asarray([t in (0, 7)])
            texts = Texts(jnp.full((1, 1), t), segments[:, t : t + 1])
            y, state = delta.advance(one, texts, begins, state)
            out.append(y)
        return jnp.concatenate(out, axis=1)

    ours = jax.jit(jax.grad(lambda x: (delta.whole(x, segments) * weight).sum()))(inputs)
    theirs = jax.jit(jax.grad(lambda x: (steps(x) * weight).sum()))(inputs)
    for name, one, other in zip(Delta._fields, ours, theirs, strict=True):
        assert np.abs(other).max() > 1e-3, name
        assert error(one, other) < 1e-5, name


@pytest.mark.parametrize("parts", [(1,) * 6, (4, 1, 9, 2), (16,)])
def test_parts_of_a_text_go_on_from_its_state(error, parts):
    """Each part has padding on both sides, whose inputs are noise."""
    rng = np.random.default_rng(len(parts))
    text = draw(rng, sum(parts))
    state, found, start = jnp.asarray(rng.standard_normal((1, N, K, V)), jnp.float32), [], 0
    for count in parts:
        left, right = (0, 0) if count == 1 else (2, 3)
        own = Delta(*(x[:, start : start + count] for x in text))
        chunk = narrow(joined([draw(rng, left), own, draw(rng, right)]))
        segments = jnp.asarray([[0] * left + [1] * count + [0] * right])
        begins = jnp.asarray([start == 0])
        y, state = delta.advance(chunk, Texts(segments, segments), begins, state)
        found.append(np.asarray(y)[0, left : left + count])
        start += count
    expected, last = by_hand(text)
    assert error(np.concatenate(found), expected) < 1e-5
    assert error(state[0], last) < 1e-5
