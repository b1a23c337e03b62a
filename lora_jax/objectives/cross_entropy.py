"""Supervised next-token cross-entropy, with label smoothing and a router loss.

    loss = sum_i w_i l_i / sum_i w_i
    l_i  = (1 - e) * -log p(token_i) + e * mean_v -log p(v),    e = label_smoothing

p is the distribution after the tokens before i in its segment (arXiv 1512.00567, section 7).
Classifiers have one such token per text: its label.
"""

import jax
import jax.numpy as jnp

from lora_jax.config import TrainConfig
from lora_jax.objectives import router
from lora_jax.objectives.forward import Batch, Forward, Outputs, negative_log_prob
from lora_jax.objectives.objective import Objective, Result

# Its options, with the metrics that they add to `loss`.
SETTINGS = {"label_smoothing": "smoothed_loss", "router_aux_loss_coef": "router_aux_loss"}


def from_config(settings: TrainConfig) -> Objective:
    """Make the objective of `train.label_smoothing` and `train.router_aux_loss_coef`."""
    smoothing, coefficient = settings.label_smoothing, settings.router_aux_loss_coef

    def cross_entropy(forward: Forward, batch: Batch, key: jax.Array) -> Result:
        outputs = forward(forward.bound, batch)
        result = smoothed_sums(outputs, smoothing) if smoothing else plain_sums(outputs)
        return router.add_balance(result, outputs, forward, coefficient) if coefficient else result

    return cross_entropy


def metric_names(settings: TrainConfig) -> list[str]:
    """Return the names of the metrics that the objective of `from_config` adds to `loss`."""
    return [metric for option, metric in SETTINGS.items() if getattr(settings, option)]


def plain_sums(outputs: Outputs) -> Result:
    """Return the summed negative log-likelihood in nats, and the sum of the weights."""
    (nll,) = outputs.sums(negative_log_prob)
    return nll, outputs.weight, {"loss": nll}


def smoothed_sums(outputs: Outputs, smoothing: float) -> Result:
    """Return the same with smoothed labels; `loss` is not smoothed."""

    def both(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        nll = negative_log_prob(logits, targets)
        uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
        return (1 - smoothing) * nll + smoothing * uniform, nll

    smoothed, nll = outputs.sums(both)
    return smoothed, outputs.weight, {"loss": nll, "smoothed_loss": smoothed}
