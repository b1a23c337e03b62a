"""The key-value cache of a decoder: one text per row, each of its own length.

The slot of a token is its position in the text of its row. A forward writes the keys and values of
the new tokens and then attends to the slots up to each token, so that slots beyond the text of a
row are never read, whatever they hold.

Shape letters: b batch, t time (new tokens), s slots of a row, k kv heads, h head size.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.weights import Layered


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of all rows and layers, as one array or as a `Layered` of one per layer.

    The texts of a batch are all rows in their order, or those that `rows` names. With `view`,
    attention reads the first `view` slots only: no token of the batch may be at a later one.

    `lengths` are those that the texts will have once they are whole. They choose the rotary
    frequencies of dynamic and longrope, as cached keys keep those they were rotated with. Without
    them a text ends with its last token in the batch.
    """

    keys: Any  # (layers, rows, k, s, h), already rotated
    values: Any  # (layers, rows, k, s, h)
    rows: jax.Array | None = None  # (b,)
    lengths: jax.Array | None = None  # (b, t), of the text of each token
    view: int | None = field(default=None, metadata={"static": True})

    @property
    def slots(self) -> int:
        """Number of slots that attention reads."""
        return self.keys.shape[3] if self.view is None else self.view

    def places(self, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Return the slot (b, t) of each token; of padding one that no row has."""
        return jnp.where(segment_ids != 0, positions, self.keys.shape[3])

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

        def put(own: Layered, new: jax.Array) -> Layered:
            return Layered((*own.layers[:index], new, *own.layers[index + 1 :]))

        return replace(self, keys=put(self.keys, layer.keys), values=put(self.values, layer.values))


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


def empty_cache(layers: int, rows: int, slots: int, kv_heads: int, head_dim: int, dtype) -> Cache:
    """Return a cache of zeros, as one array, for `rows` texts of up to `slots` tokens."""
    shape = (layers, rows, kv_heads, slots, head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def empty_layers(layers: int, rows: int, slots: int, kv_heads: int, head_dim: int, dtype) -> Cache:
    """Return a cache of zeros, as one array per layer."""
    shape = (rows, kv_heads, slots, head_dim)

    def zeros() -> Layered:
        return Layered(tuple(jnp.zeros(shape, dtype) for _ in range(layers)))

    return Cache(zeros(), zeros())
