"""The key-value cache of a decoder.

Shape letters: b batch, t time (new tokens), s source time (cache slots), k kv heads, h head size.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far. A model reads the cache and returns a new one with the
    new tokens written.
    """

    keys: jax.Array  # (layers, b, k, s, h), already rotated
    values: jax.Array  # (layers, b, k, s, h)
    segment_ids: jax.Array  # (b, s); 0 in empty slots and padding
    length: jax.Array  # () number of used slots

    def write(self, keys: jax.Array, values: jax.Array, segment_ids: jax.Array) -> "Cache":
        """Return the cache with the keys and values (layers, b, k, t, h) of new tokens appended."""
        zero = jnp.zeros_like(self.length)
        start = (zero, zero, zero, self.length, zero)
        return Cache(
            jax.lax.dynamic_update_slice(self.keys, keys.astype(self.keys.dtype), start),
            jax.lax.dynamic_update_slice(self.values, values.astype(self.values.dtype), start),
            jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, (zero, self.length)),
            self.length + segment_ids.shape[1],
        )


def empty_cache(layers: int, rows: int, slots: int, kv_heads: int, head_dim: int, dtype) -> Cache:
    """Return a cache of zeros for `rows` texts of up to `slots` tokens."""
    shape = (layers, rows, kv_heads, slots, head_dim)
    return Cache(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((rows, slots), jnp.int32),
        jnp.int32(0),
    )
