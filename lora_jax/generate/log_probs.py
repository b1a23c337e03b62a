"""Log-probabilities of tokens and of the most likely alternatives."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

TOP = 20  # alternatives, as many as OpenAI's interface offers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of tokens and of the most likely ones, in falling order."""

    own: Any  # (n,) float32
    top_ids: Any  # (n, top) int32
    top_values: Any  # (n, top) float32


def log_probs(logits: jax.Array, tokens: jax.Array, top: int = TOP) -> LogProbs:
    """Return log-probabilities of `tokens` (n,) and of the `top` most likely tokens under `logits`
    (n, vocab), the model's own, as in vLLM: before bias, penalties and temperature.

    The rows are those of a batch, or the positions of a prompt with the next tokens of each. A
    token has the same float in `own` and `top_values`. A smaller vocabulary gives fewer than `top`.

    Example:
        >>> from lora_jax.generate.log_probs import log_probs
        >>> found = log_probs(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([0]))
        >>> print(found.own.round(3), found.top_ids)
        [-1.386] [[1 0]]
    """
    largest = logits.max(axis=-1, keepdims=True)
    total = jnp.log(jnp.exp(logits - largest).sum(axis=-1, keepdims=True))
    # One subtraction of the same two floats for own and top values, so that they are equal.
    largest, total = jax.lax.optimization_barrier((largest, total))
    own = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    values, ids = jax.lax.top_k(logits, min(top, logits.shape[-1]))
    own, values = ((x - largest) - total for x in (own, values))
    return LogProbs(own[:, 0], ids, values)


def log_probs_if(
    wanted: jax.Array, logits: jax.Array, tokens: jax.Array, top: int = TOP
) -> LogProbs:
    """Return `log_probs` if any row is `wanted` (n,), else zeros at little cost."""

    def zeros(logits: jax.Array, tokens: jax.Array) -> LogProbs:
        shapes = jax.eval_shape(lambda x, y: log_probs(x, y, top), logits, tokens)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return jax.lax.cond(wanted.any(), lambda x, y: log_probs(x, y, top), zeros, logits, tokens)
