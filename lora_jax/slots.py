"""Products of rows with the low-rank factors of their slots in a bank.

    delta = sum_m weight_m * (x @ a[slot_m].T) @ b[slot_m]

Two implementations give the same sums. `gather` copies the factors of each row and multiplies row
by row; `grouped` multiplies every row by the factors of all slots at once and masks what is not the
row's. A value that is not finite in one slot does not reach the rows of another.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.experts import grouped_matmul, grouped_matmul_transposed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """The low-rank factors of one weight in every slot. A weight of a stack has leading axes for
    layers and experts.
    """

    a: jax.Array  # (..., slots, rank, in)
    b: jax.Array  # (..., slots, rank, out)
    gain: jax.Array | None = None  # (..., slots, 1, out); None: 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """The slots of every row and their weights."""

    ids: jax.Array  # (rows, m) int32
    weights: jax.Array  # (rows, m) float32

    @property
    def active(self) -> jax.Array:
        """True for the entries that change a row (rows, m): slot 0 is the base."""
        return (self.ids != 0) & (self.weights != 0)

    def take(self, rows: jax.Array) -> "Choice":
        """Return the choice of other rows, given by index."""
        return Choice(self.ids[rows], self.weights[rows])


def gathers(rows: int, times: int, chosen: int, slots: int) -> bool:
    """Return True where `gather` is faster, by the static shapes alone."""
    # `gather` copies the factors of each row: cheap for few rows, or next to long ones. `grouped`
    # multiplies every row by all slots, without a copy.
    return 4 * rows * chosen <= slots or times >= 64


def apply(y: jax.Array, x: jax.Array, factors: Factors, choice: Choice) -> jax.Array:
    """Return y (rows, time, out), the product of x (rows, time, in) with the base, with the update
    of every row's slots. Rows on the base alone keep every bit.
    """
    rows, times, _ = x.shape
    fast = gathers(rows, times, choice.ids.shape[1], factors.a.shape[-3])
    update = (gather if fast else grouped)(x, factors, choice)
    return _add(y, update, _own_gain(factors, choice), choice)


def apply_to_experts(
    y: jax.Array, x: jax.Array, factors: Factors, choice: Choice, group_sizes: jax.Array
) -> jax.Array:
    """Return y (rows, out) with the update of every row's slots and expert; x (rows, in) is sorted
    by expert.
    """
    fast = gathers(len(x), 1, choice.ids.shape[1], factors.a.shape[-3])
    update = gather_experts if fast else grouped_experts
    expert = expert_of_row(group_sizes, len(x))
    gain = _own_gain(factors, choice, expert)
    total = _add(y[:, None], update(x, factors, choice, group_sizes)[:, None], gain, choice)
    return total[:, 0]


def apply_to_lookup(y: jax.Array, ids: jax.Array, factors: Factors, choice: Choice) -> jax.Array:
    """Return y (rows, time, out), the embeddings of ids (rows, time), with the update of every
    row's slots.
    """
    inner = factors.a[choice.ids[:, None, :], :, ids[:, :, None]]  # (rows, time, m, rank)
    return _add(
        y, _expand(inner, factors.b[choice.ids], choice), _own_gain(factors, choice), choice
    )


def expert_of_row(group_sizes: jax.Array, rows: int) -> jax.Array:
    """Return the expert of every row (rows,) of rows sorted by expert."""
    return jnp.repeat(jnp.arange(len(group_sizes)), group_sizes, total_repeat_length=rows)


def gather(x: jax.Array, factors: Factors, choice: Choice) -> jax.Array:
    """Return the update (rows, time, out) of x (rows, time, in) by products per row."""
    return _per_row(x, factors.a[choice.ids], factors.b[choice.ids], choice)


def gather_experts(
    x: jax.Array, factors: Factors, choice: Choice, group_sizes: jax.Array
) -> jax.Array:
    """Return the update (rows, out) of x (rows, in), sorted by expert, by products per row."""
    at = expert_of_row(group_sizes, len(x))[:, None], choice.ids
    return _per_row(x[:, None], factors.a[at], factors.b[at], choice)[:, 0]


def grouped(x: jax.Array, factors: Factors, choice: Choice) -> jax.Array:
    """Return the update (rows, time, out) of x (rows, time, in) by products with all slots."""
    (rows, times, width), rank = x.shape, factors.a.shape[-2]
    a, b = (part.reshape(-1, part.shape[-1]).astype(x.dtype) for part in (factors.a, factors.b))
    inner = _mask((x.reshape(-1, width) @ a.T).reshape(rows, times, -1, rank), choice)
    return (inner.reshape(rows * times, -1) @ b).reshape(rows, times, -1)


def grouped_experts(
    x: jax.Array, factors: Factors, choice: Choice, group_sizes: jax.Array
) -> jax.Array:
    """Return the update (rows, out) of x (rows, in), sorted by expert, by products of each expert
    with all slots.
    """
    rows, (experts, _, rank, _) = len(x), factors.a.shape
    a, b = (
        part.reshape(experts, -1, part.shape[-1]).astype(x.dtype) for part in (factors.a, factors.b)
    )
    inner = grouped_matmul_transposed(x, a, group_sizes).reshape(rows, 1, -1, rank)
    return grouped_matmul(_mask(inner, choice).reshape(rows, -1), b, group_sizes)


def _per_row(x: jax.Array, a: jax.Array, b: jax.Array, choice: Choice) -> jax.Array:
    """Multiply x (rows, time, in) by a (rows, m, rank, in), and the weighted result by b (rows, m,
    rank, out).
    """
    return _expand(jnp.einsum("nti,nmri->ntmr", x, a.astype(x.dtype)), b, choice)


def _expand(inner: jax.Array, b: jax.Array, choice: Choice) -> jax.Array:
    """Return the weighted sum over m of inner (rows, time, m, rank) @ b (rows, m, rank, out)."""
    share = jnp.where(choice.active, choice.weights, 0).astype(inner.dtype)[:, None, :, None]
    inner = jnp.where(share != 0, inner * share, 0)
    return jnp.einsum("ntmr,nmro->nto", inner, b.astype(inner.dtype))


def _mask(inner: jax.Array, choice: Choice) -> jax.Array:
    """Weight products with all slots (rows, time, slots, rank); those of other slots become 0."""
    is_own = (choice.ids[..., None] == jnp.arange(inner.shape[-2])) & choice.active[..., None]
    share = jnp.where(is_own, choice.weights[..., None], 0).sum(axis=1).astype(inner.dtype)
    share = share[:, None, :, None]
    return jnp.where(share != 0, inner * share, 0)


def _own_gain(factors: Factors, choice: Choice, expert: jax.Array | None = None) -> Any:
    """Return the gain of every row (rows, 1, out), None without gains. The gain of several slots
    is their product: 1 for all but one of them.
    """
    if factors.gain is None:
        return None
    gain = factors.gain[choice.ids if expert is None else (expert[:, None], choice.ids)]
    return jnp.prod(jnp.where(choice.active[..., None, None], gain, 1), axis=1)


def _add(y: jax.Array, update: jax.Array, gain: Any, choice: Choice) -> jax.Array:
    """Return gain * (y + update) for y (rows, time, out), and y itself for rows on the base."""
    total = y + update.astype(y.dtype)
    total = total if gain is None else total * gain.astype(y.dtype)
    return jnp.where(choice.active.any(axis=1)[:, None, None], total, y)
