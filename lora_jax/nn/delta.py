"""The gated delta rule (arXiv 2412.06464): a matrix S per head that every token corrects.

    S = exp(g) S + k (b (v - exp(g) S k))^T        o = S^T q

`g` <= 0 is the log of the decay and `b` the strength of a correction, both one number per token and
head. `whole` computes all tokens of texts in chunks: inside one, the corrections are the solution
of a triangular system (arXiv 2406.06484), and S goes from chunk to chunk. `advance` goes on from a
state. All of it is in float32; decays are summed as logs.

A token with b = 0 and g = 0 leaves S as it is, which is how padding is left out.

Shape letters: b batch, t time, n heads, k key size, v value size, c tokens of a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.nn.texts import Texts

CHUNK = 64
_EXACT = jax.lax.Precision.HIGHEST


class Delta(NamedTuple):
    """Inputs of the rule."""

    q: jax.Array  # (b, t, n, k)
    k: jax.Array  # (b, t, n, k)
    v: jax.Array  # (b, t, n, v)
    decay: jax.Array  # (b, t, n), logs
    strength: jax.Array  # (b, t, n)


def unit(x: jax.Array) -> jax.Array:
    """Return x / |x| over the last axis in float32, with an epsilon inside of the root."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)


def whole(inputs: Delta, segment_ids: jax.Array) -> jax.Array:
    """Return o (b, t, n, v) for texts by their `segment_ids` (b, t); each begins with S = 0."""
    batch, _, heads, keys = inputs.k.shape
    state = jnp.zeros((batch, heads, keys, inputs.v.shape[-1]), jnp.float32)
    return _chunks(inputs, segment_ids, state)[0]


def advance(
    inputs: Delta, texts: Texts, begins: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return o (b, t, n, v) for the next tokens of one text per row, and S (b, n, k, v) after them.
    `state` is that before; rows that `begins` (b,) marks begin with S = 0.
    """
    state = jnp.where(begins[:, None, None, None], 0, state)
    real = (texts.segment_ids != 0)[..., None]
    inputs = inputs._replace(
        decay=jnp.where(real, inputs.decay, 0), strength=jnp.where(real, inputs.strength, 0)
    )
    if inputs.k.shape[1] == 1:
        return _step(inputs, state)
    return _chunks(inputs, jnp.ones_like(texts.segment_ids), state)


def _step(inputs: Delta, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, k, v, decay, strength = (x[:, 0].astype(jnp.float32) for x in inputs)
    state = state * jnp.exp(decay)[..., None, None]
    known = jnp.einsum("bnkv,bnk->bnv", state, k, precision=_EXACT)
    change = (v - known) * strength[..., None]
    state = state + k[..., None] * change[..., None, :]
    return jnp.einsum("bnkv,bnk->bnv", state, q, precision=_EXACT)[:, None], state


def _chunks(inputs: Delta, segment_ids: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    time = segment_ids.shape[1]
    size = min(CHUNK, time)
    padding = -time % size

    def cut(x: jax.Array) -> jax.Array:
        """Return x (b, t, n, ..) as (chunks, b, n, c, ..)."""
        x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    # Padding behind the last chunk goes on with the last text.
    segments = jnp.pad(segment_ids, ((0, 0), (0, padding)), mode="edge")
    segments = segments.reshape(len(segments), -1, size).swapaxes(0, 1)
    before = jnp.concatenate([segments[:1, :, 0], segments[:-1, :, -1]])  # whose the state is
    parts = (Delta(*map(cut, inputs)), segments, before)
    state, out = jax.lax.scan(lambda state, part: _chunk(state, *part), state, parts)
    out = jnp.moveaxis(out, (0, 2), (1, 3))  # (b, chunks, c, n, v)
    out = out.reshape(out.shape[0], -1, *out.shape[3:])
    return out[:, :time], state


def _chunk(
    state: jax.Array, inputs: Delta, segments: jax.Array, before: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return S after a chunk and o (b, n, c, v). `segments` (b, c) are the texts of its tokens, and
    `before` (b,) the text that `state` belongs to.
    """
    q, k, v, decay, strength = inputs
    total = jnp.cumsum(decay, axis=-1)  # (b, n, c)
    own = (segments == before[:, None])[:, None]  # reads the state
    last = (segments == segments[:, -1:])[:, None]  # writes it
    same = (segments[:, :, None] == segments[:, None, :])[:, None]
    order = jnp.tri(segments.shape[1], dtype=bool)
    # Logs of decays from the second token to the first. Differences of `total` would cancel, and
    # one decay that forgets everything would cost all later ones their last digits.
    logs = jnp.cumsum(jnp.where(order & ~order.T, decay[..., :, None], 0), axis=-2)
    between = jnp.exp(jnp.where(same & order, logs, -jnp.inf))
    since = jnp.where(own, jnp.exp(total), 0)[..., None]
    until = jnp.where(last, jnp.exp(logs[..., -1, :]), 0)[..., None]
    pairs = _product("bnik,bnjk->bnij", k * strength[..., None], k) * between
    right = jnp.concatenate([v, k * since], axis=-1) * strength[..., None]
    solved = jax.scipy.linalg.solve_triangular(
        pairs, right, lower=True, unit_diagonal=True
    )  # reads what is below the diagonal
    values, reads = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    values = values - _product("bnck,bnkv->bncv", reads, state)
    out = _product("bnck,bnkv->bncv", q * since, state)
    out += _product("bnij,bnjv->bniv", _product("bnik,bnjk->bnij", q, k) * between, values)
    kept = jnp.where(own[..., -1], jnp.exp(total[..., -1]), 0)[..., None, None]
    return state * kept + _product("bnck,bncv->bnkv", k * until, values), out


def _product(form: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(form, x, y, precision=_EXACT)
