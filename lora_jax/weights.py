"""Leaf types of weights, and the few functions that depend on them.

    Array                          a plain kernel (in, out) or embedding (vocab, d)
    NF4Weight, Int8Weight          a kernel of 4 or 8 bits per weight
    LoraWeight(base, a, b, gain)   y = gain * (x @ base + (x @ a) @ b)
    Probe(base, basis, moments)    a base whose inputs are accumulated
    LoraBank(base, a, b, ..)       LoraWeights in slots; every row of the input has its own
    Untied(embed, head)            an embedding (vocab, d) that is the output head too, adapted in
                                   one of its two uses only
    Layered(layers)                a stack of layers as separate leaves, one per layer
    Transposed(value)              a plain kernel, stored as (out, in)

A model calls `linear`, `embed` and `unembed` on whatever leaf it finds and never mentions adapters.
Leaves may carry a leading `layers` axis; inside a scanned stack the functions see one slice.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import slots
from lora_jax.errors import UserError, counted
from lora_jax.experts import grouped_matmul
from lora_jax.moments import count
from lora_jax.quantize import Int8Weight, NF4Weight, QuantizedWeight, dequantize
from lora_jax.shared_input import SharedInput, as_rows, plain


class _OverBase:
    """Base class of leaves with the shape and dtype of their `base`."""

    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def dtype(self):
        return self.base.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraWeight(_OverBase):
    """A frozen weight with a low-rank update, every scale folded into `a`, `b` and `gain` (arXiv
    2106.09685).

    With `key`, dropout at the static rate `dropout` acts on the input of `a`; without one the leaf
    is deterministic. It also acts as an array (`shape`, `dtype`, indexing, conversion), so other
    modules work with it.
    """

    base: jax.Array | QuantizedWeight  # (..., in, out)
    a: jax.Array  # (..., in, rank)
    b: jax.Array  # (..., rank, out)
    gain: jax.Array | None = None  # (..., 1, out), or (in, 1) of an embedding's rows; None: 1
    key: jax.Array | None = None  # (...,)
    dropout: float = field(default=0.0, metadata={"static": True})
    keep: jax.Array | None = None  # (...,): 1 - dropout as data, where members of a sweep differ

    def __jax_array__(self) -> jax.Array:
        return materialize(self)

    def __getitem__(self, index):
        return materialize(self)[index]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraBank(_OverBase):
    """A frozen weight with a low-rank update per slot, every scale folded in. The first axis of the
    input is that of the rows, each with slots of its own; slot 0 is the base.

    `a` has its input last, the faster form of the product with all slots. In a stack, every array
    has the leading axes of the base: layers, and experts but for `slot_ids` and `slot_weights`.
    """

    base: Any  # (..., in, out): an array, a quantised leaf
    a: jax.Array  # (..., slots, rank, in)
    b: jax.Array  # (..., slots, rank, out)
    gain: jax.Array | None  # (..., slots, 1, out); None: 1
    slot_ids: jax.Array  # (..., rows, m) int32
    slot_weights: jax.Array  # (..., rows, m) float32

    @property
    def factors(self) -> slots.Factors:
        return slots.Factors(self.a, self.b, self.gain)

    @property
    def choice(self) -> slots.Choice:
        return slots.Choice(self.slot_ids, self.slot_weights)

    def check_rows(self, x: jax.Array) -> None:
        """Raise for an input whose first axis is not that of the rows."""
        if x.ndim < 2 or len(x) != len(self.slot_ids):
            raise UserError(
                f"a bank is bound to {counted(len(self.slot_ids), 'row')}, and the input has shape "
                f"{x.shape}; bind slot_ids for every row of the batch"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Untied:
    """A tied embedding (vocab, d) whose two uses differ; an array that is not adapted is shared and
    not copied.
    """

    embed: Any  # (vocab, d): an array, LoraWeight or LoraBank
    head: Any  # (vocab, d): an array, LoraWeight or LoraBank

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
class Layered:
    """Layers of one shape as separate leaves, in place of one leaf with a `layers` axis.

    A forward over a stack slices one layer at a time, which on some backends copies it. Decoding
    reads all weights for few tokens, so the copy would cost as much as the product.
    """

    layers: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.layers), *self.layers[0].shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self):
        return self.layers[0].dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transposed:
    """A plain kernel (in, out) that is stored as (out, in): on CPU, products of few rows with it
    are faster.
    """

    value: jax.Array  # (out, in)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape[::-1]

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def dtype(self):
        return self.value.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Probe(_OverBase):
    """A weight that accumulates moments of its inputs. In the forward pass it acts as its base. The
    gradient of any loss with respect to `moments`, which are zeros, is the sum over all rows x of
    the inputs

        [x, 1]^T [x @ basis, 1, |x|^2]        (in + 1, k + 2)

    in float32, counted once even under remat. Only `linear` accumulates.
    """

    base: Any  # (..., in, out): an array or a quantised leaf
    basis: jax.Array  # (..., in, k)
    moments: jax.Array  # (..., in + 1, k + 2)
    counted: jax.Array | None = (
        None  # (..., rows), 1 for a row that counts, 0 for one that does not
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Absent:
    """Placeholder for a weight held only in the trainable tree: shape and dtype, no data."""

    shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})


Weight = jax.Array | QuantizedWeight | LoraWeight | LoraBank | Untied | Probe | Transposed


def is_layered(leaf: Any) -> bool:
    """Return True for a `Layered`."""
    return isinstance(leaf, Layered)


def layer_of(tree: Any, index: int) -> Any:
    """Return one layer of a tree of `Layered` leaves and of arrays with a `layers` axis."""

    def take(leaf: Any) -> Any:
        return leaf.layers[index] if isinstance(leaf, Layered) else leaf[index]

    return jax.tree.map(take, tree, is_leaf=is_layered)


def linear(x: jax.Array | SharedInput, w: Weight) -> jax.Array:
    """Return x @ W for any weight leaf, in the dtype of `x`: (..., in) -> (..., out).

    Leading axes are flattened first: one contraction over one row axis is what every backend does
    best. Where a mesh has a tensor axis they are not, as it may split the tokens.

    Example:
        >>> from lora_jax.weights import LoraWeight, linear
        >>> w = LoraWeight(base=jnp.eye(2), a=jnp.ones((2, 1)), b=jnp.full((1, 2), 0.5))
        >>> linear(jnp.array([[1.0, 2.0]]), w).tolist()  # x @ W + (x @ a) @ b
        [[2.5, 3.5]]
    """
    if isinstance(w, LoraBank):
        return _banked(plain(x), linear(x, w.base), w)
    return _matmul(as_rows(x), w).reshape(*x.shape[:-1], w.shape[-1])


def _banked(x: jax.Array, y: jax.Array, w: LoraBank) -> jax.Array:
    """Add the updates of a bank to y (rows, ..., out), the product of x (rows, ..., in)."""
    w.check_rows(x)
    wide_y, wide_x = (part.reshape(len(x), -1, part.shape[-1]) for part in (y, x))
    return slots.apply(wide_y, wide_x, w.factors, w.choice).reshape(y.shape)


def _matmul(x: jax.Array | SharedInput, w: Weight) -> jax.Array:
    if isinstance(w, LoraWeight):
        y = _matmul(x, w.base) + _low_rank(_drop(plain(x), w), w.a, w.b)
        return y if w.gain is None else y * w.gain.astype(x.dtype)
    if isinstance(w, NF4Weight | Int8Weight):
        return _quantized_matmul(x, w)
    if isinstance(w, Probe):
        rows = plain(x).reshape(-1, x.shape[-1])
        rows = count(rows, w.basis, w.moments, w.counted)
        return _matmul(rows, w.base).reshape(*x.shape[:-1], w.shape[-1])
    if isinstance(w, Transposed):
        return jnp.einsum("...i,oi->...o", plain(x), w.value.astype(x.dtype))
    return x @ materialize(w).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _quantized_matmul(x: jax.Array | SharedInput, w: QuantizedWeight) -> jax.Array:
    """Multiply by a dequantised matrix, which the backward pass dequantises again."""
    return x @ dequantize(w, x.dtype)


def expert_linear(
    x: jax.Array, w: Weight, group_sizes: jax.Array, order: jax.Array | None = None
) -> jax.Array:
    """Multiply rows by the matrix of their expert, in the dtype of `x`: x (rows, in), w (experts,
    in, out) -> (rows, out). The first group_sizes[0] rows are those of expert 0, and so on.

    `order` (rows,) is the permutation that sorted the rows by expert, so that each finds its slots
    in a bank; only a bank needs it.
    """
    if isinstance(w, LoraBank):
        assert order is not None, "a bank of experts needs the order of the rows"
        choice = w.choice.take(order // (len(x) // len(w.slot_ids)))
        y = expert_linear(x, w.base, group_sizes)
        return slots.apply_to_experts(y, x, w.factors, choice, group_sizes)
    if isinstance(w, LoraWeight):
        dropped = _drop(x, w)
        y = expert_linear(x, w.base, group_sizes)
        y = y + expert_linear(expert_linear(dropped, w.a, group_sizes), w.b, group_sizes)
        if w.gain is None:
            return y
        gain = jnp.repeat(w.gain[:, 0], group_sizes, axis=0, total_repeat_length=len(x))
        return y * gain.astype(x.dtype)
    if isinstance(w, NF4Weight | Int8Weight):
        return _quantized_expert_linear(x, w, group_sizes)
    return grouped_matmul(x, materialize(w).astype(x.dtype), group_sizes)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _quantized_expert_linear(x: jax.Array, w: QuantizedWeight, group_sizes: jax.Array) -> jax.Array:
    return grouped_matmul(x, dequantize(w, x.dtype), group_sizes)


def _low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return (x @ a) @ b. No other function writes it; x @ (a @ b) would cost a full matrix."""
    return (x @ a.astype(x.dtype)) @ b.astype(x.dtype)


def _drop(x: jax.Array, w: LoraWeight) -> jax.Array:
    if w.key is None or (w.keep is None and w.dropout == 0.0):
        return x
    share = 1.0 - w.dropout if w.keep is None else w.keep
    kept = jax.random.bernoulli(w.key, share, x.shape)
    return jnp.where(kept, x / jnp.asarray(share, x.dtype), 0).astype(x.dtype)


def embed(ids: jax.Array, w: Weight) -> jax.Array:
    """Look up rows of an embedding: ids (...) -> (..., d), in the dtype of the weight, float32
    where it is adapted.
    """
    if isinstance(w, Untied):
        return embed(ids, w.embed)
    if isinstance(w, LoraBank):
        w.check_rows(ids[..., None])
        rows = embed(ids, w.base).astype(jnp.float32)
        wide = rows.reshape(len(ids), -1, rows.shape[-1]), ids.reshape(len(ids), -1)
        return slots.apply_to_lookup(*wide, w.factors, w.choice).reshape(rows.shape)
    if isinstance(w, LoraWeight):
        rows = embed(ids, w.base).astype(jnp.float32)
        rows = rows + jnp.take(w.a, ids, axis=0) @ w.b
        if w.gain is None:
            return rows
        return rows * (w.gain if w.gain.shape[-2] == 1 else jnp.take(w.gain, ids, axis=0))
    return jnp.take(materialize(w), ids, axis=0)


def unembed(x: jax.Array, w: Weight) -> jax.Array:
    """Return logits from a tied embedding: x (..., d), w (vocab, d) -> (..., vocab), in the dtype
    of `x`.
    """
    w = w.head if isinstance(w, Untied) else w
    if isinstance(w, LoraBank):  # its factors are those of the head (d, vocab)
        return _banked(x, unembed(x, w.base), w)
    return _unembed(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)


def _unembed(x: jax.Array, w: Weight) -> jax.Array:
    if isinstance(w, LoraWeight):
        gain = None if w.gain is None else w.gain.astype(x.dtype)
        if gain is not None and gain.shape[-2] == 1:  # of features, which come in here
            x, gain = x * gain, None
        y = _unembed(x, w.base) + _low_rank(_drop(x, w), w.b.T, w.a.T)
        return y if gain is None else y * gain.T
    table = materialize(w).astype(x.dtype)
    return jax.lax.dot_general(x, table, (((1,), (1,)), ((), ())))


def widen(w: Any) -> Any:
    """Return the weight over a base in float32, so that `materialize` rounds nothing."""
    if isinstance(w, Untied):
        return Untied(widen(w.embed), widen(w.head))
    if isinstance(w, LoraWeight | LoraBank | Probe):
        return dataclasses.replace(w, base=widen(w.base))
    if isinstance(w, NF4Weight | Int8Weight):
        return dequantize(w)
    return materialize(w).astype(jnp.float32)


def materialize(w: Weight) -> Any:
    """Return the plain array of a leaf, W' = gain * (W + a @ b), added in float32 and rounded once;
    of an `Untied`, both its arrays.

    Entries that the update does not change keep their bits, including the sign of zero.

    Example:
        >>> from lora_jax.weights import LoraWeight, materialize
        >>> w = LoraWeight(base=jnp.eye(2), a=jnp.ones((2, 1)), b=jnp.ones((1, 2)))
        >>> materialize(w).tolist()
        [[2.0, 1.0], [1.0, 2.0]]
    """
    if isinstance(w, Untied):
        return Untied(materialize(w.embed), materialize(w.head))
    if isinstance(w, NF4Weight | Int8Weight):
        return dequantize(w, w.dtype)
    if isinstance(w, Probe):
        return materialize(w.base)
    if isinstance(w, Transposed):
        return w.value.T
    if isinstance(w, LoraBank):
        raise UserError(
            "a weight of a bank has a matrix for every slot and is no single array; bind one "
            "adapter with lora.bind to merge it"
        )
    if not isinstance(w, LoraWeight):
        return w
    wide = widen(w.base)
    update = jnp.matmul(w.a, w.b, precision="highest", preferred_element_type=jnp.float32)
    zero = jax.lax.stop_gradient(update) - update  # and its gradient is that of -update
    total = jnp.where(update == 0, wide - zero, wide + update)
    return (total if w.gain is None else total * w.gain).astype(w.dtype)
