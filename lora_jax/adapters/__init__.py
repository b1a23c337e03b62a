"""Methods as pairs of pure functions over parameter trees.

params, adapters = init(key, params, config)       # trainable tree: only what trains
bound            = bind(params, adapters, config)  # same tree as params, targeted leaves adapted
merged           = merge(bound)                    # plain arrays again

`config` is an `AdapterConfig`, or the `Trainable` that was found for it with these params
(`find_trainable`): a run finds it once and hands it on. `params` comes back as it was, but for
inits that take their part out of the base (pissa, olora, lora_ga, loftq of several rounds), and for
`method: full`, where the trainable tree holds all of it. Virtual tokens (`prompt`, `prefix`) leave
the parameters alone and are an argument of the forward:

logits = model.apply(bound, tokens, prefix=prefix(adapters, config))       # None of other methods
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax.adapters import eva, full, low_rank, prompt, vera
from lora_jax.adapters.prompt import as_model_sees as as_model_sees
from lora_jax.config import DATA_INITS, AdapterConfig
from lora_jax.errors import UserError
from lora_jax.nn.virtual import Virtual
from lora_jax.quantize import SCHEMES, check_scheme
from lora_jax.sharding import place_adapters as place_adapters
from lora_jax.sharding import place_state as place_state
from lora_jax.targets import HEAD, Target, Trainable, as_trainable, check_init
from lora_jax.targets import find_targets as find_targets
from lora_jax.targets import find_trainable as find_trainable
from lora_jax.tree import (
    Path,
    are_adapters,
    check_adapters,
    check_parameters,
    check_same_structure,
    flatten,
    unflatten,
)
from lora_jax.weights import Absent, LoraWeight, Untied, materialize


def init(
    key: jax.Array,
    params: Mapping,
    config: AdapterConfig | Trainable,
    calibrate: Callable | None = None,
    *,
    scheme: str | None = None,
) -> tuple[Mapping, dict]:
    """Return the base and fresh adapters (float32) over it, placed as the weights that they adapt.

    `calibrate`, for init eva and lora_ga, is a differentiable function from parameters to the mean
    loss of some data; arrays that it needs are best the arguments of a `jax.tree_util.Partial`.
    For virtual tokens it is `as_model_sees`. `scheme`, for loftq, is what the base will be
    quantised with (`quantize_tree`).

    Raises:
        UserError: what `lora_jax.targets.find_trainable` refuses; an init that would take its part
            out of a quantised weight; one without the data, the model or the scheme that it needs.

    Example:
        >>> tree = {"proj": {"kernel": jnp.ones((4, 3))}}
        >>> params, adapters = lora.init(jax.random.key(0), tree, AdapterConfig(rank=2))
        >>> jax.tree.map(jnp.shape, adapters)
        {'proj': {'lora_a': (4, 2), 'lora_b': (2, 3)}}
    """
    check_parameters(params, "init takes a key, params and a config, in this order")
    found = as_trainable(params, config)
    if found.config.trains_virtual_tokens:
        return params, place_adapters(prompt.init(key, params, found, calibrate), params)
    check_init(params, found)
    _check_given(found.config, calibrate, scheme)
    base, adapters = _init(key, params, found, _as_tree(calibrate), scheme)
    return base, place_adapters(adapters, params)


def redistribute(
    key: jax.Array, params: Mapping, config: AdapterConfig | Trainable, calibrate: Callable
) -> AdapterConfig:
    """Return the config with the ranks that EVA gives every module, up to `eva_rho` times its own;
    as it is, unless `init` is eva and `eva_rho` above 1. `init` takes ranks as they are.

    Raises:
        UserError: as `init`.
    """
    settings = config.config if isinstance(config, Trainable) else config
    if settings.init != "eva" or settings.eva_rho == 1:
        return settings
    _check_given(settings, calibrate, None)
    return eva.redistribute(key, params, as_trainable(params, config), _as_tree(calibrate))


def _check_given(config: AdapterConfig, calibrate: Any, scheme: str | None) -> None:
    if config.init in DATA_INITS and calibrate is None:
        raise UserError(
            f"init={config.init} looks at data, and none are given: pass calibrate, a function "
            "from parameters to the mean loss of a batch (a run takes it from data.train)"
        )
    if config.init == "loftq":
        if scheme is None:
            raise UserError(
                "init=loftq makes up for what quantisation loses: pass scheme, what the base will "
                f"be quantised with ({' or '.join(SCHEMES)}; a run takes it from base_dtype)"
            )
        check_scheme(scheme)


def _as_tree(function: Any) -> Any:
    """Return a function as a pytree, which a compiled function can take."""
    known = function is None or isinstance(function, jax.tree_util.Partial)
    return function if known else jax.tree_util.Partial(function)


def _init(
    key: jax.Array, params: Mapping, found: Trainable, calibrate: Any, scheme: str | None
) -> tuple[Mapping, dict]:
    leaves = flatten(params)
    adapters = full.init(leaves, found)
    if found.config.trains_everything:
        absent = {path: Absent(tuple(leaf.shape), leaf.dtype) for path, leaf in leaves.items()}
        return unflatten(absent), unflatten(adapters)
    if found.config.trains_vera:
        return params, unflatten(adapters | vera.init(found))
    changed, factors = low_rank.init(key, leaves, found, calibrate, scheme)
    base = unflatten(leaves | changed) if changed else params
    return base, unflatten(adapters | factors)


def shapes(params: Mapping, config: AdapterConfig | Trainable) -> dict:
    """Return the tree of adapters that `init` would give, as shapes; `params` may be shapes too.

    Raises:
        UserError: as `find_trainable`.

    Example:
        >>> lora.shapes(params, AdapterConfig(rank=2))["proj"]["lora_a"]
        ShapeDtypeStruct(shape=(4, 2), dtype=float32)
    """
    return as_trainable(params, config).shapes


def residual(params: Mapping, adapters: Mapping, config: AdapterConfig | Trainable) -> Mapping:
    """Return the base of `adapters`, from the original `params`: the one that `init` gave."""
    found, leaves = as_trainable(params, config), flatten(params)
    if found.config.trains_everything:
        return init(jax.random.key(0), params, found)[0]
    changed = low_rank.residual(leaves, flatten(adapters), found)
    return unflatten(leaves | changed) if changed else params


def initial_params(
    params: Mapping, adapters: Mapping, config: AdapterConfig | Trainable
) -> Mapping:
    """Return the model before the first step, from the base of `adapters`: that base, with the part
    that an init took out of it put back. Of `method: full` only the files have it.
    """
    found, leaves = as_trainable(params, config), flatten(params)
    put_back = low_rank.initial(leaves, flatten(adapters), found)
    return unflatten(leaves | put_back) if put_back else params


def factors(
    target: Target, adapters: Mapping[Path, Any], found: Trainable
) -> tuple[jax.Array, jax.Array]:
    """Return `a` (..., in, rank) and `b` (..., rank, out) of the update of a target, every scale in
    `b`. `adapters` are flat.
    """
    method = vera if found.config.trains_vera else low_rank
    return method.factors(target, adapters, found)


def learnt_factors(
    target: Target, adapters: Mapping[Path, Any], found: Trainable
) -> tuple[jax.Array, jax.Array]:
    """Return `factors` of the update since the start: without the part that an init took out of the
    base.
    """
    a, b = factors(target, adapters, found)
    return low_rank.without_start(target, adapters, found, a, b)


def bind(
    params: Mapping,
    adapters: Mapping,
    config: AdapterConfig | Trainable,
    key: jax.Array | None = None,
) -> dict:
    """Return the tree that the model runs on. With a key, dropout is on; without one it is off.

    Raises:
        UserError: adapters whose paths or shapes are not those that `config` gives for `params`.

    Example:
        >>> bound = lora.bind(params, adapters, config)
        >>> type(bound["proj"]["kernel"]).__name__
        'LoraWeight'
    """
    _check_order(params, adapters, config)
    found = as_trainable(params, config)
    check_same_structure(adapters, found.shapes, "these adapters do not fit the model and config")
    leaves, small = flatten(params), flatten(adapters)
    full_weights = full.bind(leaves, small, found)
    # Other slices of a stack that trains in part can have adapters, over what it becomes.
    own = {path: leaf for path, leaf in full_weights.items() if path != found.untied}
    bound = full_weights | low_rank.bind(leaves | own, small, found, factors, key)
    if found.untied is not None:
        bound |= {found.untied: _untie(leaves[found.untied], bound, found)}
        bound.pop(HEAD, None)
    return unflatten(leaves | bound)


def _check_order(params: Any, adapters: Any, config: Any) -> None:
    call = "bind takes params, adapters and a config, in this order"
    if are_adapters(params) and isinstance(adapters, Mapping) and not are_adapters(adapters):
        raise UserError(f"{call}: got adapters first and parameters second; swap them")
    check_parameters(params, call)
    check_adapters(adapters, call)
    if not isinstance(config, AdapterConfig | Trainable):
        raise UserError(f"{call}: the third is not an AdapterConfig but a {type(config).__name__}")


def _untie(embedding: jax.Array, bound: Mapping, found: Trainable) -> Untied:
    head = bound.get(HEAD)
    if isinstance(head, LoraWeight):  # in the embedding's layout, over the very same array
        gain = None if head.gain is None else head.gain.T
        head = LoraWeight(embedding, head.b.T, head.a.T, gain, head.key, head.dropout)
    elif head is not None:
        head = head.T
    return Untied(bound.get(found.untied, embedding), embedding if head is None else head)


def prefix(adapters: Mapping, config: AdapterConfig | Trainable) -> Virtual | None:
    """Return the virtual tokens for the forward; None for methods that change the parameters."""
    return prompt.value(adapters, config.config if isinstance(config, Trainable) else config)


def merge(bound: Mapping) -> dict:
    """Return plain arrays: every adapted leaf becomes W + update, added in float32 and rounded
    once. An embedding that is adapted in one of its two uses becomes an `Untied` of both arrays.

    Raises:
        UserError: adapters, or no tree.

    Example:
        >>> merged = lora.merge(lora.bind(params, adapters, config))  # lora_b starts at zero
        >>> bool((merged["proj"]["kernel"] == params["proj"]["kernel"]).all())
        True
    """
    call = "merge takes a bound tree, lora.merge(lora.bind(params, adapters, config))"
    check_parameters(bound, call)
    leaves = {path: materialize(leaf) for path, leaf in flatten(bound).items()}
    return unflatten(leaves)
