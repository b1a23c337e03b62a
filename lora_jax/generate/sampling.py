"""Next tokens from logits: the most likely, or a draw with temperature, top-k and top-p."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import raise_all


@dataclass(frozen=True)
class Sampling:
    """Sampling settings, named and applied as in transformers and vLLM: logits are divided by the
    temperature, then restricted to `top_k`, then to `top_p`.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0  # 0: greedy, the most likely token
    top_k: int | None = None  # number of most likely tokens to draw from; null: all
    top_p: float = 1.0  # draw from the fewest tokens whose probabilities add up to this
    seed: int = 0

    def __post_init__(self) -> None:
        problems = {
            f"temperature={self.temperature} must not be negative": not 0 <= self.temperature,
            f"temperature={self.temperature} must be finite": self.temperature == float("inf"),
            f"top_p={self.top_p} must be above 0 and at most 1": not 0 < self.top_p <= 1,
            f"top_k={self.top_k} must be at least 1": self.top_k is not None and self.top_k < 1,
        }
        raise_all([text for text, holds in problems.items() if holds])


def keep_likely(logits: jax.Array, top_k: Any, tail: Any) -> jax.Array:
    """Return logits (b, vocab) with -inf for tokens that are not drawn from.

    Kept are the `top_k` largest (and ties of the last of them), without the least likely ones whose
    probabilities add up to at most `tail` = 1 - top_p. Of equal logits the first is dropped first;
    the most likely token is always kept.
    """
    order = jnp.argsort(logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    last = jnp.maximum(logits.shape[-1] - top_k, 0)
    ranked = jnp.where(ranked < jnp.take(ranked, last, axis=-1)[:, None], -jnp.inf, ranked)
    dropped = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) <= tail
    dropped = dropped.at[:, -1].set(False) & (tail > 0)
    ranked = jnp.where(dropped, -jnp.inf, ranked)
    return jnp.put_along_axis(logits, order, ranked, axis=-1, inplace=False)


def sample(
    logits: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
    top_k: Any,
    tail: Any,
) -> jax.Array:
    """Return token ids (b,) for logits (b, vocab): the largest logit at temperature 0, otherwise a
    draw from softmax(logits / temperature) with the key of each row, `keys` (b,). `top_k` and
    `tail` as in `keep_likely`.
    """

    def draw(logits: jax.Array) -> jax.Array:
        scaled = logits / temperature
        cut = (top_k < logits.shape[-1]) | (tail > 0)
        kept = jax.lax.cond(cut, lambda x: keep_likely(x, top_k, tail), lambda x: x, scaled)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    def likeliest(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, draw, likeliest, logits)
