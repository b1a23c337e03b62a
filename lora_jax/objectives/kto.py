"""Kahneman-Tversky optimisation (arXiv 2402.01306, equation 8): answers with a label each.

    true   = desirable_weight (1 - sigmoid(beta (gain - z)))
    false  = undesirable_weight (1 - sigmoid(beta (z - gain)))
    z      = max(0, mean gain of the other answers), without a gradient

The second text of a pair has the same prompt and the answer of another row (OTHER). z is their mean
over the rows of a forward pass: over a micro-batch, if the step has several, as in TRL.
"""

import jax
import jax.numpy as jnp

from lora_jax.config import Config, beta_of
from lora_jax.data import CHOSEN, OTHER, REJECTED
from lora_jax.objectives import pairs, penalties
from lora_jax.objectives.forward import Batch, Forward
from lora_jax.objectives.objective import Objective, Result


def kto_loss(gains: jax.Array, desirable: jax.Array, z: jax.Array, beta: float) -> jax.Array:
    """Return the loss of each answer, before its weight.

    Example:
        >>> kto_loss(jnp.float32(0.0), jnp.bool(True), jnp.float32(0.0), beta=0.1)
        Array(0.5, dtype=float32)
    """
    rewards = beta * (gains - z)
    return 1 - jax.nn.sigmoid(jnp.where(desirable, rewards, -rewards))


def from_config(config: Config) -> Objective:
    """Make the objective of `train.objective=kto`."""
    settings, beta = config.objective, beta_of(config.objective, "kto")
    add_penalties = penalties.from_config(config, pairs.count_pairs)

    def kto(forward: Forward, batch: Batch, key: jax.Array) -> Result:
        outputs = forward(forward.bound, batch)
        log_probs = outputs.log_probs()
        gains = log_probs - pairs.reference_log_probs(forward, batch)
        good, bad, other = (
            pairs.read_answers(log_probs, gains, batch, role) for role in (CHOSEN, REJECTED, OTHER)
        )
        count = pairs.count_pairs(batch)
        # A micro-batch may have rows of the replay alone, and no answers.
        z = jnp.maximum(jnp.sum(other.gains) / jnp.maximum(count, 1), 0)
        z = jax.lax.stop_gradient(z)
        is_good, is_bad = good.tokens > 0, bad.tokens > 0
        losses = kto_loss(good.gains + bad.gains, is_good, z, beta)
        weights = settings.desirable_weight * is_good + settings.undesirable_weight * is_bad
        total = jnp.sum(weights * losses)
        right = (is_good & (good.gains > z)) | (is_bad & (bad.gains < z))
        sums = {"loss": total, "accuracy": jnp.sum(right).astype(jnp.float32), "kl": z * count}
        sums |= _by_label(good, bad, beta, forward.effective_batch)
        return add_penalties((total, count, sums), outputs, forward)

    return kto


def _by_label(
    good: pairs.Answers, bad: pairs.Answers, beta: float, whole: Batch
) -> dict[str, jax.Array]:
    """Return metrics of the answers of each label, scaled so that the step's division by the number
    of rows gives means over those of the label.
    """
    rows = pairs.count_pairs(whole)
    mean: dict[str, jax.Array] = {}
    for name, answers, role in (("chosen", good, CHOSEN), ("rejected", bad, REJECTED)):
        tokens = pairs.pair_sums(pairs.supervised(whole), whole, role)
        share = rows / jnp.maximum(jnp.sum(tokens > 0), 1)
        mean[f"{name}_log_prob"] = share * jnp.sum(answers.log_probs)
        mean[f"{name}_drift"] = share * jnp.sum(answers.gains)
    return {"margin": beta * (mean["chosen_drift"] - mean["rejected_drift"]), **mean}
