"""Methods as pairs of pure functions over parameter trees.

params, adapters = init(key, params, config)       # trainable tree: only what trains
bound            = bind(params, adapters, config)  # same tree as params, targeted leaves adapted
merged           = merge(bound)                    # plain arrays again

`config` is an `AdapterConfig`, or the `Trainable` that `find_trainable` returns for it. `init`
returns `params` unchanged, except for inits that subtract their factors from the base (pissa,
olora, lora_ga, loftq of several rounds) and for `method: full`, where the trainable tree holds
every parameter. Virtual tokens (`prompt`, `prefix`) leave the parameters unchanged and are an
argument of the forward:

logits = model.apply(bound, tokens, prefix=prefix(adapters, config))       # None for other methods
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax.adapters import eva, full, low_rank, prompt, vera
from lora_jax.adapters.member import MemberSettings as MemberSettings
from lora_jax.adapters.prompt import as_model_sees as as_model_sees
from lora_jax.adapters.stacks import stack as stack
from lora_jax.adapters.stacks import unstack as unstack
from lora_jax.bank import Bank as Bank
from lora_jax.bank import bank as bank
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
    """Return the base and fresh float32 adapters, placed like the weights that they adapt.

    `calibrate`, for init eva and lora_ga, is a differentiable function from parameters to the mean
    loss of some data; pass its arrays as arguments of a `jax.tree_util.Partial`. For virtual tokens
    it is `as_model_sees(...)`. `scheme`, for loftq, is the one that `quantize_tree` will quantise
    the base with.

    Raises:
        UserError: what `lora_jax.targets.find_trainable` refuses; an init that would subtract its
            factors from a quantised weight, or that lacks the data, model or scheme it needs.

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
    """Return the config with EVA's rank for every module, at most `eva_rho` times its own. It is
    unchanged unless `init` is eva and `eva_rho` is above 1. `lora.init` itself keeps the ranks.

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
            f"init={config.init} needs data: pass calibrate, a function "
            "from parameters to the mean loss of a batch (a run takes it from data.train)"
        )
    if config.init == "loftq":
        if scheme is None:
            raise UserError(
                "init=loftq corrects the error of quantisation: pass scheme, which the base will "
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
    """Return the base that `init` returned with `adapters`, from the original `params`."""
    found, leaves = as_trainable(params, config), flatten(params)
    if found.config.trains_everything:
        return init(jax.random.key(0), params, found)[0]
    changed = low_rank.residual(leaves, flatten(adapters), found)
    return unflatten(leaves | changed) if changed else params


def initial_params(
    params: Mapping, adapters: Mapping, config: AdapterConfig | Trainable
) -> Mapping:
    """Return the parameters before the first step: the base of `adapters`, with the factors that an
    init subtracted added back. For `method: full`, only the files hold them.
    """
    found, leaves = as_trainable(params, config), flatten(params)
    put_back = low_rank.initial(leaves, flatten(adapters), found)
    return unflatten(leaves | put_back) if put_back else params


def factors(
    target: Target, adapters: Mapping[Path, Any], found: Trainable
) -> tuple[jax.Array, jax.Array]:
    """Return `a` (..., in, rank) and `b` (..., rank, out) of a target's update, with every scale
    folded into `b`. `adapters` is a flat tree.
    """
    method = vera if found.config.trains_vera else low_rank
    return method.factors(target, adapters, found)


def learnt_factors(
    target: Target, adapters: Mapping[Path, Any], found: Trainable
) -> tuple[jax.Array, jax.Array]:
    """Return `factors` of the change since the start, without what an init subtracted from the
    base.
    """
    a, b = factors(target, adapters, found)
    return low_rank.without_start(target, adapters, found, a, b)


def bind(
    params: Mapping,
    adapters: Mapping,
    config: AdapterConfig | Trainable,
    key: jax.Array | None = None,
    member: MemberSettings | None = None,
) -> dict:
    """Return the tree that the model runs on. With a key, dropout is on; without one it is off.
    `member` has settings as arrays, in place of those of `config` (`lora_jax.adapters.member`).

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
    # Slices of a stack that do not train in full can have adapters over the updated stack.
    own = {path: leaf for path, leaf in full_weights.items() if path != found.untied}
    if member is None:
        drops = None if key is None else low_rank.Drops(key)
        adapted = low_rank.bind(leaves | own, small, found, factors, drops)
    else:
        adapted = member.bind(leaves | own, small, found, key)
    bound = full_weights | adapted
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
        raise UserError(
            f"{call}: the third argument is not an AdapterConfig but a {type(config).__name__}"
        )


def _untie(embedding: jax.Array, bound: Mapping, found: Trainable) -> Untied:
    head = bound.get(HEAD)
    if isinstance(head, LoraWeight):  # in the embedding's layout, over the very same array
        gain = None if head.gain is None else head.gain.T
        drops = head.key, head.dropout, head.keep
        head = LoraWeight(embedding, head.b.T, head.a.T, gain, *drops)
    elif head is not None:
        head = head.T
    return Untied(bound.get(found.untied, embedding), embedding if head is None else head)


def prefix(adapters: Mapping, config: AdapterConfig | Trainable) -> Virtual | None:
    """Return the virtual tokens for the forward; None for methods that change the parameters."""
    return prompt.value(adapters, config.config if isinstance(config, Trainable) else config)


def merge(bound: Mapping) -> dict:
    """Return plain arrays: every adapted leaf becomes W + update, added in float32 and rounded
    once. A tied embedding that is adapted in only one of its uses becomes an `Untied` of two
    arrays.

    Raises:
        UserError: the tree holds adapters, or is no tree.

    Example:
        >>> merged = lora.merge(lora.bind(params, adapters, config))  # lora_b starts at zero
        >>> bool((merged["proj"]["kernel"] == params["proj"]["kernel"]).all())
        True
    """
    call = "merge takes a bound tree, lora.merge(lora.bind(params, adapters, config))"
    check_parameters(bound, call)
    leaves = {path: materialize(leaf) for path, leaf in flatten(bound).items()}
    return unflatten(leaves)
