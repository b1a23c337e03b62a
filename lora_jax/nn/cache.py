"""The cache of a decoder: one text per row, each of its own length.

The slot of a token is its position in the text of its row. A forward writes the keys and values of
the new tokens and then attends to the slots up to each token, so that slots beyond the text of a
row are never read, whatever they hold.

Layers without attention, such as convolutions, keep a state in place of keys and values: what they
need of all tokens read so far. A token at position 0 begins a text and does not read it, so that
rows need no clearing, and padding leaves it as it is.

Shape letters: b batch, t time (new tokens), s slots of a row, k kv heads, h head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.weights import Layered

ATTENTION = "attention"  # what mixes the tokens in most layers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of all rows and layers with attention, as one array or as a `Layered` of one
    per layer; and `states` of the other layers. Where heads differ from layer to layer, keys and
    values are a tuple: those of the layers of each shape.

    The texts of a batch are all rows in their order, or those that `rows` names. With `view`,
    attention reads the first `view` slots only: no token of the batch may be at a later one.

    `lengths` are those that the texts will have once they are whole. They choose the rotary
    frequencies of dynamic and longrope, as cached keys keep those they were rotated with. Without
    them a text ends with its last token in the batch.
    """

    keys: Any  # (layers, rows, k, s, h), already rotated, or a tuple of such
    values: Any  # (layers, rows, k, s, h)
    rows: jax.Array | None = None  # (b,)
    lengths: jax.Array | None = None  # (b, t), of the text of each token
    states: tuple[Any, ...] = ()  # each (layers, rows, ..)
    view: int | None = field(default=None, metadata={"static": True})

    @property
    def slots(self) -> int:
        """Number of slots that attention reads."""
        return _slots(self.keys) if self.view is None else self.view

    def with_content(self, other: "Cache") -> "Cache":
        """Return the cache with keys, values and states of `other`."""
        return replace(self, keys=other.keys, values=other.values, states=other.states)

    def places(self, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Return the slot (b, t) of each token; of padding one that no row has."""
        return jnp.where(segment_ids != 0, positions, _slots(self.keys))

    def part(self, group: int) -> "Cache":
        """Return the cache of the layers with heads of one shape."""
        if not isinstance(self.keys, tuple):
            return self
        return replace(self, keys=self.keys[group], values=self.values[group])

    def with_part(self, group: int, part: "Cache") -> "Cache":
        """Return the cache with the layers with heads of one shape replaced."""
        if not isinstance(self.keys, tuple):
            return part
        keys, values = list(self.keys), list(self.values)
        keys[group], values[group] = part.keys, part.values
        return replace(self, keys=tuple(keys), values=tuple(values))

    def layer(self, index: Any, places: jax.Array) -> "LayerCache":
        """Return one layer, for new tokens at `places`; `index` is an int for a `Layered`."""
        if isinstance(self.keys, Layered):
            keys, values = self.keys.layers[index], self.values.layers[index]
            return LayerCache(keys, values, places, self.rows, None, self.view)
        return LayerCache(self.keys, self.values, places, self.rows, index, self.view)

    def with_layer(self, index: Any, layer: "LayerCache") -> "Cache":
        """Return the cache with a layer replaced."""
        if not isinstance(self.keys, Layered):
            return replace(self, keys=layer.keys, values=layer.values)

        keys = _with_layer(self.keys, index, layer.keys)
        return replace(self, keys=keys, values=_with_layer(self.values, index, layer.values))


def _slots(keys: Any) -> int:
    return jax.tree.leaves(keys)[0].shape[-2]


def _with_layer(own: Layered, index: int, new: jax.Array) -> Layered:
    return Layered((*own.layers[:index], new, *own.layers[index + 1 :]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values (rows, k, s, h) of one layer, or those of all layers and the index of one."""

    keys: jax.Array
    values: jax.Array
    places: jax.Array  # (b, t)
    rows: jax.Array | None
    index: Any  # () of the layer in arrays with a layer axis; None: of one layer
    view: int | None = field(default=None, metadata={"static": True})

    def write(self, keys: jax.Array, values: jax.Array) -> "LayerCache":
        """Return the layer with keys and values (b, k, t, h) of new tokens written."""

        def put(own: jax.Array, new: jax.Array) -> jax.Array:
            batch, heads, _, _ = new.shape
            rows = jnp.arange(batch) if self.rows is None else self.rows
            where = (rows[:, None, None], jnp.arange(heads)[None, :, None], self.places[:, None])
            where = where if self.index is None else (self.index, *where)
            return own.at[where].set(new.astype(own.dtype), mode="drop")

        return replace(self, keys=put(self.keys, keys), values=put(self.values, values))

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Return keys and values (b, k, s, h) of the rows of the batch."""

        def take(own: jax.Array) -> jax.Array:
            view = slice(own.shape[-2] if self.view is None else self.view)
            if self.rows is None:
                return own[:, :, view] if self.index is None else own[self.index][:, :, view]
            if self.index is None:
                return own[self.rows, :, view]
            return own[self.index, self.rows, :, view]

        return take(self.keys), take(self.values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class States:
    """The states of a cache, layer by layer as its keys and values."""

    arrays: tuple[Any, ...]  # each (layers, rows, ..), or a `Layered`
    rows: jax.Array | None

    def layer(self, index: Any, places: jax.Array) -> "LayerState":
        """Return one layer; `index` is an int for a `Layered`. States have no `places`."""
        if any(isinstance(own, Layered) for own in self.arrays):
            return LayerState(tuple(own.layers[index] for own in self.arrays), self.rows, None)
        return LayerState(self.arrays, self.rows, index)

    def with_layer(self, index: Any, layer: "LayerState") -> "States":
        """Return the states with a layer replaced."""
        if layer.index is not None:
            return replace(self, arrays=layer.arrays)
        pairs = zip(self.arrays, layer.arrays, strict=True)
        return replace(self, arrays=tuple(_with_layer(own, index, new) for own, new in pairs))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerState:
    """States (rows, ..) of one layer, or those of all layers and the index of one."""

    arrays: tuple[jax.Array, ...]
    rows: jax.Array | None
    index: Any

    def read(self) -> tuple[jax.Array, ...]:
        """Return the states (b, ..) of the rows of the batch."""

        def take(own: jax.Array) -> jax.Array:
            own = own if self.index is None else own[self.index]
            return own if self.rows is None else own[self.rows]

        return tuple(map(take, self.arrays))

    def write(self, *new: jax.Array) -> "LayerState":
        """Return the layer with the states (b, ..) of the rows of the batch replaced."""

        def put(own: jax.Array, new: jax.Array) -> jax.Array:
            rows = slice(None) if self.rows is None else self.rows
            where = rows if self.index is None else (self.index, rows)
            return own.at[where].set(new.astype(own.dtype))

        return replace(self, arrays=tuple(map(put, self.arrays, new)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedKV:
    """Keys and values (b, k, s, h) that a layer made, for it and for layers that share them."""

    keys: Any = None
    values: Any = None

    def write(self, keys: jax.Array, values: jax.Array) -> "SharedKV":
        """Return the keys and values given."""
        return SharedKV(keys, values)

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Return keys and values."""
        return self.keys, self.values


def kv_shapes(config: Any) -> tuple[tuple[int, int], ...]:
    """Return the number of key and value heads and their size, by layer."""
    alike = ((config.num_key_value_heads, config.head_dim),) * config.num_hidden_layers
    return getattr(config, "kv_shapes", alike)


def cached_layers(config: Any) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return the layers that have keys and values of their own, by the shape of their heads."""
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    number = config.num_hidden_layers
    mixers = getattr(config, "mixers", (ATTENTION,) * number)
    sources = getattr(config, "kv_sources", (None,) * number)
    for layer, shape in enumerate(kv_shapes(config)):
        if mixers[layer] == ATTENTION and sources[layer] is None:
            found[shape] = (*found.get(shape, ()), layer)
    return found


@dataclass(frozen=True)
class Heads:
    """Layers whose heads have one shape."""

    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a cache."""

    heads: tuple[Heads, ...]  # of layers with keys and values
    state_layers: int = 0
    # Of one row in one layer, with their dtype; None: that of the cache.
    states: tuple[tuple[tuple[int, ...], Any], ...] = ()

    def empty(self, rows: int, slots: int, dtype: Any) -> Cache:
        """Return a cache of zeros, as one array, for `rows` texts of up to `slots` tokens."""

        def zeros(layers: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jnp.zeros((layers, rows, *shape), dtype)

        return self._filled(zeros, slots, dtype)

    def empty_layers(self, rows: int, slots: int, dtype: Any) -> Cache:
        """Return a cache of zeros, as one array per layer."""

        def zeros(layers: int, shape: tuple[int, ...], dtype: Any) -> Layered:
            return Layered(tuple(jnp.zeros((rows, *shape), dtype) for _ in range(layers)))

        return self._filled(zeros, slots, dtype)

    def _filled(self, zeros: Callable, slots: int, dtype: Any) -> Cache:
        def make() -> Any:
            each = [
                zeros(own.layers, (own.kv_heads, slots, own.head_dim), dtype) for own in self.heads
            ]
            return each[0] if len(each) == 1 else tuple(each)

        states = tuple(zeros(self.state_layers, own, kind or dtype) for own, kind in self.states)
        return Cache(make(), make(), states=states)
