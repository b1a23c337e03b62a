"""LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732) as trees.

params    model/layers/self_attn/q_proj/kernel                     (layers, in, out)
adapters  model/layers/self_attn/q_proj/{lora_a, lora_b}           (layers, in, rank), (layers,
rank, out) bound     model/layers/self_attn/q_proj/kernel = LoraWeight(base, a, scale * b)
"""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lora_jax.config import AdapterConfig
from lora_jax.tree import Target, dotted, find_targets, flatten, unflatten
from lora_jax.weights import LoraWeight


def init(key: jax.Array, params: Mapping, config: AdapterConfig) -> dict:
    """Fresh adapters in float32: A uniform in +-1/sqrt(in) (PEFT's Kaiming with a = sqrt(5)), B
    zero.

    The draw for a weight depends on the key and its own path, not on which other weights are
    adapted.
    """
    adapters = {}
    for target in find_targets(params, config):
        lead = (len(target.ranks),) if target.stacked else ()
        rows, columns = target.shape
        bound = rows**-0.5
        own = jax.random.fold_in(key, zlib.crc32(dotted(target.path).encode()))
        a = jax.random.uniform(own, (*lead, rows, target.rank), minval=-bound, maxval=bound)
        adapters[(*target.path, "lora_a")] = a * target.rank_mask()
        adapters[(*target.path, "lora_b")] = jnp.zeros((*lead, target.rank, columns))
    return unflatten(adapters)


def bind(
    params: Mapping, adapters: Mapping, config: AdapterConfig, key: jax.Array | None = None
) -> dict:
    """`params` with every targeted leaf replaced by a `LoraWeight`; `key` turns dropout on."""
    leaves, small = flatten(params), flatten(adapters)
    for index, target in enumerate(find_targets(params, config)):
        path = (*target.path, target.leaf)
        leaves[path] = LoraWeight(
            leaves[path],
            small[(*target.path, "lora_a")],
            small[(*target.path, "lora_b")] * target.scales(config.use_rslora),
            key=_dropout_keys(key, index, target) if config.dropout else None,
            dropout=config.dropout,
        )
    return unflatten(leaves)


def _dropout_keys(key: jax.Array | None, index: int, target: Target) -> jax.Array | None:
    if key is None:
        return None
    own = jax.random.fold_in(key, index)
    return jax.random.split(own, len(target.ranks)) if target.stacked else own
