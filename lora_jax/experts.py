"""Products of rows with the matrix of their expert, and their gradients."""

from typing import Any

import jax
import jax.numpy as jnp

_BLOCK = 32  # rows of one expert that a CPU multiplies at once


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Compute `jax.lax.ragged_dot`; by blocks on a CPU, where it multiplies every row by every
    expert.
    """
    return jax.lax.platform_dependent(x, w, group_sizes, cpu=_by_blocks, default=jax.lax.ragged_dot)


def grouped_matmul_transposed(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Compute `grouped_matmul` with matrices stored as (out, in): w (experts, out, in). A CPU makes
    no transposed copy.
    """

    def turned(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, w.swapaxes(1, 2), group_sizes)

    def by_blocks(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return _times_blocks(x, w, group_sizes, 2)

    return jax.lax.platform_dependent(x, w, group_sizes, cpu=by_blocks, default=turned)


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
