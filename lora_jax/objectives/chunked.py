"""Functions of the logits of a batch, a chunk of tokens at a time; not all logits exist at once.

    weighted_sums   sums over tokens: value and gradient in one pass over the chunks
    each_token      a value per token, likewise; only the gradient of a head that trains computes
                    the logits of a chunk again

Token i is predicted from position i - 1, so its hidden state is the one before it. Only supervised
tokens count, those with a loss weight: chunks without any are skipped.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import tree
from lora_jax.errors import UserError
from lora_jax.sharding import BATCH, constrain, logits_axes

TokenFunction = Callable[..., Any]  # (logits (.., vocab), targets (..), *others' logits) -> (..)


@dataclass(frozen=True)
class Head:
    """The end of a model and what it is applied to: logits = apply(leaves, hidden)."""

    apply: Callable[[list, jax.Array], jax.Array]
    leaves: list[jax.Array]  # only those that `apply` reads
    hidden: jax.Array  # (b, t, d)


def make_head(module: Any, hidden: jax.Array) -> Head:
    """Make the `Head` of an NNX module, whose `logits` maps (.., d) to (.., vocab)."""
    # Split by features: each device can reorder the tokens of its rows, and none holds them all.
    hidden = constrain(hidden, *BATCH, None, "tensor")
    graphdef, state = nnx.split(module)
    leaves, structure = jax.tree.flatten(_split_vocabulary(state, module, hidden))

    def apply_all(leaves: list, hidden: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves)).logits(hidden)

    # The others may train, and then it would seem that the head does.
    read = _inputs_read(apply_all, leaves, hidden[:1, :1])
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]

    def apply(leaves: list[jax.Array], hidden: jax.Array) -> jax.Array:
        given = iter(leaves)
        whole = [next(given) if own else x for own, x in zip(read, shapes, strict=True)]
        return apply_all(whole, hidden)

    return Head(apply, [x for own, x in zip(read, leaves, strict=True) if own], hidden)


def _inputs_read(function: Callable, leaves: list, hidden: jax.Array) -> list[bool]:
    """Return for each of `leaves` if `function(leaves, hidden)` reads it."""
    jaxpr = jax.make_jaxpr(function)(leaves, hidden).jaxpr
    read = {id(x) for equation in jaxpr.eqns for x in equation.invars}
    return [id(x) in read for x in jaxpr.invars[: len(leaves)]]


def _split_vocabulary(state: Any, module: Any, hidden: jax.Array) -> Any:
    """Split the weights of the head by the vocabulary, as the logits are: once, not per chunk."""
    vocab = jax.eval_shape(module.logits, hidden[:1, :1]).shape[-1]
    axes = logits_axes(vocab)[1]
    paths = [tuple(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    tied = not any(set(path) & set(tree.OUTPUT_HEADS) for path in paths)
    heads = tree.TIED_EMBEDDINGS if tied else tree.OUTPUT_HEADS

    def split(path: Any, leaf: jax.Array) -> jax.Array:
        names = {str(getattr(key, "key", key)) for key in path}
        if not names & set(heads):
            return leaf
        found = [axis for axis, size in enumerate(leaf.shape) if size == vocab]
        # An embedding is (vocab, d) and a head (d, vocab), where d can equal vocab.
        own = found[:1] if tied else found[-1:]
        return constrain(leaf, *(axes if axis in own else None for axis in range(leaf.ndim)))

    return jax.tree_util.tree_map_with_path(split, state)


@dataclass(frozen=True)
class _Chunks:
    """The tokens of a batch, supervised ones first in every row, as arrays (chunks, rows, width)
    and (chunks, rows, width, d).
    """

    order: jax.Array  # (b, t): the original position of each sorted token
    hiddens: tuple[jax.Array, ...]  # of every head
    targets: jax.Array
    weights: jax.Array

    def restore(self, values: jax.Array) -> jax.Array:
        """Return values (chunks, rows, width) in the order of the tokens (b, t)."""
        rows, time = self.order.shape
        values = values.swapaxes(0, 1).reshape(rows, -1)[:, :time]
        values = jnp.take_along_axis(values, jnp.argsort(self.order, axis=1), axis=1)
        return jnp.roll(values, 1, axis=1)


def _make_chunks(
    hiddens: Sequence[jax.Array], batch: Mapping[str, jax.Array], chunk: int
) -> _Chunks:
    """Split a batch in chunks of at most `chunk` tokens."""
    targets = jnp.roll(batch["tokens"], -1, axis=1)
    weights = jnp.roll(batch["loss_weights"], -1, axis=1).at[:, -1].set(0.0)
    # Supervised positions first in every row: chunks without any come last and are skipped.
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    targets, weights = (jnp.take_along_axis(x, order, axis=1) for x in (targets, weights))
    hiddens = [jnp.take_along_axis(x, order[:, :, None], axis=1) for x in hiddens]
    rows, time = targets.shape
    width = max(1, min(time, chunk // rows))
    padding = -time % width

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(rows, (time + padding) // width, width, *x.shape[2:])
        return x.swapaxes(0, 1)

    return _Chunks(order, tuple(map(split, hiddens)), split(targets), split(weights))


def weighted_sums(
    function: TokenFunction,
    heads: Sequence[Head],
    batch: Mapping[str, jax.Array],
    chunk: int,
) -> tuple[jax.Array, ...]:
    """Return the sum over tokens of loss weight times `function`, for each value that it gives.

    The first sum has a gradient; the others are reported only.

    Args:
        function: gets logits (rows, width, vocab) float32 of the first head, targets (rows, width)
            int32, and the logits of the other heads; returns an array (rows, width), or a tuple.
        heads: over the same tokens.
        batch: tokens (b, t) int32 and loss_weights (b, t) float32.
        chunk: tokens whose logits are in memory at once.
    """
    chunks = _make_chunks([head.hidden for head in heads], batch, chunk)
    values = _make_values(function, [head.apply for head in heads])
    leaves = [head.leaves for head in heads]
    first, *others = _chunked_sums(values, leaves, chunks.hiddens, chunks.targets, chunks.weights)
    return first, *map(jax.lax.stop_gradient, others)


def each_token(
    function: TokenFunction,
    heads: Sequence[Head],
    batch: Mapping[str, jax.Array],
    chunk: int,
) -> jax.Array:
    """Return `function` at every supervised token, (b, t), and 0 at the others. Arguments as those
    of `weighted_sums`; `function` returns one array.
    """
    chunks = _make_chunks([head.hidden for head in heads], batch, chunk)
    values = _make_values(function, [head.apply for head in heads])
    leaves = [head.leaves for head in heads]
    found = _chunked_values(values, leaves, chunks.hiddens, chunks.targets, chunks.weights)
    return chunks.restore(found)


def _make_values(function: TokenFunction, applies: Sequence[Callable]) -> Callable:
    """Make `values(leaves, hiddens, targets)`: what `function` gives for a chunk, as a tuple."""

    def logits_of(apply: Callable, leaves: list, hidden: jax.Array) -> jax.Array:
        vocab = jax.eval_shape(apply, leaves, hidden).shape[-1]
        rows, columns = logits_axes(vocab)
        logits = apply(leaves, constrain(hidden, rows, None, None)).astype(jnp.float32)
        return constrain(logits, rows, None, columns)

    def values(leaves: list[list], hiddens: tuple, targets: jax.Array) -> tuple[jax.Array, ...]:
        first, *others = map(logits_of, applies, leaves, hiddens)
        found = function(first, targets, *others)
        found = found if isinstance(found, tuple) else (found,)
        for value in found:
            if jnp.shape(value) != targets.shape:
                name = getattr(function, "__name__", repr(function))
                raise UserError(
                    f"{name} must return a value for each token, an array {targets.shape} from "
                    f"logits {first.shape}, and returned {jnp.shape(value)}"
                )
        return found

    return values


def _skip_unsupervised(compute: Callable, *chunk: Any) -> Any:
    """Return `compute` of a chunk, or zeros of the same shapes if the chunk has no weight. The
    weights are the last argument. Members of a sweep skip a chunk together: a condition for each
    would compute both branches for all.
    """

    def zeros(*chunk: Any) -> Any:
        return jax.tree.map(
            lambda out: jnp.zeros(out.shape, out.dtype), jax.eval_shape(compute, *chunk)
        )

    return jax.lax.cond(_has_weight(chunk[-1]), compute, zeros, *chunk)


@jax.custom_batching.custom_vmap
def _has_weight(weights: jax.Array) -> jax.Array:
    """Return True if any weight is not 0; under `vmap`, one value for all members."""
    return jnp.any(weights != 0)


@_has_weight.def_vmap
def _any_has_weight(size: int, batched: list[bool], weights: jax.Array) -> tuple[jax.Array, bool]:
    return jnp.any(weights != 0), False


def _chunk_sums(
    values: Callable, leaves: list, hiddens: tuple, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, ...]:
    return tuple(jnp.sum(weights * value) for value in values(leaves, hiddens, targets))


def _sums(
    values: Callable, leaves: list, hiddens: tuple, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, ...]:
    """Sums over all chunks; arrays of `hiddens` (chunks, rows, width, d), targets and weights
    (chunks, rows, width).
    """
    compute = functools.partial(_chunk_sums, values, leaves)

    def body(sums: tuple, chunk: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, sums, _skip_unsupervised(compute, *chunk)), None

    chunks = (hiddens, targets, weights)
    return jax.lax.scan(body, _zeros_like_results(compute, chunks), chunks)[0]


def _zeros_like_results(compute: Callable, chunks: Any) -> Any:
    """Return zeros of the shapes that `compute` returns for the first of `chunks`."""
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), chunks)
    results = jax.eval_shape(compute, *first)
    return jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), results)


_chunked_sums = jax.custom_vjp(_sums, nondiff_argnums=(0,))


def _partition(inputs: Any) -> tuple[Any, Any]:
    """Split the inputs of a forward rule into those with a gradient and the others: two trees of
    the same form, with None where the other has a leaf. Known at trace time (`perturbed`).
    """
    moving = jax.tree.map(lambda x: x.value if x.perturbed else None, inputs)
    return moving, jax.tree.map(lambda x: None if x.perturbed else x.value, inputs)


def _combine(moving: Any, fixed: Any) -> Any:
    """Join the two trees of `_partition`."""
    return jax.tree.map(
        lambda x, y: y if x is None else x, moving, fixed, is_leaf=lambda x: x is None
    )


def _split_features(gradients: Any) -> Any:
    return jax.tree.map(lambda x: constrain(x, *BATCH, None, "tensor"), gradients)


def _forward(
    values: Callable, leaves: list, hiddens: tuple, targets: Any, weights: Any
) -> tuple[tuple[jax.Array, ...], Any]:
    """Return value and gradients in one pass: both are computed from a chunk's logits, which are
    then freed.

    Recomputing them in the backward pass instead costs a third product with the vocabulary. Leaves
    that do not train get no gradient and cost nothing.
    """
    (trained, frozen), (moving, fixed) = _partition(leaves), _partition(hiddens)

    def sums(trained: list, moving: tuple, fixed: tuple, *chunk: jax.Array) -> tuple:
        both = _combine(trained, frozen), _combine(moving, fixed)
        first, *others = _chunk_sums(values, *both, *chunk)
        return first, tuple(others)

    compute = functools.partial(jax.value_and_grad(sums, argnums=(0, 1), has_aux=True), trained)

    def body(carry: tuple, chunk: tuple) -> tuple[tuple, tuple]:
        found, (of_leaves, of_hiddens) = _skip_unsupervised(compute, *chunk)
        return jax.tree.map(jnp.add, carry, (found, of_leaves)), _split_features(of_hiddens)

    chunks = (moving, fixed, targets.value, weights.value)
    found, (of_leaves, _) = _zeros_like_results(compute, chunks)
    ((first, others), of_leaves), of_hiddens = jax.lax.scan(body, (found, of_leaves), chunks)
    return (first, *others), (of_leaves, of_hiddens)


def _backward(values: Callable, gradients: Any, cotangents: tuple) -> tuple[Any, ...]:
    scaled = jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), gradients)
    return *scaled, None, None


_chunked_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunk_values(
    values: Callable, leaves: list, hiddens: tuple, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    return jnp.where(weights != 0, values(leaves, hiddens, targets)[0], 0)


def _all_values(
    values: Callable, leaves: list, hiddens: tuple, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """Values (chunks, rows, width) of all chunks, whose arrays are as those of `_sums`."""
    compute = functools.partial(_chunk_values, values, leaves)
    return jax.lax.map(
        lambda chunk: _skip_unsupervised(compute, *chunk), (hiddens, targets, weights)
    )


_chunked_values = jax.custom_vjp(_all_values, nondiff_argnums=(0,))


def _values_forward(
    values: Callable, leaves: list, hiddens: tuple, targets: Any, weights: Any
) -> tuple[jax.Array, Any]:
    """Return the values, with the gradient of each by the hidden states of its token.

    No other token's value depends on these, so the gradient of the sum of the values has them all,
    and `_values_backward` multiplies them by what comes back. The gradient of a leaf depends on
    what comes back: if any leaf trains, all gradients wait for it.
    """
    (trained, frozen), (moving, fixed) = _partition(leaves), _partition(hiddens)
    chunks = (moving, fixed, targets.value, weights.value)
    if jax.tree.leaves(trained):
        inputs = _combine(moving, fixed), targets.value, weights.value
        found = _all_values(values, _combine(trained, frozen), *inputs)
        return found, (None, (trained, frozen, *chunks))

    def total(moving: tuple, fixed: tuple, *chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = _chunk_values(values, frozen, _combine(moving, fixed), *chunk)
        return jnp.sum(found), found

    compute = jax.value_and_grad(total, has_aux=True)

    def body(chunk: tuple) -> tuple[jax.Array, tuple]:
        (_, found), gradients = _skip_unsupervised(compute, *chunk)
        return found, _split_features(gradients)

    found, gradients = jax.lax.map(body, chunks)
    return found, (gradients, None)


def _values_backward(values: Callable, kept: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    gradients, inputs = kept
    if inputs is None:
        scaled = jax.tree.map(lambda x: (cotangent[..., None] * x).astype(x.dtype), gradients)
        return None, scaled, None, None
    trained, frozen, *chunks = inputs

    def compute(cotangent: jax.Array, moving: tuple, fixed: tuple, *chunk: jax.Array) -> tuple:
        def found(trained: list, moving: tuple) -> jax.Array:
            both = _combine(trained, frozen), _combine(moving, fixed)
            return _chunk_values(values, *both, *chunk)

        return jax.vjp(found, trained, moving)[1](cotangent)

    def body(of_leaves: list, chunk: tuple) -> tuple[list, tuple]:
        found, of_hiddens = _skip_unsupervised(compute, *chunk)
        return jax.tree.map(jnp.add, of_leaves, found), _split_features(of_hiddens)

    zeros = jax.tree.map(jnp.zeros_like, trained)
    of_leaves, of_hiddens = jax.lax.scan(body, zeros, (cotangent, *chunks))
    return of_leaves, of_hiddens, None, None


_chunked_values.defvjp(_values_forward, _values_backward, symbolic_zeros=True)
