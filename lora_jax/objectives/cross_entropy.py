"""Supervised next-token cross-entropy, with label smoothing and z-loss.

    loss = sum_i w_i l_i / sum_i w_i
    l_i  = (1 - e) * -log p(token_i) + e * mean_v -log p(v) + z * log^2 Z_i
    Z_i  = sum_v exp(logit_v),    e = label_smoothing, z = z_loss (arXiv 2204.02311, section 5)

p is the distribution after the tokens before i in its segment (arXiv 1512.00567, section 7).
Classifiers have one such token per text: its label.
"""

import jax
import jax.numpy as jnp

from lora_jax.config import Config, TrainConfig
from lora_jax.objectives import penalties
from lora_jax.objectives.forward import Batch, Forward, Outputs, log_sum_exp, negative_log_prob
from lora_jax.objectives.objective import Objective, Result

# Its options, with the metrics that they add to `loss`.
SETTINGS = {"label_smoothing": "smoothed_loss", "z_loss": "z_loss"}


def from_config(config: Config) -> Objective:
    """Make the objective of `train.label_smoothing` and `z_loss`, with its penalties."""
    smoothing, z_loss = config.train.label_smoothing, config.train.z_loss
    add_penalties = penalties.from_config(config)

    def cross_entropy(forward: Forward, batch: Batch, key: jax.Array) -> Result:
        outputs = forward(forward.bound, batch)
        regular = smoothing or z_loss
        result = regular_sums(outputs, smoothing, z_loss) if regular else plain_sums(outputs)
        return add_penalties(result, outputs, forward)

    return cross_entropy


def metric_names(settings: TrainConfig) -> list[str]:
    """Return the names of the metrics that the objective of `from_config` adds to `loss`."""
    return [metric for option, metric in SETTINGS.items() if getattr(settings, option)]


def plain_sums(outputs: Outputs) -> Result:
    """Return the summed negative log-likelihood in nats, and the sum of the weights."""
    (nll,) = outputs.sums(negative_log_prob)
    return nll, outputs.weight, {"loss": nll}


def regular_sums(outputs: Outputs, smoothing: float, z_loss: float) -> Result:
    """Return the same with smoothed labels and z-loss; `loss` has neither."""

    def parts(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
        nll, log_z = negative_log_prob(logits, targets), log_sum_exp(logits)
        smoothed = (1 - smoothing) * nll + smoothing * (log_z - jnp.mean(logits, axis=-1))
        return smoothed + z_loss * log_z**2, nll, smoothed, log_z**2

    total, nll, smoothed, squares = outputs.sums(parts)
    sums = {"loss": nll}
    sums |= {"smoothed_loss": smoothed} if smoothing else {}
    return total, outputs.weight, sums | ({"z_loss": squares} if z_loss else {})
