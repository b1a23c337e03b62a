"""Probe of a run: the divergence between models on a few of its rows.

    KL(live, other) = sum_v live(v) * (log live(v) - log other(v)),    v a token, or a label

It is averaged over the supervised tokens by their weights, as the loss is. It is computed in
float32, whatever the dtype of the run, so that only the weights make a difference.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax import data
from lora_jax.config import Config
from lora_jax.data import sets
from lora_jax.data.sets import DataSet, Encoder, TrainData
from lora_jax.models.common import Model
from lora_jax.report import scores
from lora_jax.sharding import place_batch


def choose(
    config: Config, encoder: Encoder, train: TrainData | None, held_out: Mapping[str, DataSet]
) -> list[data.Example]:
    """Return `export.probe_rows` evenly spaced held-out rows of the task. Without held-out rows,
    return rows of the training data; of a stream, the first ones. Rows without a supervised token
    are skipped.
    """
    if not config.export.probe_rows:
        return []
    if "task" in held_out:
        examples = held_out["task"].examples
    elif train is None:
        examples = []
    elif train.stream is not None:
        examples = encoder.block(list(islice(data.records(train.stream), config.data.stream_rows)))
    else:
        examples = [example for one in train.sets.values() for example in one.examples]
    usable = [example for example in examples if np.any(example.loss_weights[1:])]
    return scores.spread(usable, config.export.probe_rows)


def read(config: Config, encoder: Encoder) -> list[data.Example]:
    """Read the data of a run as they are now, and return the rows of `choose`.

    Raises:
        UserError: data that cannot be read or used.
    """
    if not config.export.probe_rows:
        return []
    if config.data.eval is not None:
        return choose(config, encoder, None, sets.read_held_out(config, encoder))
    return choose(config, encoder, *sets.read_sets(config, encoder))


def divergences(
    model: Model,
    live: Any,
    others: Mapping[str, Any],
    examples: Sequence[data.Example],
    mesh: Mesh,
    *,
    batch_size: int,
    chunk: int,
) -> dict[str, float]:
    """Return KL(live, other) in nats per supervised token for every tree of `others`, by its name.

    live, others: parameters that `model` runs on, plain, bound or merged.
    batch_size: rows at a time; chunk: tokens whose logits are in memory at once.
    """
    hidden, distance = _make_hidden(model), _make_distance(model, chunk)
    totals, weight = dict.fromkeys(others, 0.0), 0.0
    with jax.default_matmul_precision("highest"):
        for batch in _batches(examples, batch_size, mesh):
            # Weight i belongs to token i, which is predicted from position i - 1.
            weights = np.roll(batch["loss_weights"], -1, axis=1)
            weights[:, -1] = 0
            flat = weights.ravel()
            # Chunks without weight come last and are skipped.
            order = np.argsort(flat == 0, kind="stable").astype(np.int32)
            placed = place_batch(batch, mesh)
            own = hidden(live, placed)
            for name, params in others.items():
                apart = distance(live, params, own, hidden(params, placed), order, flat[order])
                totals[name] += float(apart)
            weight += float(flat.sum())
    return {name: total / weight for name, total in totals.items()}


def _batches(examples: Sequence[data.Example], batch_size: int, mesh: Mesh):
    """Yield batches of one example per row, equal in shape, with rows that `mesh` can split."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-min(batch_size, len(examples)) // parts) * parts
    length = max(len(example.tokens) for example in examples)
    for first in range(0, len(examples), size):
        rows = [[example] for example in examples[first : first + size]]
        yield data.stack(rows + [[]] * (size - len(rows)), length)


def _make_hidden(model: Model):
    @jax.jit
    def hidden(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        """(tokens, d)"""
        x, _ = model.module(params).hidden(
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            **{name: batch[name] for name in ("token_types",) if name in batch},
        )
        return x.reshape(-1, x.shape[-1])

    return hidden


def _make_distance(model: Model, chunk: int):
    def log_probabilities(params: Any, hidden: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(model.module(params).logits(hidden).astype(jnp.float32))

    @jax.jit
    def distance(live, other, of_live, of_other, order, weights) -> jax.Array:
        """Return the weighted sum over tokens, chunk by chunk in the `order` (tokens,) given."""
        width = min(chunk, len(order))
        padded = [jnp.pad(x, (0, -len(order) % width)) for x in (order, weights)]

        def of_chunk(own: tuple[jax.Array, jax.Array]) -> jax.Array:
            places, weights = own

            def compute() -> jax.Array:
                p = log_probabilities(live, of_live[places])
                q = log_probabilities(other, of_other[places])
                return jnp.sum(weights * kl(p, q))

            return jax.lax.cond(jnp.any(weights != 0), compute, lambda: jnp.float32(0))

        return jax.lax.map(of_chunk, tuple(x.reshape(-1, width) for x in padded)).sum()

    return distance


def kl(p: jax.Array, q: jax.Array) -> jax.Array:
    """Return KL(p, q) over the last axis, from log-probabilities.

    With r = p - q, every term is written as e^p (e^-r - 1 + r). The sum is the same and no term is
    negative; for nearly equal models, e^p r would be only the rounding error of r.
    """
    r = p - q
    near = jnp.exp(p) * (jnp.expm1(-jnp.clip(r, -1, 1)) + r)
    far = jnp.exp(q) - jnp.exp(p) + jnp.exp(p) * r
    return jnp.sum(jnp.where(jnp.abs(r) < 1, near, far), axis=-1)
