"""Weights that train in full: all of them, those of modules_to_save, biases, token rows.

params    lm_head/kernel          frozen, as it was       model/embed_tokens/embedding
adapters  lm_head/full_kernel     float32, trains         model/embed_tokens/trainable_tokens
bound     lm_head/kernel          the trained one         W + one_hot (rows - W[indices])
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.targets import HEAD, Trainable
from lora_jax.tree import Path
from lora_jax.weights import LoraWeight, materialize

Leaves = dict[Path, Any]


def init(leaves: Mapping[Path, Any], found: Trainable) -> Leaves:
    """Return float32 copies of the weights that train."""
    adapters: Leaves = {}
    for whole in found.whole:
        path = found.untied if whole.path == HEAD and found.untied else whole.path
        start = leaves[path] if path == whole.path else leaves[path].T
        adapters[whole.trained] = jnp.array(materialize(start), jnp.float32)
    for rows in found.rows:
        taken = jnp.take(leaves[rows.path], jnp.asarray(rows.indices), axis=0)
        adapters[rows.trained] = taken.astype(jnp.float32)
    return adapters


def bind(leaves: Mapping[Path, Any], small: Mapping[Path, Any], found: Trainable) -> Leaves:
    """Replace frozen values with the trained ones; slices that do not train are unchanged."""
    bound: Leaves = {}
    for whole in found.whole:
        bound[whole.path] = small[whole.trained]
        if not all(whole.chosen):
            kept = leaves[whole.path].astype(jnp.float32)
            bound[whole.path] = jnp.where(whole.mask(), small[whole.trained], kept)
    for rows in found.rows:
        weight, trained = leaves[rows.path], small[rows.trained]
        indices = jnp.asarray(rows.indices)
        place = jax.nn.one_hot(indices, weight.shape[0], axis=0, dtype=jnp.float32)  # (vocab, n)
        change = trained - jnp.take(weight, indices, axis=0).astype(jnp.float32)
        bound[rows.path] = LoraWeight(weight, place, change)
    return bound
