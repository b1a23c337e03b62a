"""The input of several linears whose outputs the tensor axis of a mesh splits.

    y_q, y_k, y_v = x @ W_q, x @ W_k, x @ W_v

Every device of the tensor axis has columns of each W, and needs all of x for them. The gradient of
x is a sum over the linears and over these devices. Written as separate products, it is summed over
the devices once for each linear. Here x gets an axis of devices first, `each`: the gradients of the
linears are added on each device, and their sum over that axis is the only exchange.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lora_jax.sharding import BATCH, constrain, tensor_devices


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedInput:
    """An input (b, t, in) of linears, once for every device of the tensor axis."""

    x: jax.Array  # (b, t, in)
    each: jax.Array  # (devices of the tensor axis, b, t, in): x, split over the first axis

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self):
        return self.x.dtype

    def __matmul__(self, matrix: jax.Array) -> jax.Array:
        """Return x @ matrix, (b, t, out), with out split over the tensor axis if that divides it;
        matrix is (in, out).
        """
        if matrix.shape[-1] % len(self.each):
            return self.x @ matrix
        own = P("tensor")
        columns = P(None, "tensor")
        product = jax.shard_map(
            _own_columns,
            in_specs=(own, columns),
            out_specs=P(None, None, "tensor"),
            axis_names={"tensor"},
        )
        return product(self.each, matrix)


def _own_columns(each: jax.Array, columns: jax.Array) -> jax.Array:
    """Return x (1, b, t, in) @ columns (in, out), (b, t, out), on one device of the axis."""
    rows = each.reshape(-1, each.shape[-1])
    return (rows @ columns).reshape(*each.shape[1:-1], -1)


def plain(x: jax.Array | SharedInput) -> jax.Array:
    """Return the input (b, t, in) itself."""
    return x.x if isinstance(x, SharedInput) else x


def as_rows(x: jax.Array | SharedInput) -> jax.Array | SharedInput:
    """Return x (..., in) as (rows, in); as it is where a tensor axis may split one of its axes."""
    if isinstance(x, SharedInput) or tensor_devices() > 1:
        return x
    return x.reshape(-1, x.shape[-1])


def share(x: jax.Array | SharedInput) -> Any:
    """Return x (b, t, in) as the input of several linears, a `SharedInput`; without a tensor axis
    x itself. It is for linears alone, and has a shape and a dtype.
    """
    devices = tensor_devices()
    if devices == 1 or isinstance(x, SharedInput):
        return x
    each = jnp.broadcast_to(x, (devices, *x.shape))
    return SharedInput(x, constrain(each, "tensor", *BATCH, None, None))
