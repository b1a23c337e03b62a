"""Weighted next-token cross-entropy whose logits never stand in memory whole.

    loss = sum_i w_i * -log p(token_i | tokens before it in its segment) / sum_i w_i

The sum is computed here; the caller divides by the weights of the whole effective batch, so that
micro-batches and devices add up exactly. Weight i belongs to token i and is predicted from position
i - 1.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import tree
from lora_jax.models.common import Routing
from lora_jax.sharding import BATCH, constrain, logits_axes


def next_token_sums(
    module: Any, hidden: jax.Array, batch: dict[str, jax.Array], chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Sums over a batch: weighted negative log-likelihood (nats) and weights.

    Args:
        module: the model; `module.logits` maps (n, d) to (n, vocab).
        hidden: (b, t, d), final hidden states.
        batch: tokens (b, t) int32 and loss_weights (b, t) float32.
        chunk: tokens whose logits stand in memory at once.
    """
    # By features: every device can put the tokens of its rows in order, and none holds them whole.
    hidden = constrain(hidden, *BATCH, None, "tensor")
    targets = jnp.roll(batch["tokens"], -1, axis=1)
    weights = jnp.roll(batch["loss_weights"], -1, axis=1).at[:, -1].set(0.0)
    # Supervised positions first in every row: chunks without any come last and are skipped.
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    targets, weights = (jnp.take_along_axis(x, order, axis=1) for x in (targets, weights))
    hidden = jnp.take_along_axis(hidden, order[:, :, None], axis=1)
    rows, time = targets.shape
    width = max(1, min(time, chunk // rows))
    padding = -time % width

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(rows, (time + padding) // width, width, *x.shape[2:])
        return x.swapaxes(0, 1)  # (chunks, rows, width, ...)

    graphdef, state = nnx.split(module)
    leaves, structure = jax.tree.flatten(_lay_head(state, module, hidden))

    def head(leaves: list[jax.Array], hidden: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves)).logits(hidden)

    total = _chunked_nll(head, leaves, split(hidden), split(targets), split(weights))
    return total, weights.sum()


def _lay_head(state: Any, module: Any, hidden: jax.Array) -> Any:
    """The weights of the head, split by the vocabulary as the logits are: once, not per chunk."""
    vocab = jax.eval_shape(module.logits, hidden[:1, :1]).shape[-1]
    axes = logits_axes(vocab)[1]
    paths = [tuple(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    heads = tree.OUTPUT_HEADS
    if not any(set(path) & set(heads) for path in paths):
        heads = tree.TIED_EMBEDDINGS

    def lay(path: Any, leaf: jax.Array) -> jax.Array:
        names = {str(getattr(key, "key", key)) for key in path}
        if not names & set(heads):
            return leaf
        return constrain(leaf, *(axes if size == vocab else None for size in leaf.shape))

    return jax.tree_util.tree_map_with_path(lay, state)


def load_balancing_loss(routing: Routing) -> jax.Array:
    """How unevenly the routers of all layers spread the real tokens over their experts (arXiv
    2101.03961, equations 4 to 6), as in transformers: experts * sum_e f_e P_e.

    f_e is how often a token went to expert e, P_e the mean probability that routers gave it; the
    chosen ones add up to k, so that routers which spread evenly have k. `routing` holds sums over
    the tokens of every layer, (layers, experts) and (layers,). Only P_e has a gradient.
    """
    tokens = jnp.maximum(routing.tokens.sum(), 1)
    often = routing.load.sum(axis=0) / tokens
    likely = routing.probabilities.sum(axis=0) / tokens
    return often.shape[0] * jnp.sum(often * likely)


def _chunk_nll(
    head: Any, leaves: list, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    vocab = jax.eval_shape(head, leaves, hidden).shape[-1]
    rows, columns = logits_axes(vocab)
    logits = head(leaves, constrain(hidden, rows, None, None)).astype(jnp.float32)
    logits = constrain(logits, rows, None, columns)
    # Not an index: each device looks in its own part of the vocabulary. Of a model that classifies,
    # targets without a weight are no labels, and pick nothing.
    here = jnp.arange(vocab) == targets[..., None]
    picked = jnp.sum(jnp.where(here, logits, 0), axis=-1)
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked))


def _skip_unsupervised(
    compute: Callable, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> Any:
    """`compute` of a chunk, or zeros of the same shapes where the chunk has no weight."""

    def zeros(*chunk: jax.Array) -> Any:
        return jax.tree.map(
            lambda out: jnp.zeros(out.shape, out.dtype), jax.eval_shape(compute, *chunk)
        )

    return jax.lax.cond(jnp.any(weights != 0), compute, zeros, hidden, targets, weights)


def _nll(
    head: Callable, leaves: list, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """The sum over all chunks; hidden (chunks, rows, width, d), targets and weights (chunks, rows,
    width).
    """

    def body(total, chunk):
        return total + _skip_unsupervised(
            lambda *chunk: _chunk_nll(head, leaves, *chunk), *chunk
        ), None

    return jax.lax.scan(body, jnp.float32(0), (hidden, targets, weights))[0]


_chunked_nll = jax.custom_vjp(_nll, nondiff_argnums=(0,))


def _forward(
    head: Callable, leaves: list, hidden: Any, targets: Any, weights: Any
) -> tuple[jax.Array, Any]:
    """Value and gradients in one pass: both are taken while a chunk's logits are there, then the
    logits are dropped.

    Recomputing them in the backward pass instead costs a third product with the vocabulary. Which
    leaves train is known at trace time (`perturbed`); the others get no gradient and cost nothing.
    """
    trained = [leaf.value for leaf in leaves if leaf.perturbed]

    def nll(trained, *chunk):
        own = iter(trained)
        return _chunk_nll(
            head, [next(own) if leaf.perturbed else leaf.value for leaf in leaves], *chunk
        )

    def body(sums, chunk):
        compute = functools.partial(jax.value_and_grad(nll, argnums=(0, 1)), trained)
        value, (of_leaves, of_hidden) = _skip_unsupervised(compute, *chunk)
        of_hidden = constrain(of_hidden, *BATCH, None, "tensor")
        return jax.tree.map(jnp.add, sums, (value, of_leaves)), of_hidden

    start = (jnp.float32(0), [jnp.zeros_like(leaf) for leaf in trained])
    (total, sums), of_hidden = jax.lax.scan(
        body, start, (hidden.value, targets.value, weights.value)
    )
    own = iter(sums)
    return total, ([next(own) if leaf.perturbed else None for leaf in leaves], of_hidden)


def _backward(head: Callable, gradients: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    of_leaves, of_hidden = gradients
    scaled = [None if leaf is None else (cotangent * leaf).astype(leaf.dtype) for leaf in of_leaves]
    return scaled, (cotangent * of_hidden).astype(of_hidden.dtype), None, None


_chunked_nll.defvjp(_forward, _backward, symbolic_zeros=True)
