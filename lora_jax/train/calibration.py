"""Inputs of inits that need more than a random key: token embeddings for virtual tokens, or the
loss of a run's first batches as a function of the parameters.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from lora_jax.adapters import as_model_sees
from lora_jax.config import Config
from lora_jax.data import sets
from lora_jax.errors import UserError
from lora_jax.models.common import Model
from lora_jax.settle import text_tokens
from lora_jax.sharding import local_rows, place_batch
from lora_jax.train.step import Batch, batch_sums
from lora_jax.tree import flatten, unflatten
from lora_jax.weights import Probe


def make_calibrate(
    config: Config,
    model: Model,
    train_data: sets.TrainData,
    encoder: sets.Encoder,
    mesh: Mesh,
) -> Callable | None:
    """Return the `calibrate` of `adapters.init`; None if the init needs none.

    For virtual tokens, it is `as_model_sees`. For inits that need data, `calibrate(params)` is the
    loss in nats per supervised token over the first `calibration_batches` batches of training,
    without dropout.

    Raises:
        UserError: batches without a supervised token; as the loader.
    """
    count, rows = config.adapter.calibration_batches, config.train.batch_size
    if config.adapter.trains_virtual_tokens:
        return as_model_sees(model, config.adapter, text_tokens(config.adapter, encoder.tokenizer))
    if not config.adapter.needs_data:
        return None
    # A loader of its own: a stream is read once, and the run begins at its first row.
    loader = sets.make_loader(config, train_data, encoder, None, Console(quiet=True))
    batches = [
        place_batch(loader.batch(i, local_rows(rows, mesh)), mesh, rows) for i in range(count)
    ]
    if not any(float(batch["loss_weights"][:, 1:].sum()) for batch in batches):
        raise UserError(
            f"adapter.calibration_batches={count}: the first {count * rows} rows of data.train "
            f"have no supervised token, which init={config.adapter.init} needs; raise it"
        )
    return calibrate_on(model, config, batches)


def calibrate_on(model: Model, config: Config, batches: list[Batch]) -> jax.tree_util.Partial:
    """Return `calibrate(params)` over these batches of one shape, in pieces of `micro_batch_size`
    rows. Parameters may hold `Probe`s, which count the supervised tokens (of a classifier, all
    tokens).
    """
    pieces = config.train.batch_size // (config.train.micro_batch_size or config.train.batch_size)

    @jax.checkpoint
    def nll(params: Mapping, batch: Batch) -> jax.Array:
        counted = (batch["segment_ids"] != 0) & (bool(model.labels) | (batch["loss_weights"] != 0))
        bound = _with_rows(params, counted.reshape(-1).astype(jnp.float32))
        return batch_sums(model, bound, batch, config, config.train.remat)[0]

    def mean_loss(batches: list[Batch], params: Mapping) -> jax.Array:
        # A piece takes rows from across its batch, so no row moves to another device.
        split = [
            jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)
            for batch in batches
        ]
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), *split)

        def add(total: jax.Array, batch: Batch) -> tuple[jax.Array, None]:
            return total + nll(params, batch), None

        total, _ = jax.lax.scan(add, jnp.float32(0), joined)
        return total / joined["loss_weights"][:, :, 1:].sum()

    return jax.tree_util.Partial(mean_loss, batches)


def _with_rows(params: Mapping, counted: jax.Array) -> dict:
    """Set the rows that every `Probe` counts, the same for each layer of a stack."""
    leaves = flatten(params)
    for path, leaf in leaves.items():
        if isinstance(leaf, Probe):
            rows = jnp.broadcast_to(counted, (*leaf.shape[:-2], *counted.shape))
            leaves[path] = dataclasses.replace(leaf, counted=rows)
    return unflatten(leaves)
