"""Short causal convolutions along a text, feature by feature (arXiv 2302.10866).

    y[t] = sum over j of taps[k - 1 - j] * x[t - j],   0 <= j < k

Of tokens before its text a token sees zeros. With a cache, the state of a layer are the last k - 1
inputs of its text.

Shape letters: b batch, t time, d features, k taps.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.nn.cache import LayerState
from lora_jax.nn.texts import Texts


class ShortConv(nnx.Module):
    """A convolution over the last k tokens, with a filter for each feature."""

    def __init__(self, features: int, taps: int, *, use_bias: bool = False, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.taps = nnx.Param(normal(rngs.params(), (features, 1, taps)))
        self.bias = nnx.Param(jnp.zeros(features)) if use_bias else None

    def __call__(self, x: jax.Array, texts: Texts) -> jax.Array:
        """Return the output (b, t, d) for all tokens of texts."""
        taps = self.taps.get_value()[:, 0].astype(x.dtype)
        return self._biased(_whole(x, taps, texts.segment_ids))

    def advance(self, x: jax.Array, texts: Texts, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the output (b, t, d) for the next tokens of one text per row, which may have
        padding on either side, and the last inputs (b, k - 1, d) of each; `last` are those before.
        """
        taps = self.taps.get_value()[:, 0].astype(x.dtype)
        y, last = _advanced(x, taps, texts, last.astype(x.dtype))
        return self._biased(y), last

    def _biased(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


def convolve(
    conv: ShortConv, x: jax.Array, texts: Texts, cached: LayerState | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return the output (b, t, d), and the new states of a cache whose first state is that of the
    convolution: none without a cache.
    """
    if cached is None:
        return conv(x, texts), ()
    last, *_ = cached.read()
    y, last = conv.advance(x, texts, last)
    return y, (last,)


def starts(texts: Texts) -> jax.Array:
    """Return True (b,) for rows in which a text begins."""
    return jnp.any((texts.segment_ids != 0) & (texts.positions == 0), axis=1)


def _whole(x: jax.Array, taps: jax.Array, segment_ids: jax.Array) -> jax.Array:
    time, count = x.shape[1], taps.shape[1]
    y = x * taps[:, -1]
    for back in range(1, min(count, time)):
        same = segment_ids[:, back:] == segment_ids[:, :-back]
        earlier = jnp.where(same[..., None], x[:, :-back], 0)
        y += jnp.pad(earlier, ((0, 0), (back, 0), (0, 0))) * taps[:, count - 1 - back]
    return y


def _advanced(
    x: jax.Array, taps: jax.Array, texts: Texts, last: jax.Array
) -> tuple[jax.Array, jax.Array]:
    real, (time, count) = texts.segment_ids != 0, (x.shape[1], taps.shape[1])
    last = jnp.where(starts(texts)[:, None, None], 0, last)
    shift, own = jnp.argmax(real, axis=1)[:, None], jnp.arange(time)
    x = _rows(x, (own + shift) % time)  # real tokens first
    inputs = jnp.concatenate([last, x], axis=1)
    y = sum(inputs[:, i : i + time] * taps[:, i] for i in range(count))
    kept = real.sum(axis=1)[:, None] + jnp.arange(count - 1)
    return _rows(jnp.asarray(y), (own - shift) % time), _rows(inputs, kept)


def _rows(x: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, indices[..., None], axis=1)
