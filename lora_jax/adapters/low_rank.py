"""LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732) as trees.

params    model/layers/self_attn/q_proj/kernel            (layers, in, out)
adapters  model/layers/self_attn/q_proj/{lora_a, lora_b}  (layers, in, rank), (layers, rank, out)
bound     model/layers/self_attn/q_proj/kernel            LoraWeight(base, a, scale * b)

An init that subtracts its factors from the base keeps them as the frozen leaves `init_a` and
`init_b`: base and update are W - scale init_a init_b and scale lora_a lora_b.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import dora, eva, inits, loftq, lora_ga
from lora_jax.leaves import known_kind
from lora_jax.quantize import quantize
from lora_jax.targets import HEAD, Target, Trainable
from lora_jax.tree import Path, unflatten
from lora_jax.weights import LoraWeight

Leaves = dict[Path, Any]
Factors = inits.Factors


@dataclass(frozen=True)
class Drops:
    """Dropout of a bound tree.

    keep: 1 - dropout as data, where members of a sweep differ; None: that of the config
    numbers: number of each target, which its key is folded with; None: its place in the tree
    """

    key: jax.Array
    keep: Any = None
    numbers: Mapping[Path, Any] | None = None

    def key_of(self, target: Target, place: int) -> jax.Array:
        """Return the key of a target, or one for each of its layers."""
        number = place if self.numbers is None else self.numbers[target.path]
        own = jax.random.fold_in(self.key, number)
        return jax.random.split(own, target.lead[:1]) if target.stacked else own

    def keep_of(self, target: Target) -> Any:
        """Return `keep`, or one for each layer of a target."""
        if self.keep is None:
            return None
        return jnp.broadcast_to(self.keep, target.lead[:1]) if target.stacked else self.keep


def init(
    key: jax.Array,
    leaves: Mapping[Path, Any],
    found: Trainable,
    calibrate: Any = None,
    scheme: str | None = None,
) -> tuple[Leaves, Leaves]:
    """Return the weights that replace those in `leaves`, and fresh adapters in float32."""
    config, changed, adapters = found.config, {}, {}
    starts = _starts(key, leaves, found, calibrate, scheme)
    for target in found.targets:
        (a, b), taken = starts[target.path]
        adapters[(*target.path, "lora_a")], adapters[(*target.path, "lora_b")] = a, b
        if config.changes_base:
            # Copies: a step that donates the adapters must not donate one array twice.
            a0, b0 = jax.tree.map(jnp.copy, taken)
            adapters[(*target.path, "init_a")], adapters[(*target.path, "init_b")] = a0, b0
            weight = changed.get(target.weight, _weight(leaves, target, found))
            changed[target.weight] = inits.subtract(target, weight, a0, b0, config.use_rslora)
    for target in found.targets if config.use_dora else ():
        weight = changed.get(target.weight, _weight(leaves, target, found))
        weight = quantize(weight, str(scheme)) if config.init == "loftq" else weight
        a, b = starts[target.path][0]
        norms = dora.column_norms(target, weight, a, b * target.scales(config.use_rslora))
        adapters[(*target.path, "magnitude")] = norms
    return changed, adapters


def _starts(
    key: jax.Array,
    leaves: Mapping[Path, Any],
    found: Trainable,
    calibrate: Any,
    scheme: str | None,
) -> dict[Path, tuple[Factors, Factors]]:
    """Return, by target, the factors that its update starts from, and those to subtract from the
    base, if any.
    """
    config, targets = found.config, found.targets
    match config.init:
        case "loftq":
            return loftq.factors(leaves, targets, str(scheme), config)
        case "eva":
            first = eva.factors(key, unflatten(leaves), targets, calibrate)
        case "lora_ga":
            params = unflatten(leaves)
            first = {t.path: lora_ga.factors(params, t, calibrate) for t in targets}
        case init:
            first = {
                t.path: inits.draw(key, t, _weight(leaves, t, found), init, config.use_rslora)
                for t in targets
            }
    return {path: (pair, pair) for path, pair in first.items()}


def residual(leaves: Mapping[Path, Any], small: Mapping[Path, Any], found: Trainable) -> Leaves:
    """Return the base of adapters whose init changes the base: the weights in `leaves`, which is
    the original base, minus the initial factors.
    """
    changed = {}
    for target in found.targets:
        if (*target.path, "init_a") in small:
            path = target.weight
            a, b = (small[(*target.path, part)] for part in ("init_a", "init_b"))
            weight = changed.get(path, leaves[path])
            changed[path] = inits.subtract(target, weight, a, b, found.config.use_rslora)
    return changed


def initial(leaves: Mapping[Path, Any], small: Mapping[Path, Any], found: Trainable) -> Leaves:
    """Return the weights before the first step, for an init that changes the base: the base with
    the subtracted factors bound to it. Initial magnitudes change nothing.
    """
    targets = tuple(t for t in found.targets if (*t.path, "init_a") in small)
    config = dataclasses.replace(found.config, use_dora=False, freeze_a=False)
    first = {
        (*target.path, name): small[(*target.path, name.replace("lora", "init"))]
        for target in targets
        for name in ("lora_a", "lora_b")
    }
    changing = dataclasses.replace(found, config=config, targets=targets)
    return bind(dict(leaves), first, changing, factors, None)


def factors(target: Target, small: Mapping[Path, Any], found: Trainable) -> Factors:
    """Return `lora_a`, and `lora_b` with its scale."""
    a, b = (small[(*target.path, part)] for part in ("lora_a", "lora_b"))
    a = jax.lax.stop_gradient(a) if found.config.freeze_a else a
    return a, b * target.scales(found.config.use_rslora)


def without_start(
    target: Target, small: Mapping[Path, Any], found: Trainable, a: jax.Array, b: jax.Array
) -> Factors:
    """Return [a, a0] and [b; -b0], where a0 and b0 are the factors that an init subtracted from the
    base; without such factors, a and b.
    """
    if "init_a" not in target.leaves:
        return a, b
    a0, b0 = (small[(*target.path, part)] for part in ("init_a", "init_b"))
    b0 = b0 * target.scales(found.config.use_rslora)
    return jnp.concatenate([a, a0], axis=-1), jnp.concatenate([b, -b0], axis=-2)


def bind(
    leaves: Leaves,
    small: Mapping[Path, Any],
    found: Trainable,
    make_factors: Callable[[Target, Mapping[Path, Any], Trainable], Factors],
    drops: Drops | None,
    adapted: Mapping[Path, Any] = {},
) -> Leaves:
    """Return the targeted leaves as `LoraWeight`s of the factors that `make_factors` gives; `drops`
    turns dropout on. `adapted` says which layers of a target DoRA scales; by default, all of those
    that are adapted.
    """
    config, bound = found.config, {}
    for index, target in enumerate(found.targets):
        weight = _weight(leaves, target, found)
        a, b = make_factors(target, small, found)
        gain = None
        if config.use_dora:
            magnitude = small[(*target.path, "magnitude")]
            gain = dora.gain(target, weight, (a, b), magnitude, adapted.get(target.path))
        # PEFT has no dropout in the update of an embedding.
        has_dropout = drops and config.dropout > 0 and target.leaf != "embedding"
        own = drops.key_of(target, index) if drops and has_dropout else None
        keep = drops.keep_of(target) if drops and has_dropout else None
        b = inits.in_columns(target, b, weight.shape[-1])
        gain = None if gain is None else inits.in_columns(target, gain, weight.shape[-1], 1.0)
        leaf = LoraWeight(weight, a, b, gain, own, config.dropout, keep)
        other = bound.get(target.weight)
        bound[target.weight] = leaf if other is None else _concatenate_ranks(other, leaf)
    return bound


def _concatenate_ranks(one: LoraWeight, other: LoraWeight) -> LoraWeight:
    """Join the adapters of two parts of a fused projection; the ranks add up."""
    return dataclasses.replace(
        one,
        a=jnp.concatenate([one.a, other.a], axis=-1),
        b=jnp.concatenate([one.b, other.b], axis=-2),
        gain=None if one.gain is None or other.gain is None else one.gain * other.gain,
    )


def _weight(leaves: Mapping[Path, Any], target: Target, found: Trainable) -> Any:
    """Return the frozen weight of a target; a tied head is the embedding transposed."""
    path = target.weight
    if path == HEAD and found.untied is not None:
        embedding = leaves[found.untied]
        shape = (embedding.shape[1], embedding.shape[0])
        is_array = isinstance(embedding, jax.Array)
        return embedding.T if is_array else jax.ShapeDtypeStruct(shape, embedding.dtype)
    return leaves[path]


def as_plain(small: Mapping[Path, Any], found: Trainable) -> tuple[Leaves, Trainable]:
    """Return adapters of an init that changes the base as plain ones of twice the rank over the
    original base, and their `Trainable`: W - s a0 b0 + s a b = W + s [a, a0] [b; -b0].

    The scale does not change: alpha doubles with the rank, or grows by sqrt(2) under rsLoRA.
    """
    leaves, targets = dict(small), []
    growth = 2**0.5 if found.config.use_rslora else 2.0
    for target in found.targets:
        parts = [leaves.pop((*target.path, n)) for n in ("lora_a", "init_a", "lora_b", "init_b")]
        a, a0, b, b0 = parts
        order = _by_slice(target)
        joined_a = jnp.concatenate([a, a0], axis=-1)
        joined_b = jnp.concatenate([b, -b0], axis=-2)
        leaves[(*target.path, "lora_a")] = jnp.take_along_axis(joined_a, order[..., None, :], -1)
        leaves[(*target.path, "lora_b")] = jnp.take_along_axis(joined_b, order[..., :, None], -2)
        ranks = tuple(2 * rank for rank in target.ranks)
        alphas = tuple(growth * alpha for alpha in target.alphas)
        kept = tuple(name for name in target.leaves if known_kind(name).file)
        targets.append(dataclasses.replace(target, ranks=ranks, alphas=alphas, leaves=kept))
    config = dataclasses.replace(
        found.config,
        init="default",
        rank=2 * found.config.rank,
        alpha=growth * found.config.alpha,
        rank_pattern={name: 2 * rank for name, rank in found.config.rank_pattern.items()},
        alpha_pattern={n: growth * alpha for n, alpha in found.config.alpha_pattern.items()},
    )
    return leaves, dataclasses.replace(found, config=config, targets=tuple(targets))


def _by_slice(target: Target) -> jax.Array:
    """Return the order that puts the real columns of both halves first, for every slice."""
    real = jnp.tile(
        jnp.asarray(target.rank_mask()[..., 0, :] if target.stacked else target.rank_mask()[0]), 2
    )
    return jnp.argsort(real == 0, axis=-1, stable=True)
