"""Stacks of layers: layers of one shape are one stack, whose parameters have a `layers` axis.

model / layers / self_attn / ...          all layers are alike: one stack, scanned
model / layers / 0-1,3 / conv / ...       layers of several shapes: a stack of each, whose key
model / layers / 2,4 / self_attn / ...    names its layers (`tree.stack_key`)

Several stacks run in the order of the model: each run of consecutive layers of one shape is a scan
over a slice of its stack. A layer whose keys and values later layers share is a run of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import tree
from lora_jax.models.common import ATTENTION
from lora_jax.nn.cache import Cache, States, cached_layers
from lora_jax.weights import Layered, is_layered

Blocks = Callable | Mapping[str, Callable]


@dataclass(frozen=True)
class Run:
    """Consecutive layers of one shape."""

    layers: tuple[int, int]  # first and one past the last, in the model
    key: str  # of their stack
    start: int  # index of the first in its stack
    cached: int  # and in the keys or states of the cache
    has_state: bool  # in place of keys and values
    group: int = 0  # of the layers with heads of their shape, in the cache
    source: int | None = None  # the layer whose keys and values they share
    is_source: bool = False  # a single layer, whose keys and values later ones share


def stacks_of(shapes: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return the layers of each shape, in the order of their first ones.

    >>> stacks_of(("conv", "attention", "conv"))
    {'conv': (0, 2), 'attention': (1,)}
    """
    found: dict[str, tuple[int, ...]] = {}
    for layer, shape in enumerate(shapes):
        found[shape] = (*found.get(shape, ()), layer)
    return found


def make_layers(config: Any, blocks: Blocks, rngs: nnx.Rngs) -> nnx.Module:
    """Return one stack, or a module of several by their keys."""
    stacks = stacks_of(config.shapes)

    def stack(shape: str) -> nnx.Module:
        block = blocks if callable(blocks) else blocks[shape]
        return nnx.vmap(lambda own: block(config, rngs=own))(rngs.split(len(stacks[shape])))

    if len(stacks) == 1:
        return stack(next(iter(stacks)))
    return nnx.Dict({tree.stack_key(layers): stack(shape) for shape, layers in stacks.items()})


def runs(config: Any) -> Iterator[Run]:
    """Yield the runs of a model of several stacks, in their order."""
    shapes, mixers, sources = config.shapes, config.mixers, config.kv_sources
    for layers in stacks_of(shapes).values():
        assert len({mixers[layer] == ATTENTION for layer in layers}) == 1
    places = {layer: own.index(layer) for own in stacks_of(shapes).values() for layer in own}
    keys = {shape: tree.stack_key(own) for shape, own in stacks_of(shapes).items()}
    kinds = [(shapes[i], sources[i], i if i in sources else None) for i in range(len(shapes))]
    groups = list(cached_layers(config).values())
    states = [layer for layer, mixer in enumerate(mixers) if mixer != ATTENTION]
    first = 0
    for end in range(1, len(shapes) + 1):
        if end < len(shapes) and kinds[end] == kinds[first]:
            continue
        own = states if first in states else next((g for g in groups if first in g), ())
        yield Run(
            (first, end),
            keys[shapes[first]],
            places[first],
            cached=own.index(first) if own else 0,
            has_state=own is states,
            group=groups.index(own) if own in groups else 0,
            source=sources[first],
            is_source=first in sources,
        )
        first = end


def run_stacks(
    scan: Callable,
    layers: Any,
    config: Any,
    x: jax.Array,
    per_layer: Any,
    cache: tuple[Cache, jax.Array] | None,
) -> tuple[jax.Array, Cache | None, Any]:
    """Run all layers by `scan(run, layers, x, per_layer, shared, cache)`, which is `scan_layers`
    for a block, and puts out a pair: the `Routing`, and of a source its keys and values, which runs
    that share them get as `shared`. Return the output of the last one, the cache with the new
    tokens, and the `Routing` in the order of the model.
    """
    if len({*config.shapes}) == 1 and config.mixers[0] == ATTENTION:
        everything = Run((0, config.num_hidden_layers), "", 0, 0, False)
        x, (out, _), own = scan(everything, layers, x, per_layer, None, cache)
        return x, own, out
    outs, sources = [], {}
    for run in runs(config):
        stop = run.start + run.layers[1] - run.layers[0]
        stack = layers if len({*config.shapes}) == 1 else layers[run.key]
        stack, own = _slice(stack, run.start, stop), _slice(per_layer, *run.layers)
        shared = sources.get(run.source)
        placed = None
        if cache is not None and shared is None:
            placed = (_part(cache[0], run), cache[1])
        x, (out, kept), part = scan(run, stack, x, own, shared, placed)
        outs.append(out)
        if run.is_source:
            sources[run.layers[0]] = jax.tree.map(lambda each: each[0], kept)
        if cache is not None and placed is not None:
            cache = (_joined(cache[0], part, run), cache[1])
    outs = [out for out in outs if out is not None]
    joined = jax.tree.map(lambda *each: jnp.concatenate(each), *outs) if outs else None
    return x, None if cache is None else cache[0], joined


def _slice(stack: Any, start: int, stop: int) -> Any:
    """Return some layers of a module or tree whose leaves have a layer axis or are `Layered`."""

    def cut(leaf: Any) -> Any:
        if is_layered(leaf):
            return Layered(leaf.layers[start:stop])
        return leaf[start:stop]

    if isinstance(stack, nnx.Module):
        graphdef, state = nnx.split(stack)
        return nnx.merge(graphdef, jax.tree.map(cut, state, is_leaf=is_layered))
    return jax.tree.map(cut, stack, is_leaf=is_layered)


def _part(cache: Cache, run: Run) -> Cache | States:
    """Return what the layers of a run read and write of the cache."""
    return States(cache.states, cache.rows) if run.has_state else cache.part(run.group)


def _joined(cache: Cache, part: Cache | States, run: Run) -> Cache:
    if isinstance(part, States):
        return replace(cache, states=part.arrays)
    return cache.with_part(run.group, part)
