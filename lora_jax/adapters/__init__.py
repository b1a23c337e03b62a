"""Methods as pairs of pure functions over parameter trees.

params, adapters = init(key, params, config)     # trainable tree: only the targeted paths
bound            = bind(params, adapters, config)  # same tree as params, targeted leaves adapted
merged           = merge(bound)                    # plain arrays again
"""

from collections.abc import Mapping

import jax

from lora_jax.adapters import lora
from lora_jax.config import AdapterConfig, UserError
from lora_jax.tree import check_same_structure
from lora_jax.tree import find_targets as find_targets
from lora_jax.weights import LoraWeight, materialize


def init(key: jax.Array, params: Mapping, config: AdapterConfig) -> tuple[Mapping, dict]:
    """Trainable adapters for `params`, and the params themselves.

    Raises:
        UserError: what `lora_jax.tree.find_targets` refuses, or an unknown method.
    """
    match config.method:
        case "lora":
            return params, lora.init(key, params, config)
    raise UserError(f"adapter.method={config.method!r} is not one of: lora")


def bind(
    params: Mapping, adapters: Mapping, config: AdapterConfig, key: jax.Array | None = None
) -> dict:
    """The tree that the model runs on. With a key, dropout is on; without one it is off.

    Raises:
        UserError: adapters whose paths or shapes are not those that `config` gives for `params`.
    """
    expected = jax.eval_shape(lambda: init(jax.random.key(0), params, config)[1])
    check_same_structure(adapters, expected, "these adapters do not fit the model and config")
    match config.method:
        case "lora":
            return lora.bind(params, adapters, config, key)
    raise UserError(f"adapter.method={config.method!r} is not one of: lora")


def merge(bound: Mapping) -> dict:
    """Plain arrays again: every adapted leaf becomes W + update, added in float32 and rounded
    once.
    """
    return jax.tree.map(materialize, bound, is_leaf=lambda leaf: isinstance(leaf, LoraWeight))
