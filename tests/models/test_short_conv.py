"""The short convolution against a loop over tokens, whole and in parts."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.nn.short_conv import ShortConv
from lora_jax.nn.texts import Texts

D, TAPS = 5, 4


def make_conv(seed):
    conv = ShortConv(D, TAPS, use_bias=True, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(seed)
    conv.taps.set_value(jnp.asarray(rng.standard_normal((D, 1, TAPS)), jnp.float32))
    conv.bias.set_value(jnp.asarray(rng.standard_normal(D), jnp.float32))
    return conv


def by_hand(conv, text):
    """Output (t, d) for a text (t, d)."""
    taps, bias = np.asarray(conv.taps.get_value())[:, 0], np.asarray(conv.bias.get_value())
    padded = np.concatenate([np.zeros((TAPS - 1, D)), text])
    return np.stack([(padded[t : t + TAPS] * taps.T).sum(0) + bias for t in range(len(text))])


def test_texts_of_a_row_begin_with_zeros(error):
    conv, rng = make_conv(0), np.random.default_rng(1)
    x = rng.standard_normal((2, 14, D)).astype(np.float32)
    segments = np.array([[1] * 6 + [2] * 2 + [3] * 5 + [0], [0] * 3 + [7] * 11], np.int32)
    found = np.asarray(conv(jnp.asarray(x), Texts(jnp.zeros((2, 14)), jnp.asarray(segments))))
    for row, start, end in [(0, 0, 6), (0, 6, 8), (0, 8, 13), (1, 3, 14)]:
        assert error(found[row, start:end], by_hand(conv, x[row, start:end])) < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_parts_with_padding_on_either_side_go_on_where_the_text_was(error, seed):
    """Three rows, in chunks that have any number of tokens of each, none among them."""
    conv, rng = make_conv(seed), np.random.default_rng(seed)
    texts = [rng.standard_normal((n, D)).astype(np.float32) for n in (9, 4, 13)]
    read, found = [0, 0, 0], [[], [], []]
    last = jnp.asarray(rng.standard_normal((3, TAPS - 1, D)), jnp.float32)  # of former texts
    while any(start < len(text) for start, text in zip(read, texts, strict=True)):
        time = int(rng.integers(1, 6))
        x = rng.standard_normal((3, time, D)).astype(np.float32)
        segments, positions = np.zeros((3, time), np.int32), np.zeros((3, time), np.int32)
        places = []
        for row, text in enumerate(texts):
            count = min(int(rng.integers(0, time + 1)), len(text) - read[row])
            first = int(rng.integers(0, time - count + 1))
            own = slice(first, first + count)
            x[row, own] = text[read[row] : read[row] + count]
            segments[row, own] = 1
            positions[row, own] = np.arange(read[row], read[row] + count)
            read[row] += count
            places.append(own)
        batch = Texts(jnp.asarray(positions), jnp.asarray(segments))
        y, last = conv.advance(jnp.asarray(x), batch, last)
        for row, own in enumerate(places):
            found[row].append(np.asarray(y)[row, own])
    for text, parts in zip(texts, found, strict=True):
        assert error(np.concatenate(parts), by_hand(conv, text)) < 1e-6
