"""The forward pass available to an objective, and its outputs.

ours = forward(forward.bound, batch)          # the adapted model
base = forward(forward.reference, batch)      # the frozen one, in the same memory

ours.log_probs()                              # (b, t): a value per token
ours.sums(function)                           # sums over tokens, weighted by loss_weights
segment_sums(ours.log_probs(), batch["segment_ids"], count)      # (b, count): one per text
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import UserError
from lora_jax.models.common import PLAIN, Execution, Model, Routing
from lora_jax.nn.virtual import Virtual, placeholders
from lora_jax.objectives import chunked
from lora_jax.objectives.chunked import TokenFunction
from lora_jax.tree import flatten
from lora_jax.weights import Absent

# tokens, segment_ids, positions (b, t) int32; loss_weights (b, t) float32. Classifiers have
# token_types (b, t) int32 too, and texts that share their start seen_until (`lora_jax.nn.texts`).
Batch = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Compute:
    """Settings of a forward that change its cost and precision, not its result."""

    execution: Execution = PLAIN  # of the model
    chunk: int = 1024  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class Bound:
    """A bound tree and the virtual tokens that go with it: `lora.bind` and `lora.prefix`."""

    params: Mapping
    prefix: Virtual | None = None


@dataclass(frozen=True)
class Outputs:
    """A model's final hidden states for a batch. Logits are computed from them in chunks, and
    never all at once.
    """

    module: Any  # the NNX module; `logits` maps (.., d) to (.., vocab)
    hidden: jax.Array  # (b, t, d)
    batch: Batch
    chunk: int
    routing: Routing | None = None  # sums of every layer's router; None without experts

    @property
    def weight(self) -> jax.Array:
        """Sum of the weights of the tokens that are predicted: all but the first of a row."""
        return supervised_weight(self.batch)

    def log_probs(self) -> jax.Array:
        """Return log p(token | tokens before it in its segment), (b, t) float32; 0 at tokens whose
        loss weight is 0.
        """
        return -self.each(negative_log_prob)

    def each(self, function: TokenFunction, *others: "Outputs") -> jax.Array:
        """Return a function of the logits at every supervised token, (b, t), and 0 elsewhere."""
        return chunked.each_token(function, self._heads(others), self.batch, self.chunk)

    def sums(self, function: TokenFunction, *others: "Outputs") -> tuple[jax.Array, ...]:
        """Return the sum over tokens of loss weight times a function of the logits; with a function
        that returns several arrays, a sum for each. Only the first has a gradient.

        `function(logits, targets, *others)` gets logits (rows, width, vocab) in float32, targets
        (rows, width), and the logits of `others` for the same tokens. It may not use other arrays.
        """
        return chunked.weighted_sums(function, self._heads(others), self.batch, self.chunk)

    def _heads(self, others: tuple["Outputs", ...]) -> list[chunked.Head]:
        return [chunked.make_head(one.module, one.hidden) for one in (self, *others)]


@dataclass(frozen=True)
class Forward:
    """The forward of a train step: `forward(params_like, batch)` runs the model once."""

    model: Model
    compute: Compute
    bound: Bound  # what trains: parameters with adapters, and dropout
    params: Mapping  # the frozen parameters
    changes_base: str | None  # the init, if it subtracted factors from `params`
    effective_batch: Batch  # of the whole step; an objective gets a micro-batch of it at a time

    @property
    def reference(self) -> Mapping:
        """The model without adapters: the frozen parameters.

        Raises:
            UserError: `method: full`, which holds no frozen parameters; an init that changes them.
        """
        if any(isinstance(leaf, Absent) for leaf in flatten(self.params).values()):
            raise UserError(
                "this objective compares with the model before training, and adapter.method=full "
                "keeps no copy of it; train an adapter instead"
            )
        if self.changes_base is not None:
            raise UserError(
                "this objective compares with the model before training, and adapter.init="
                f"{self.changes_base} subtracts its factors from the weights; choose another init"
            )
        return self.params

    def __call__(self, params_like: Mapping | Bound, batch: Batch) -> Outputs:
        """Run the model over a batch.

        Args:
            params_like: `bound`, `reference`, or any tree of the model's parameters.
            batch: that of the objective, or another one of the same form.
        """
        if isinstance(params_like, Bound):
            return run_model(
                self.model, params_like.params, batch, self.compute, params_like.prefix
            )
        batch = without_placeholders(batch, placeholders(self.bound.prefix))
        return run_model(self.model, params_like, batch, self.compute)


def run_model(
    model: Model, params: Mapping, batch: Batch, compute: Compute, prefix: Virtual | None = None
) -> Outputs:
    """Run a model over a batch, up to its final hidden states."""
    module = model.module(params)
    inputs: dict[str, Any] = {n: batch[n] for n in ("token_types", "seen_until") if n in batch}
    if prefix is not None:
        inputs["prefix"] = prefix
    run = getattr(module, "hidden_and_routing", module.hidden)
    hidden, _, *routing = run(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        execution=compute.execution,
        **inputs,
    )
    return Outputs(module, hidden, batch, compute.chunk, *routing)


def without_placeholders(batch: Batch, count: int) -> Batch:
    """Turn the placeholders of virtual tokens, at the start of every text, into padding."""
    if not count:
        return batch
    text = batch["positions"] >= count
    # No token sees one of padding: neither by its segment, nor by `seen_until`.
    found = {n: jnp.where(text, batch[n], 0) for n in ("segment_ids", "seen_until") if n in batch}
    return {**batch, **found, "positions": jnp.maximum(batch["positions"] - count, 0)}


def negative_log_prob(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return -log softmax(logits)[target], in nats: (.., vocab) and (..) to (..)."""
    # A mask instead of a gather: each device reads its own part of the vocabulary. Targets without
    # a weight may be no label of a classifier, and select nothing.
    here = jnp.arange(logits.shape[-1]) == targets[..., None]
    return log_sum_exp(logits) - jnp.sum(jnp.where(here, logits, 0), axis=-1)


@jax.custom_jvp
def log_sum_exp(logits: jax.Array) -> jax.Array:
    """Return log sum_v exp(logit_v): (.., vocab) to (..). The value is the same to the bit with and
    without a gradient, which keeps no exponentials.
    """
    return jax.nn.logsumexp(logits, axis=-1)


@log_sum_exp.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (logits,), (slopes,) = primals, tangents
    found = log_sum_exp(logits)
    return found, jnp.sum(jnp.exp(logits - found[..., None]) * slopes, axis=-1)


def segment_sums(values: jax.Array, segment_ids: jax.Array, count: int) -> jax.Array:
    """Sum values (b, t) over the tokens of segments 1 to `count` of every row: (b, count)."""
    segments = jnp.arange(1, count + 1)
    return jnp.sum(jnp.where(segment_ids[..., None] == segments, values[..., None], 0), axis=1)


def supervised_weight(batch: Batch) -> jax.Array:
    """Return the summed weights of the tokens that are predicted: all but the first of a row."""
    return batch["loss_weights"][:, 1:].sum()
