"""Answers of a batch to compare: their log-probabilities, their reference and their metrics.

A row holds pairs of texts. `pair_ids` (b, t) numbers them from 1 in every row, and `roles` (b, t)
says which text of its pair a token belongs to: CHOSEN, REJECTED or OTHER. Both are 0 in padding.
`reference_log_probs` (b, t) has the log-probability of every supervised token by the reference
model, and 0 elsewhere.

    gain = sum over the tokens of an answer of log p(token) - log p_reference(token)
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lora_jax.data import CHOSEN, REJECTED
from lora_jax.objectives.forward import Batch, Forward, segment_sums

_SHORTEST = 4  # tokens of a pair: each text has a first token, and a supervised one after it


def count_pairs(batch: Batch) -> jax.Array:
    """Return the number of pairs of a batch, a float32 scalar."""
    return jnp.sum(jnp.max(batch["pair_ids"], axis=1)).astype(jnp.float32)


def pair_sums(values: jax.Array, batch: Batch, role: int) -> jax.Array:
    """Sum values (b, t) over the texts with a role: (b, n), 0 where a row has fewer pairs."""
    ids = jnp.where(batch["roles"] == role, batch["pair_ids"], 0)
    return segment_sums(values, ids, max(1, ids.shape[1] // _SHORTEST))


def supervised(batch: Batch) -> jax.Array:
    """Return 1 at every token to be predicted, and 0 elsewhere: (b, t) float32."""
    return (batch["loss_weights"] > 0).astype(jnp.float32)


@dataclass(frozen=True)
class Answers:
    """The texts with one role, a value for each pair: (b, n)."""

    log_probs: jax.Array  # summed over its supervised tokens
    gains: jax.Array  # the same minus the reference's; 0 without a reference
    tokens: jax.Array  # supervised ones; 0 where a row has fewer pairs

    @property
    def means(self) -> jax.Array:
        """Log-probability of an answer per token."""
        return self.log_probs / jnp.maximum(self.tokens, 1)

    @property
    def mean_gains(self) -> jax.Array:
        """Gain of an answer per token."""
        return self.gains / jnp.maximum(self.tokens, 1)


def read_answers(log_probs: jax.Array, gains: jax.Array, batch: Batch, role: int) -> Answers:
    """Sum values of tokens (b, t) over the answers with a role."""
    found = (log_probs, gains, supervised(batch))
    return Answers(*(pair_sums(values, batch, role) for values in found))


def reference_log_probs(forward: Forward, batch: Batch) -> jax.Array:
    """Return the log-probabilities of the reference (b, t): those of the batch, or else of the
    model without adapters, from one more forward pass.

    Raises:
        UserError: as `Forward.reference`.
    """
    if "reference_log_probs" in batch:
        return batch["reference_log_probs"]
    return jax.lax.stop_gradient(forward(forward.reference, batch).log_probs())


def sft_loss(chosen: Answers, forward: Forward, batch: Batch) -> jax.Array:
    """Return the negative log-likelihood of the chosen answers, scaled so that the step's division
    by the number of pairs gives the mean over the tokens of the whole effective batch.
    """
    whole = forward.effective_batch
    tokens = jnp.sum(supervised(whole) * (whole["roles"] == CHOSEN))
    return -jnp.sum(chosen.log_probs) * count_pairs(whole) / jnp.maximum(tokens, 1)


def pair_metrics(chosen: Answers, rejected: Answers, margins: jax.Array) -> dict[str, jax.Array]:
    """Return the sums of the metrics of all objectives over pairs; `margins` (b, n) are the rewards
    of the chosen answers minus those of the rejected ones.
    """
    return {
        "margin": jnp.sum(margins),
        "accuracy": jnp.sum(margins > 0).astype(jnp.float32),
        "chosen_log_prob": jnp.sum(chosen.log_probs),
        "rejected_log_prob": jnp.sum(rejected.log_probs),
    }


def drift_metrics(chosen: Answers, rejected: Answers, kl: jax.Array) -> dict[str, jax.Array]:
    """Return the sums of the metrics of objectives with a reference. `kl` (b, t) is `token_kl`."""
    return {
        "chosen_drift": jnp.sum(chosen.gains),
        "rejected_drift": jnp.sum(rejected.gains),
        "kl": jnp.sum(kl),
    }


def token_kl(gains: jax.Array, batch: Batch) -> jax.Array:
    """Return exp(-gain) - 1 + gain at every token of the answers, divided by the supervised tokens
    of its pair: (b, n). It is an estimate, never negative, of the divergence from the reference per
    token (http://joschu.net/blog/kl-approx.html).
    """
    mask = supervised(batch)
    estimates = jnp.where(mask > 0, jnp.exp(-gains) - 1 + gains, 0)
    both = [pair_sums(estimates, batch, role) for role in (CHOSEN, REJECTED)]
    tokens = [pair_sums(mask, batch, role) for role in (CHOSEN, REJECTED)]
    return sum(both) / jnp.maximum(sum(tokens), 1)
