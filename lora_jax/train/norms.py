"""Norms of adapters and of their updates, per module and layer, without building the updates."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as methods
from lora_jax import tree
from lora_jax.adapters.inits import over_slices
from lora_jax.config import AdapterConfig
from lora_jax.sharding import gather_to_host
from lora_jax.targets import HEAD, Target, Trainable, as_trainable


@functools.partial(jax.jit, static_argnums=1)
def _norm(x: jax.Array, lead: int = 0) -> jax.Array:
    """Return the Frobenius norm over all axes behind the first `lead`."""
    axes = tuple(range(lead, x.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes))


@jax.jit
def _update_norm(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return |a b| = sqrt(sum((a^T a) * (b b^T))), which needs rank x rank products only."""
    with jax.default_matmul_precision("highest"):
        inner = (jnp.swapaxes(a, -1, -2) @ a) * (b @ jnp.swapaxes(b, -1, -2))
    return jnp.sqrt(jnp.maximum(inner.sum(axis=(-2, -1)), 0))


def measure(
    params: Mapping, adapters: Mapping, config: AdapterConfig | Trainable
) -> dict[str, dict]:
    """Return the Frobenius norms of each adapted module: of its factors (`lora_a`, `lora_b`), of
    the scaled `update`, and of the update `relative` to the weight. For an init that changes the
    base, the update is the change since the start. Each is a list with a number per layer, null if
    the layer is not adapted (and for `relative`, if the weight is zero).
    """
    found, leaves = as_trainable(params, config), tree.flatten(params)
    small = tree.flatten(adapters)
    sizes = {}
    for target in found.targets:
        path = target.weight
        weight = leaves[found.untied if path == HEAD and found.untied else path]

        def in_layer(norms: jax.Array, experts: int | None = target.experts) -> jax.Array:
            return norms if experts is None else jnp.sqrt(jnp.square(norms).sum(axis=-1))

        values = {
            name: in_layer(_norm(small[(*target.path, name)], len(target.lead)))
            for name in target.factors
        }
        values["update"] = in_layer(_update_norm(*methods.learnt_factors(target, small, found)))
        values["relative"] = values["update"] / in_layer(over_slices(_norm, target, weight))
        sizes[tree.dotted(target.path)] = {
            name: _by_layer(numbers, target) for name, numbers in values.items()
        }
    return sizes


def _by_layer(numbers: jax.Array, target: Target) -> list[float | None]:
    return [
        float(x) if rank and np.isfinite(x) else None
        for x, rank in zip(np.atleast_1d(gather_to_host(numbers)), target.ranks, strict=True)
    ]


def summarize(norms: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the root mean square of each norm over modules and layers, for a log line; empty if no
    module has an adapter.
    """
    kinds: dict[str, list[float]] = {}
    for module in norms.values():
        for name, numbers in module.items():
            kinds.setdefault(name, []).extend(x for x in numbers if x is not None)
    return {
        f"norm_{name}": float(np.sqrt(np.mean(np.square(values))))
        for name, values in kinds.items()
        if values
    }
