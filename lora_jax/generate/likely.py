"""The tokens that are likely enough to be drawn, by min_p, top_k and top_p, without a sort."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST = np.iinfo(np.int32).max


def keep_likely(logits: jax.Array, top_k: Any, tail: Any, min_p: Any = 0.0) -> jax.Array:
    """Return logits (b, vocab) with -inf for tokens that are not drawn from.

    Dropped are tokens less likely than `min_p` times the most likely one; all but the `top_k`
    largest (and ties of the last of them); and of the rest the least likely ones whose
    probabilities add up to at most `tail` = 1 - top_p. Of equal logits the first is dropped first;
    one of the most likely tokens is always kept. The settings are numbers or arrays (b,).

    The thresholds are exact: a bisection over the bits of the floats, which is faster than a sort.
    """
    shape = logits.shape[:1]
    top_k, tail, min_p = (jnp.broadcast_to(jnp.asarray(x), shape) for x in (top_k, tail, min_p))
    order = _ordered(logits)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    kept = (weights >= min_p[:, None]) | (min_p == 0)[:, None]
    by_number = (top_k < logits.shape[-1]).any()
    kept = jax.lax.cond(by_number, lambda x: x & _largest(order, x, top_k), lambda x: x, kept)
    kept = jax.lax.cond(
        (tail > 0).any(), lambda x: x & ~_least(order, x, weights, tail), lambda x: x, kept
    )
    return jnp.where(kept, logits, -jnp.inf)


def _ordered(logits: jax.Array) -> jax.Array:
    """Return int32 in the order of the floats; the two zeros are equal."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    return jnp.where(bits < 0, -(bits & _LARGEST), bits)


def _largest(order: jax.Array, kept: jax.Array, top_k: jax.Array) -> jax.Array:
    """Return which are the `top_k` (b,) largest in `order` (b, vocab), or ties of the last of them.
    Those that are not `kept` are smaller than all others.
    """
    order = jnp.where(kept, order, -_LARGEST)

    def too_few(least: jax.Array) -> jax.Array:
        return (order >= least[:, None]).sum(axis=-1) < top_k

    # The largest value that at least top_k reach: one below the first that too few reach.
    return order >= (_first(too_few, top_k) - 1)[:, None]


def _least(order: jax.Array, kept: jax.Array, weights: jax.Array, tail: jax.Array) -> jax.Array:
    """Return which of the `kept` (b, vocab) are the least likely ones, with at most `tail` (b,) of
    their probability together; all but the last of the most likely ones if that is all.
    """
    probabilities = jnp.where(kept, weights, 0)
    probabilities /= probabilities.sum(axis=-1, keepdims=True)

    def beyond(most: jax.Array) -> jax.Array:
        below = jnp.where(order <= most[:, None], probabilities, 0)
        return below.sum(axis=-1) > tail

    last = jnp.minimum(_first(beyond, tail), order.max(axis=-1))
    tied = kept & (order == last[:, None])

    def some_of_tied(_: None) -> jax.Array:
        """Return those of equal logits that are dropped: the first ones, as far as `tail` goes."""
        rank = jnp.cumsum(tied, axis=-1)
        each = jnp.where(tied, probabilities, 0).max(axis=-1)
        below = jnp.where(order < last[:, None], probabilities, 0).sum(axis=-1)
        fit = below[:, None] + rank * each[:, None] <= tail[:, None]
        return tied & fit & (rank < tied.sum(axis=-1, keepdims=True))

    several = (tied.sum(axis=-1) > 1).any()
    some = jax.lax.cond(several, some_of_tied, lambda _: jnp.zeros_like(tied), None)
    return ((order < last[:, None]) | some) & (tail > 0)[:, None]


def _first(holds: Any, like: jax.Array) -> jax.Array:
    """Return the least int32 (b,) at which a monotone condition holds, by bisection; the largest
    int32 if it holds nowhere.
    """

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        found = holds(middle)
        low = jnp.where(found | (low == high), low, middle + 1)
        return low, jnp.where(found, middle, high)

    low = jnp.full(like.shape, -_LARGEST, jnp.int32)
    return jax.lax.fori_loop(0, 32, halve, (low, jnp.full_like(low, _LARGEST)))[0]
