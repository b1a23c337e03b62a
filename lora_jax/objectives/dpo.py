"""Direct preference optimisation (arXiv 2305.18290) and IPO (arXiv 2310.12036, equation 17).

    h    = gain of the chosen answer - gain of the rejected one
    dpo  = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h),    e = label_smoothing
    ipo  = (h - 1 / (2 beta))^2

With `length_normalize`, gains are means over the tokens of an answer. Both add `sft_weight` times
the cross-entropy of the chosen answers.
"""

import jax
import jax.numpy as jnp

from lora_jax.config import Config, beta_of, is_normalized, sft_weight_of
from lora_jax.data import CHOSEN, REJECTED
from lora_jax.objectives import pairs, penalties
from lora_jax.objectives.forward import Batch, Forward
from lora_jax.objectives.objective import Objective, Result, is_on


def dpo_loss(differences: jax.Array, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """Return the loss of each pair from its difference of gains.

    Example:
        >>> dpo_loss(jnp.float32(0.0), beta=0.1)  # log 2: the model is its reference
        Array(0.6931472, dtype=float32)
    """
    logits = beta * differences
    right, wrong = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(differences: jax.Array, beta: float) -> jax.Array:
    """Return the loss of each pair from its difference of gains.

    Example:
        >>> ipo_loss(jnp.float32(0.0), beta=0.1)
        Array(25., dtype=float32)
    """
    return (differences - 1 / (2 * beta)) ** 2


def from_config(config: Config) -> Objective:
    """Make the objective of `train.objective=dpo` or `ipo`."""
    name, settings = config.train.objective, config.objective
    beta, sft_weight = beta_of(settings, name), sft_weight_of(settings, name)
    normalized = is_normalized(settings, name)
    add_penalties = penalties.from_config(config, pairs.count_pairs)

    def loss(differences: jax.Array) -> jax.Array:
        if name == "ipo":
            return ipo_loss(differences, beta)
        return dpo_loss(differences, beta, settings.label_smoothing)

    def preferences(forward: Forward, batch: Batch, key: jax.Array) -> Result:
        outputs = forward(forward.bound, batch)
        log_probs = outputs.log_probs()
        gains = log_probs - pairs.reference_log_probs(forward, batch)
        chosen, rejected = (
            pairs.read_answers(log_probs, gains, batch, role) for role in (CHOSEN, REJECTED)
        )
        differences = chosen.gains - rejected.gains
        if normalized:
            differences = chosen.mean_gains - rejected.mean_gains
        total = jnp.sum(jnp.where(chosen.tokens > 0, loss(differences), 0))
        sums = {"loss": total, **pairs.pair_metrics(chosen, rejected, beta * differences)}
        sums |= pairs.drift_metrics(chosen, rejected, pairs.token_kl(gains, batch))
        if is_on(sft_weight):
            sums["sft_loss"] = sft = pairs.sft_loss(chosen, forward, batch)
            total = total + sft_weight * sft
        return add_penalties((total, pairs.count_pairs(batch), sums), outputs, forward)

    return preferences
