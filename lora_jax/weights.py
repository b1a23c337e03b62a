"""Leaf types of weights, and the few functions that depend on them.

    Array                          a plain kernel (in, out) or embedding (vocab, d)
    NF4Weight, Int8Weight          a kernel of 4 or 8 bits per weight
    LoraWeight(base, a, b, gain)   y = gain * (x @ base + (x @ a) @ b)
    Probe(base, basis, moments)    a base whose inputs are accumulated
    Untied(embed, head)            an embedding (vocab, d) that is the output head too, adapted in
                                   one of its two uses only
    Layered(layers)                a stack of layers as separate leaves, one per layer

A model calls `linear`, `embed` and `unembed` on whatever leaf it finds and never mentions adapters.
Leaves may carry a leading `layers` axis; inside a scanned stack the functions see one slice.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.quantize import Int8Weight, NF4Weight, QuantizedWeight, dequantize
from lora_jax.tree import Path, flatten, stack_position, unflatten

_BLOCK = 32  # rows of one expert that a CPU multiplies at once


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

    def __jax_array__(self) -> jax.Array:
        return materialize(self)

    def __getitem__(self, index):
        return materialize(self)[index]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Untied:
    """A tied embedding (vocab, d) whose two uses differ; an array that is not adapted is shared and
    not copied.
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


Weight = jax.Array | QuantizedWeight | LoraWeight | Untied | Probe


def separate(params: Mapping) -> dict:
    """Return parameters with each stacked leaf as a `Layered`; the other leaves are shared.

    The input is not changed: drop it, or the base is in memory twice.

    Example:
        >>> from lora_jax.weights import separate
        >>> params = {"layers": {"proj": {"kernel": jnp.ones((3, 2, 4))}}}
        >>> kernel = separate(params)["layers"]["proj"]["kernel"]
        >>> kernel.shape, [layer.shape for layer in kernel.layers]
        ((3, 2, 4), [(2, 4), (2, 4), (2, 4)])
    """

    def split(path: Path, leaf: Any) -> Any:
        if stack_position(path) is None or isinstance(leaf, Layered):
            return leaf
        return Layered(tuple(layer_of(leaf, index) for index in range(leaf.shape[0])))

    return unflatten({path: split(path, leaf) for path, leaf in flatten(params).items()})


def is_layered(leaf: Any) -> bool:
    """Return True for a `Layered`."""
    return isinstance(leaf, Layered)


def layer_of(tree: Any, index: int) -> Any:
    """Return one layer of a tree of `Layered` leaves and of arrays with a `layers` axis."""

    def take(leaf: Any) -> Any:
        return leaf.layers[index] if isinstance(leaf, Layered) else leaf[index]

    return jax.tree.map(take, tree, is_leaf=is_layered)


def linear(x: jax.Array, w: Weight) -> jax.Array:
    """Return x @ W for any weight leaf, in the dtype of `x`: (..., in) -> (..., out).

    Leading axes are flattened first: one contraction over one row axis is what every backend does
    best.

    Example:
        >>> from lora_jax.weights import LoraWeight, linear
        >>> w = LoraWeight(base=jnp.eye(2), a=jnp.ones((2, 1)), b=jnp.full((1, 2), 0.5))
        >>> linear(jnp.array([[1.0, 2.0]]), w).tolist()  # x @ W + (x @ a) @ b
        [[2.5, 3.5]]
    """
    rows = x.reshape(-1, x.shape[-1])
    return _matmul(rows, w).reshape(*x.shape[:-1], w.shape[-1])


def _matmul(x: jax.Array, w: Weight) -> jax.Array:
    if isinstance(w, LoraWeight):
        y = _matmul(x, w.base) + _low_rank(_drop(x, w.key, w.dropout), w.a, w.b)
        return y if w.gain is None else y * w.gain.astype(x.dtype)
    if isinstance(w, NF4Weight | Int8Weight):
        return _quantized_matmul(x, w)
    if isinstance(w, Probe):
        return _matmul(_count(x, w.basis, w.moments, w.counted), w.base)
    return x @ materialize(w).astype(x.dtype)


@jax.custom_vjp
def _count(x: jax.Array, basis: jax.Array, moments: jax.Array, counted: Any) -> jax.Array:
    """Return x (rows, in) unchanged; see `Probe` for the gradient."""
    return x


def _count_backward(saved: tuple[Any, ...], slope: jax.Array) -> tuple[Any, ...]:
    x, basis, counted = saved
    ones = jnp.ones((len(x), 1)) if counted is None else counted[:, None]
    wide = jnp.where(ones > 0, x.astype(jnp.float32), 0)
    with jax.default_matmul_precision("highest"):
        sizes = jnp.sum(wide * wide, axis=-1, keepdims=True)
        right = jnp.concatenate([wide @ basis, ones, sizes], axis=-1)
        return slope, None, jnp.concatenate([wide, ones], axis=-1).T @ right, None


_count.defvjp(lambda x, basis, moments, counted: (x, (x, basis, counted)), _count_backward)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _quantized_matmul(x: jax.Array, w: QuantizedWeight) -> jax.Array:
    """Multiply by a dequantised matrix, which the backward pass dequantises again."""
    return x @ dequantize(w, x.dtype)


def expert_linear(x: jax.Array, w: Weight, group_sizes: jax.Array) -> jax.Array:
    """Multiply rows by the matrix of their expert, in the dtype of `x`: x (rows, in), w (experts,
    in, out) -> (rows, out). The first group_sizes[0] rows are those of expert 0, and so on.
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
    """Compute `jax.lax.ragged_dot`; by blocks on a CPU, where it multiplies every row by every
    expert.
    """
    return jax.lax.platform_dependent(x, w, group_sizes, cpu=_by_blocks, default=jax.lax.ragged_dot)


@jax.custom_vjp
def _by_blocks(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Compute `jax.lax.ragged_dot` of groups that add up to the rows of x, at the cost of at most
    rows + experts * _BLOCK rows.
    """
    return _times_blocks(x, w, group_sizes, 1)


def _blocks(group_sizes: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return expert, first row and end of its group for every block of rows, in the order of the
    rows; surplus blocks start behind the last row.
    """
    size, ends = min(_BLOCK, rows), jnp.cumsum(group_sizes)
    last = jnp.cumsum(-(-group_sizes // size))  # how many blocks there are up to each expert
    block = jnp.arange(rows // size + min(rows, len(group_sizes)))
    expert = jnp.searchsorted(last, block, side="right").clip(max=len(group_sizes) - 1)
    starts = ends[expert] - group_sizes[expert]
    before = last[expert] - -(-group_sizes[expert] // size)
    start = jnp.minimum(starts + (block - before) * size, rows)
    return expert, start, ends[expert]


def _times_blocks(x: jax.Array, w: jax.Array, group_sizes: jax.Array, contracted: int) -> jax.Array:
    """Multiply x (rows, n) by the matrices of w, whose axis `contracted` has n features."""
    rows = len(x)
    size = min(_BLOCK, rows)
    padded = jnp.pad(x, ((0, size), (0, 0)))

    def step(y: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        expert, start, _ = block
        own = jax.lax.dynamic_slice_in_dim(padded, start, size)
        own = jax.lax.dot_general(own, w[expert], (((1,), (contracted - 1,)), ((), ())))
        # The next block overwrites the rows behind the end of its group.
        return jax.lax.dynamic_update_slice_in_dim(y, own, start, 0), None

    y = jnp.zeros((rows + size, w.shape[3 - contracted]), x.dtype)
    return jax.lax.scan(step, y, _blocks(group_sizes, rows))[0][:rows]


def _forward(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> tuple[jax.Array, Any]:
    return _by_blocks(x, w, group_sizes), (x, w, group_sizes)


def _backward(saved: tuple[jax.Array, ...], slope: jax.Array) -> tuple[Any, ...]:
    x, w, group_sizes = saved
    size = min(_BLOCK, len(x))
    pair = [jnp.pad(part, ((0, size), (0, 0))) for part in (x, slope)]

    def step(total: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        expert, start, end = block
        own, of_own = (jax.lax.dynamic_slice_in_dim(part, start, size) for part in pair)
        own = jnp.where((start + jnp.arange(size) < end)[:, None], own, 0)
        product = jnp.matmul(own.T, of_own, preferred_element_type=jnp.float32)
        return total.at[expert].add(product), None

    total = jnp.zeros(w.shape, jnp.float32)
    total, _ = jax.lax.scan(step, total, _blocks(group_sizes, len(x)))
    return _times_blocks(slope, w, group_sizes, 2), total.astype(w.dtype), None


_by_blocks.defvjp(_forward, _backward)


def _low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return (x @ a) @ b. No other function writes it; x @ (a @ b) would cost a full matrix."""
    return (x @ a.astype(x.dtype)) @ b.astype(x.dtype)


def _drop(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def embed(ids: jax.Array, w: Weight) -> jax.Array:
    """Look up rows of an embedding: ids (...) -> (..., d), in the dtype of the weight, float32
    where it is adapted.
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
    """Return logits from a tied embedding: x (..., d), w (vocab, d) -> (..., vocab), in the dtype
    of `x`.
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


def widen(w: Any) -> Any:
    """Return the weight over a base in float32, so that `materialize` rounds nothing."""
    if isinstance(w, Untied):
        return Untied(widen(w.embed), widen(w.head))
    if isinstance(w, LoraWeight | Probe):
        return dataclasses.replace(w, base=widen(w.base))
    return dequantize(w) if isinstance(w, NF4Weight | Int8Weight) else w.astype(jnp.float32)


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
    if not isinstance(w, LoraWeight):
        return w
    wide = widen(w.base)
    update = jnp.matmul(w.a, w.b, precision="highest", preferred_element_type=jnp.float32)
    zero = jax.lax.stop_gradient(update) - update  # and its gradient is that of -update
    total = jnp.where(update == 0, wide - zero, wide + update)
    return (total if w.gain is None else total * w.gain).astype(w.dtype)
