"""The leaf types a weight can have, and the few functions that know them.

    Array                                    a plain kernel (in, out) or embedding (vocab, d)
    LoraWeight(base, a, b, gain)             y = gain * (x @ base + (x @ a) @ b)

A model calls `linear`, `embed` and `unembed` on whatever leaf it finds and never mentions adapters.
Leaves may carry a leading `layers` axis; inside a scanned stack the functions see one slice.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraWeight:
    """A frozen weight with a low-rank update, every scale folded into `a`, `b` and `gain` (arXiv
    2106.09685).

    With `key`, dropout at the static rate `dropout` acts on the input of `a`; without one the leaf
    is deterministic. It also passes for an array (`shape`, `dtype`, indexing, conversion), so that
    modules that know nothing of it work.
    """

    base: jax.Array  # (..., in, out)
    a: jax.Array  # (..., in, rank)
    b: jax.Array  # (..., rank, out)
    gain: jax.Array | None = None  # (..., 1, out); None: 1
    key: jax.Array | None = None  # (...,)
    dropout: float = field(default=0.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def dtype(self):
        return self.base.dtype

    def __jax_array__(self) -> jax.Array:
        return materialize(self)

    def __getitem__(self, index):
        return materialize(self)[index]


Weight = jax.Array | LoraWeight


def linear(x: jax.Array, w: Weight) -> jax.Array:
    """x @ W for any weight leaf, in the dtype of `x`: (..., in) -> (..., out).

    Leading axes are flattened first: one contraction over one row axis is what every backend does
    best.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _matmul(rows, w).reshape(*x.shape[:-1], w.shape[-1])


def _matmul(x: jax.Array, w: Weight) -> jax.Array:
    if isinstance(w, LoraWeight):
        y = _matmul(x, w.base) + _low_rank(_drop(x, w.key, w.dropout), w.a, w.b)
        return y if w.gain is None else y * w.gain.astype(x.dtype)
    return x @ w.astype(x.dtype)


def _low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """(x @ a) @ b: the only place that writes it. Never x @ (a @ b), which costs a full matrix."""
    return (x @ a.astype(x.dtype)) @ b.astype(x.dtype)


def _drop(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def embed(ids: jax.Array, w: Weight) -> jax.Array:
    """Rows of an embedding: ids (...) -> (..., d), in the dtype of the weight."""
    return jnp.take(materialize(w), ids, axis=0)


def unembed(x: jax.Array, w: Weight) -> jax.Array:
    """Logits from a tied embedding: x (..., d), w (vocab, d) -> (..., vocab), in the dtype of
    `x`.
    """
    rows = x.reshape(-1, x.shape[-1])
    logits = jax.lax.dot_general(rows, materialize(w).astype(x.dtype), (((1,), (1,)), ((), ())))
    return logits.reshape(*x.shape[:-1], w.shape[0])


def materialize(w: Weight) -> jax.Array:
    """The plain array that a leaf stands for, W' = gain * (W + a @ b), added in float32 and rounded
    once.

    Entries that the update does not move keep their bits, the sign of zero included.
    """
    if not isinstance(w, LoraWeight):
        return w
    base = materialize(w.base)
    wide = base.astype(jnp.float32)
    update = jnp.matmul(w.a, w.b, precision="highest", preferred_element_type=jnp.float32)
    total = jnp.where(update == 0, wide, wide + update)
    return (total if w.gain is None else total * w.gain).astype(base.dtype)
