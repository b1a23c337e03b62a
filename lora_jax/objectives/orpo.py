"""Preferences without a reference: ORPO (arXiv 2403.07691) and SimPO (arXiv 2405.14734).

    m      = log-probability of an answer per token, c and r: chosen and rejected
    orpo   = -beta log sigmoid(log odds(c) - log odds(r)),    odds(m) = exp(m) / (1 - exp(m))
    simpo  = -(1 - e) log sigmoid(h) - e log sigmoid(-h),    h = beta (m_c - m_r) - gamma

Both add `sft_weight` times the cross-entropy of the chosen answers, which is 1 in ORPO's paper. e
is label_smoothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lora_jax.config import Config, beta_of, sft_weight_of
from lora_jax.data import CHOSEN, REJECTED
from lora_jax.objectives import pairs, penalties
from lora_jax.objectives.forward import Batch, Forward
from lora_jax.objectives.objective import Objective, Result, is_on


def orpo_loss(chosen: jax.Array, rejected: jax.Array, beta: float) -> jax.Array:
    """Return the odds-ratio loss of each pair from log-probabilities per token, below 0.

    Example:
        >>> orpo_loss(jnp.float32(-1.0), jnp.float32(-1.0), beta=1.0)  # equal odds: log 2
        Array(0.6931472, dtype=float32)
    """
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * jax.nn.log_sigmoid(odds)


def simpo_loss(
    chosen: jax.Array, rejected: jax.Array, beta: float, gamma: float, label_smoothing: float = 0.0
) -> jax.Array:
    """Return the loss of each pair from log-probabilities per token.

    Example:
        >>> simpo_loss(jnp.float32(-1.0), jnp.float32(-1.25), beta=2.0, gamma=0.5)
        Array(0.6931472, dtype=float32)
    """
    logits = beta * (chosen - rejected) - gamma
    right, wrong = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def _log1mexp(x: jax.Array) -> jax.Array:
    """Return log(1 - exp(x)) of x below 0; x = 0, of an answer that is certain, counts as -1e-6."""
    x = jnp.minimum(x, -1e-6)
    near = x > -0.6931472  # log 2, where the other form loses its digits
    close = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    return jnp.where(near, close, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def from_config(config: Config) -> Objective:
    """Make the objective of `train.objective=orpo` or `simpo`."""
    name, settings = config.train.objective, config.objective
    beta, sft_weight = beta_of(settings, name), sft_weight_of(settings, name)
    add_penalties, loss = penalties.from_config(config, pairs.count_pairs), _loss(config)

    def preferences(forward: Forward, batch: Batch, key: jax.Array) -> Result:
        outputs = forward(forward.bound, batch)
        log_probs = outputs.log_probs()
        chosen, rejected = (
            pairs.read_answers(log_probs, jnp.zeros_like(log_probs), batch, role)
            for role in (CHOSEN, REJECTED)
        )
        losses = loss(chosen.means, rejected.means)
        total = jnp.sum(jnp.where(chosen.tokens > 0, losses, 0))
        margins = beta * (chosen.means - rejected.means)
        sums = {f"{name}_loss": total, **pairs.pair_metrics(chosen, rejected, margins)}
        if is_on(sft_weight):
            sums["sft_loss"] = sft = pairs.sft_loss(chosen, forward, batch)
            total = total + sft_weight * sft
        sums["loss"] = total
        return add_penalties((total, pairs.count_pairs(batch), sums), outputs, forward)

    return preferences


def _loss(config: Config) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the loss of each pair as a function of log-probabilities per token."""
    name, settings = config.train.objective, config.objective
    beta, smoothing = beta_of(settings, name), settings.label_smoothing
    if name == "orpo":
        return lambda chosen, rejected: orpo_loss(chosen, rejected, beta)
    return lambda chosen, rejected: simpo_loss(chosen, rejected, beta, settings.gamma, smoothing)
