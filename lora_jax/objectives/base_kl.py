"""The divergence from the base on general text, so that training for a task forgets less.

    base_kl = mean over the tokens of the replay of KL(p || p_base)

p is the distribution of the adapted model, p_base that of the model without adapters, over the next
token. Rows of the replay are in the batch, and their tokens count here alone: they have
`replay_weights` in place of `loss_weights`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.objectives.forward import Batch, Forward, Outputs
from lora_jax.objectives.objective import Result


def add_base_kl(
    result: Result,
    outputs: Outputs,
    forward: Forward,
    coefficient: float,
    weigh: Callable[[Batch], jax.Array],
) -> Result:
    """Add coefficient * base_kl to the result of an objective over `outputs`. `weigh` gives the
    weight of a batch in that objective.

    The step divides by the weight of the whole batch, so the sum over the replay is scaled by that
    weight. A batch of replay alone has the weight 1.
    """
    batch = outputs.batch
    if "replay_weights" not in batch:  # of an evaluation
        return result
    total, weight, sums = result
    replay = {**batch, "loss_weights": batch["replay_weights"]}
    base = forward(forward.reference, replay)
    (found,) = dataclasses.replace(outputs, batch=replay).sums(divergence, base)
    whole = forward.effective_batch
    tokens = jnp.maximum(whole["replay_weights"][:, 1:].sum(), 1)
    pieces = len(whole["tokens"]) // len(batch["tokens"])
    own = weigh(whole)
    weight = jnp.where(own > 0, weight, 1 / pieces)
    mean = found * jnp.where(own > 0, own, 1) / tokens
    return total + coefficient * mean, weight, {**sums, "base_kl": mean}


def divergence(logits: jax.Array, targets: Any, base: jax.Array) -> jax.Array:
    """Return KL(p || p_base) in nats of two sets of logits (.., vocab); `targets` are not used.

    Example:
        >>> from lora_jax.objectives import base_kl
        >>> ours, base = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
        >>> print(f"{base_kl.divergence(ours, None, base):.4f}")
        0.1438
    """
    ours, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(base)
    return jnp.sum(jnp.exp(ours) * (ours - theirs), axis=-1)
