"""Functions of the logits of a batch, a chunk of tokens at a time; not all logits exist at once.

    weighted_sums   sums over tokens: value and gradient in one pass over the chunks
    each_token      a value per token: the gradient computes the logits of a chunk again

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
    leaves: list[jax.Array]
    hidden: jax.Array  # (b, t, d)


def make_head(module: Any, hidden: jax.Array) -> Head:
    """Make the `Head` of an NNX module, whose `logits` maps (.., d) to (.., vocab)."""
    # Split by features: each device can reorder the tokens of its rows, and none holds them all.
    hidden = constrain(hidden, *BATCH, None, "tensor")
    graphdef, state = nnx.split(module)
    leaves, structure = jax.tree.flatten(_split_vocabulary(state, module, hidden))

    def apply(leaves: list[jax.Array], hidden: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves)).logits(hidden)

    return Head(apply, leaves, hidden)


def _split_vocabulary(state: Any, module: Any, hidden: jax.Array) -> Any:
    """Split the weights of the head by the vocabulary, as the logits are: once, not per chunk."""
    vocab = jax.eval_shape(module.logits, hidden[:1, :1]).shape[-1]
    axes = logits_axes(vocab)[1]
    paths = [tuple(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    heads = tree.OUTPUT_HEADS
    if not any(set(path) & set(heads) for path in paths):
        heads = tree.TIED_EMBEDDINGS

    def split(path: Any, leaf: jax.Array) -> jax.Array:
        names = {str(getattr(key, "key", key)) for key in path}
        if not names & set(heads):
            return leaf
        return constrain(leaf, *(axes if size == vocab else None for size in leaf.shape))

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

    def compute(leaves: list, hiddens: tuple, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.where(weights != 0, values(leaves, hiddens, targets)[0], 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(leaves: list, chunk: tuple) -> jax.Array:
        return _skip_unsupervised(functools.partial(compute, leaves), *chunk)

    found = jax.lax.scan(
        lambda _, chunk: (None, of_chunk(leaves, chunk)),
        None,
        (chunks.hiddens, chunks.targets, chunks.weights),
    )[1]
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
    weights are the last argument.
    """

    def zeros(*chunk: Any) -> Any:
        return jax.tree.map(
            lambda out: jnp.zeros(out.shape, out.dtype), jax.eval_shape(compute, *chunk)
        )

    return jax.lax.cond(jnp.any(chunk[-1] != 0), compute, zeros, *chunk)


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


def _forward(
    values: Callable, leaves: list, hiddens: tuple, targets: Any, weights: Any
) -> tuple[tuple[jax.Array, ...], Any]:
    """Return value and gradients in one pass: both are computed from a chunk's logits, which are
    then freed.

    Recomputing them in the backward pass instead costs a third product with the vocabulary. Which
    leaves train is known at trace time (`perturbed`); the others get no gradient and cost nothing.
    """
    flat, structure = jax.tree.flatten(leaves)
    trained = [leaf.value for leaf in flat if leaf.perturbed]
    moving = [hidden.value for hidden in hiddens if hidden.perturbed]
    fixed = [hidden.value for hidden in hiddens if not hidden.perturbed]

    def sums(trained: list, moving: list, fixed: list, *chunk: jax.Array) -> tuple:
        own, parts = iter(trained), {True: iter(moving), False: iter(fixed)}
        all_leaves = [next(own) if leaf.perturbed else leaf.value for leaf in flat]
        all_hiddens = tuple(next(parts[hidden.perturbed]) for hidden in hiddens)
        first, *others = _chunk_sums(
            values, jax.tree.unflatten(structure, all_leaves), all_hiddens, *chunk
        )
        return first, tuple(others)

    compute = functools.partial(jax.value_and_grad(sums, argnums=(0, 1), has_aux=True), trained)

    def body(carry: tuple, chunk: tuple) -> tuple[tuple, list]:
        found, (of_leaves, of_hiddens) = _skip_unsupervised(compute, *chunk)
        of_hiddens = [constrain(x, *BATCH, None, "tensor") for x in of_hiddens]
        return jax.tree.map(jnp.add, carry, (found, of_leaves)), of_hiddens

    chunks = (moving, fixed, targets.value, weights.value)
    found, (of_leaves, _) = _zeros_like_results(compute, chunks)
    ((first, others), of_leaves), of_hiddens = jax.lax.scan(body, (found, of_leaves), chunks)
    own, moved = iter(of_leaves), iter(of_hiddens)
    gradients = (
        jax.tree.unflatten(structure, [next(own) if leaf.perturbed else None for leaf in flat]),
        tuple(next(moved) if hidden.perturbed else None for hidden in hiddens),
    )
    return (first, *others), gradients


def _backward(values: Callable, gradients: Any, cotangents: tuple) -> tuple[Any, ...]:
    def scale(gradient: Any) -> Any:
        return None if gradient is None else (cotangents[0] * gradient).astype(gradient.dtype)

    of_leaves, of_hiddens = gradients
    scaled = [[scale(leaf) for leaf in leaves] for leaves in of_leaves]
    return scaled, tuple(map(scale, of_hiddens)), None, None


_chunked_sums.defvjp(_forward, _backward, symbolic_zeros=True)
