"""Methods as pairs of pure functions over parameter trees.

params, adapters = init(key, params, config)       # trainable tree: only what trains
bound            = bind(params, adapters, config)  # same tree as params, targeted leaves adapted
merged           = merge(bound)                    # plain arrays again

`params` comes back as it was, but for inits that take their part out of the base (pissa, olora),
and for `method: full`, where the trainable tree holds all of it. Virtual tokens (`prompt`,
`prefix`) leave the parameters alone and go to the forward beside them:

logits = model.apply(bound, tokens, prefix=prefix(adapters, config))       # None of other methods
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lora_jax.adapters import full, lora, prompt
from lora_jax.adapters.prompt import as_model_sees as as_model_sees
from lora_jax.config import SOFT, AdapterConfig
from lora_jax.targets import HEAD, Trainable, check_init
from lora_jax.targets import find_targets as find_targets
from lora_jax.targets import find_trainable as find_trainable
from lora_jax.tree import check_same_structure, flatten, unflatten
from lora_jax.virtual import Virtual
from lora_jax.weights import Absent, LoraWeight, Untied, materialize


def init(
    key: jax.Array, params: Mapping, config: AdapterConfig, calibrate: Callable | None = None
) -> tuple[Mapping, dict]:
    """Trainable adapters (float32) for `params`, and the base they stand on. `calibrate` runs the
    model for those that start from what it makes of tokens (`as_model_sees`).

    Raises:
        UserError: what `lora_jax.targets.find_trainable` refuses; an init that would take its part
            out of a quantised weight; one that needs `calibrate`.
    """
    found = find_trainable(params, config)
    if config.method in SOFT:
        return params, prompt.init(key, params, found, calibrate)
    check_init(params, found)
    return _init(key, params, found)


def _init(key: jax.Array, params: Mapping, found: Trainable) -> tuple[Mapping, dict]:
    config, leaves = found.config, flatten(params)
    adapters = full.init(leaves, found)
    if config.method == "full":
        absent = {path: Absent(tuple(leaf.shape), leaf.dtype) for path, leaf in leaves.items()}
        return unflatten(absent), unflatten(adapters)
    changed, factors = lora.init(key, leaves, found)
    base = unflatten(leaves | changed) if changed else params
    return base, unflatten(adapters | factors)


def shapes(params: Mapping, config: AdapterConfig) -> dict:
    """The tree that `init` would give, as shapes; `params` may be shapes too.

    Raises:
        UserError: as `find_trainable`.
    """
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, Absent) else leaf
        for path, leaf in flatten(params).items()
    }
    if config.method in SOFT:
        found = find_trainable(params, config)
        return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in found.virtual.items()}
    return jax.eval_shape(
        lambda params: _init(jax.random.key(0), params, find_trainable(params, config))[1],
        unflatten(leaves),
    )


def residual(params: Mapping, adapters: Mapping, config: AdapterConfig) -> Mapping:
    """The base that `adapters` stand on, of the original `params`: what `init` gave beside them."""
    found, leaves = find_trainable(params, config), flatten(params)
    if config.method == "full":
        return init(jax.random.key(0), params, config)[0]
    changed = lora.residual(leaves, flatten(adapters), found)
    return unflatten(leaves | changed) if changed else params


def started(params: Mapping, adapters: Mapping, config: AdapterConfig) -> Mapping:
    """The model before the first step, of the base that `adapters` stand on: that base, and what an
    init took out of it put back. Not of `method: full`, whose start stands in the files alone.
    """
    found, leaves = find_trainable(params, config), flatten(params)
    put_back = lora.started(leaves, flatten(adapters), found)
    return unflatten(leaves | put_back) if put_back else params


def bind(
    params: Mapping, adapters: Mapping, config: AdapterConfig, key: jax.Array | None = None
) -> dict:
    """The tree that the model runs on. With a key, dropout is on; without one it is off.

    Raises:
        UserError: adapters whose paths or shapes are not those that `config` gives for `params`.
    """
    expected = shapes(params, config)
    check_same_structure(adapters, expected, "these adapters do not fit the model and config")
    found, leaves, small = find_trainable(params, config), flatten(params), flatten(adapters)
    whole = full.bind(leaves, small, found)
    # Other slices of a stack that trains in part can have adapters; they stand on what it becomes.
    own = {path: leaf for path, leaf in whole.items() if path != found.untied}
    bound = whole | lora.bind(leaves | own, small, found, key)
    if found.untied is not None:
        bound |= {found.untied: _untie(leaves[found.untied], bound, found)}
        bound.pop(HEAD, None)
    return unflatten(leaves | bound)


def _untie(embedding: jax.Array, bound: Mapping, found: Trainable) -> Untied:
    head = bound.get(HEAD)
    if isinstance(head, LoraWeight):  # in the embedding's layout, over the very same array
        gain = None if head.gain is None else head.gain.T
        head = LoraWeight(embedding, head.b.T, head.a.T, gain, head.key, head.dropout)
    elif head is not None:
        head = head.T
    return Untied(bound.get(found.untied, embedding), embedding if head is None else head)


def prefix(adapters: Mapping, config: AdapterConfig) -> Virtual | None:
    """The virtual tokens for the forward; None of methods that change the parameters."""
    return prompt.value(adapters, config)


def merge(bound: Mapping) -> dict:
    """Plain arrays again: every adapted leaf becomes W + update, added in float32 and rounded
    once. Of an embedding that is adapted in one of its two uses, an `Untied` of both arrays.
    """
    leaves = {path: materialize(leaf) for path, leaf in flatten(bound).items()}
    return unflatten(leaves)
