"""Sizes of adapters and of the update they make, per module and layer, without building it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import tree
from lora_jax.adapters import bind
from lora_jax.config import AdapterConfig
from lora_jax.weights import LoraWeight


@jax.jit
def _norms(weight: LoraWeight, lora_a: jax.Array, lora_b: jax.Array) -> dict[str, jax.Array]:
    """Frobenius norms over the last two axes.

    |a b|^2 = sum((a^T a) * (b b^T)), which takes rank x rank products only.
    """

    def norm(x):
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1)))

    with jax.default_matmul_precision("highest"):
        inner = (jnp.swapaxes(weight.a, -1, -2) @ weight.a) * (
            weight.b @ jnp.swapaxes(weight.b, -1, -2)
        )
    update = jnp.sqrt(jnp.maximum(inner.sum(axis=(-2, -1)), 0))
    return {
        "lora_a": norm(lora_a),
        "lora_b": norm(lora_b),
        "update": update,
        "relative": update / norm(weight.base),
    }


def measure(params: Mapping, adapters: Mapping, config: AdapterConfig) -> dict[str, dict]:
    """Per adapted module the Frobenius norms of `lora_a`, `lora_b`, of the `update` with its scale,
    and the update `relative` to the weight: lists with a number per layer, null where the layer is
    not adapted (and for `relative`, where the weight is zero).
    """
    bound, flat = tree.flatten(bind(params, adapters, config)), tree.flatten(adapters)
    found = {}
    for target in tree.find_targets(params, config):
        weight = bound[(*target.path, target.leaf)]
        parts = (flat[(*target.path, part)] for part in ("lora_a", "lora_b"))
        values = {name: np.atleast_1d(x) for name, x in _norms(weight, *parts).items()}
        found[tree.dotted(target.path)] = {
            name: [
                float(x) if rank and np.isfinite(x) else None
                for x, rank in zip(numbers, target.ranks, strict=True)
            ]
            for name, numbers in values.items()
        }
    return found


def summarize(norms: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The root mean square over modules and layers of each norm: one number for a log line."""
    kinds = {
        name: [x for module in norms.values() for x in module[name] if x is not None]
        for name in ("lora_a", "lora_b", "update", "relative")
    }
    return {
        f"norm_{name}": float(np.sqrt(np.mean(np.square(values)))) for name, values in kinds.items()
    }
