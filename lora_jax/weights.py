"""The leaf types a weight can have, and the few functions that know them.

    Array                          a plain kernel (in, out) or embedding (vocab, d)
    NF4Weight, Int8Weight          a kernel of 4 or 8 bits per number
    LoraWeight(base, a, b, gain)   y = gain * (x @ base + (x @ a) @ b)
    Untied(embed, head)            an embedding (vocab, d) that is the output head too, adapted in
                                   one of its two uses only

A model calls `linear`, `embed` and `unembed` on whatever leaf it finds and never mentions adapters.
Leaves may carry a leading `layers` axis; inside a scanned stack the functions see one slice.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.quantize import Int8Weight, NF4Weight, QuantizedWeight, dequantize


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraWeight:
    """A frozen weight with a low-rank update, every scale folded into `a`, `b` and `gain` (arXiv
    2106.09685).

    With `key`, dropout at the static rate `dropout` acts on the input of `a`; without one the leaf
    is deterministic. It also passes for an array (`shape`, `dtype`, indexing, conversion), so that
    modules that know nothing of it work.
    """

    base: jax.Array | QuantizedWeight  # (..., in, out)
    a: jax.Array  # (..., in, rank)
    b: jax.Array  # (..., rank, out)
    gain: jax.Array | None = None  # (..., 1, out), or (in, 1) of an embedding's rows; None: 1
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Untied:
    """What a tied embedding (vocab, d) becomes when its two uses differ; what is not adapted is
    shared, never copied.
    """

    embed: Any  # (vocab, d): an array or a LoraWeight
    head: Any  # (vocab, d): an array or a LoraWeight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.embed.shape

    @property
    def ndim(self) -> int:
        return self.embed.ndim

    @property
    def dtype(self):
        return self.embed.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Absent:
    """The place of a weight that stands in the trainable tree alone: no array, only its form."""

    shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})


Weight = jax.Array | QuantizedWeight | LoraWeight | Untied


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
    if isinstance(w, NF4Weight | Int8Weight):
        return _quantized_matmul(x, w)
    return x @ materialize(w).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _quantized_matmul(x: jax.Array, w: QuantizedWeight) -> jax.Array:
    """The dequantised matrix is a temporary: the backward pass makes it again and keeps none."""
    return x @ dequantize(w, x.dtype)


def expert_linear(x: jax.Array, w: Weight, group_sizes: jax.Array) -> jax.Array:
    """Rows times the matrix of their expert, in the dtype of `x`: x (rows, in), w (experts, in,
    out) -> (rows, out). The first group_sizes[0] rows are those of expert 0, and so on.
    """
    if isinstance(w, LoraWeight):
        dropped = _drop(x, w.key, w.dropout)
        y = expert_linear(x, w.base, group_sizes)
        y = y + expert_linear(expert_linear(dropped, w.a, group_sizes), w.b, group_sizes)
        if w.gain is None:
            return y
        gain = jnp.repeat(w.gain[:, 0], group_sizes, axis=0, total_repeat_length=len(x))
        return y * gain.astype(x.dtype)
    if isinstance(w, NF4Weight | Int8Weight):
        return _quantized_expert_linear(x, w, group_sizes)
    return _grouped_matmul(x, materialize(w).astype(x.dtype), group_sizes)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _quantized_expert_linear(x: jax.Array, w: QuantizedWeight, group_sizes: jax.Array) -> jax.Array:
    return _grouped_matmul(x, dequantize(w, x.dtype), group_sizes)


def _grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`jax.lax.ragged_dot`, but on a CPU, where it is slow, one expert after the other."""
    return jax.lax.platform_dependent(
        x, w, group_sizes, cpu=_one_after_the_other, default=jax.lax.ragged_dot
    )


def _one_after_the_other(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    expert = jnp.repeat(jnp.arange(len(w)), group_sizes, total_repeat_length=len(x))

    def add(total: jax.Array, own: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        index, matrix = own
        return total + jnp.where((expert == index)[:, None], x, 0) @ matrix, None

    return jax.lax.scan(add, jnp.zeros((len(x), w.shape[-1]), x.dtype), (jnp.arange(len(w)), w))[0]


def _low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """(x @ a) @ b: the only place that writes it. Never x @ (a @ b), which costs a full matrix."""
    return (x @ a.astype(x.dtype)) @ b.astype(x.dtype)


def _drop(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def embed(ids: jax.Array, w: Weight) -> jax.Array:
    """Rows of an embedding: ids (...) -> (..., d), in the dtype of the weight, float32 where it is
    adapted.
    """
    if isinstance(w, Untied):
        return embed(ids, w.embed)
    if isinstance(w, LoraWeight):
        rows = embed(ids, w.base).astype(jnp.float32)
        rows = rows + jnp.take(w.a, ids, axis=0) @ w.b
        if w.gain is None:
            return rows
        return rows * (w.gain if w.gain.shape[-2] == 1 else jnp.take(w.gain, ids, axis=0))
    return jnp.take(materialize(w), ids, axis=0)


def unembed(x: jax.Array, w: Weight) -> jax.Array:
    """Logits from a tied embedding: x (..., d), w (vocab, d) -> (..., vocab), in the dtype of
    `x`.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _unembed(rows, w.head if isinstance(w, Untied) else w).reshape(*x.shape[:-1], -1)


def _unembed(x: jax.Array, w: Weight) -> jax.Array:
    if isinstance(w, LoraWeight):
        gain = None if w.gain is None else w.gain.astype(x.dtype)
        if gain is not None and gain.shape[-2] == 1:  # of features, which come in here
            x, gain = x * gain, None
        y = _unembed(x, w.base) + _low_rank(_drop(x, w.key, w.dropout), w.b.T, w.a.T)
        return y if gain is None else y * gain.T
    table = materialize(w).astype(x.dtype)
    return jax.lax.dot_general(x, table, (((1,), (1,)), ((), ())))


def materialize(w: Weight) -> Any:
    """The plain array that a leaf stands for, W' = gain * (W + a @ b), added in float32 and rounded
    once; of an `Untied`, both its arrays.

    Entries that the update does not move keep their bits, the sign of zero included.
    """
    if isinstance(w, Untied):
        return Untied(materialize(w.embed), materialize(w.head))
    if isinstance(w, NF4Weight | Int8Weight):
        return dequantize(w, w.dtype)
    if not isinstance(w, LoraWeight):
        return w
    base = w.base
    quantized = isinstance(base, NF4Weight | Int8Weight)
    wide = dequantize(base) if quantized else base.astype(jnp.float32)
    update = jnp.matmul(w.a, w.b, precision="highest", preferred_element_type=jnp.float32)
    zero = jax.lax.stop_gradient(update) - update  # and its gradient is that of -update
    total = jnp.where(update == 0, wide - zero, wide + update)
    return (total if w.gain is None else total * w.gain).astype(w.dtype)
