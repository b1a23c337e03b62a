"""Virtual tokens: the argument of the forward for prompt and prefix tuning.

    Prompt   embeddings in place of tokens            (arXiv 2104.08691)
    Prefix   keys and values in front of every layer  (arXiv 2101.00190)

Each text has them, even if several texts are packed into a row. The embeddings of a `Prompt`
replace those of the first tokens of a text, for which a batch must hold placeholders
(`placeholders`). A `Prefix` needs no tokens, but it may use the first positions.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompt:
    """Embeddings of virtual tokens, as the first layer receives them."""

    embeddings: Any  # (p, d)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Keys and values of virtual tokens; the keys are already rotated.

    Without a gate they are keys like others, at positions 0 to p - 1, and the text begins at
    position p. With a gate, attention over the prefix alone is added times tanh(gate) (arXiv
    2303.16199): a gate of zero leaves the layer unchanged, and the text begins at position 0.
    """

    keys: Any  # (layers, p, k * h)
    values: Any  # (layers, p, k * h)
    gate: jax.Array | None = None  # (layers,)

    def heads(self, rows: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Return keys and values of one layer (p, k * h) for a batch, (b, k, p, h) each."""

        def split(x: jax.Array) -> jax.Array:
            x = x.reshape(len(x), -1, head_dim).swapaxes(0, 1)
            return jnp.broadcast_to(x, (rows, *x.shape))

        return split(self.keys), split(self.values)

    def visible(self, positions: jax.Array, window: int | None) -> jax.Array:
        """Return the mask (b, t, p) of the prefix for tokens at `positions` (b, t)."""
        length = self.keys.shape[1]
        everywhere = jnp.ones((*positions.shape, length), bool)
        if window is None or self.gate is not None:
            return everywhere
        return positions[:, :, None] - jnp.arange(length) < window


Virtual = Prompt | Prefix


def placeholders(virtual: Virtual | None) -> int:
    """Return the number of tokens that a batch must hold at the start of each text for a `Prompt`;
    their ids do not matter.
    """
    return len(virtual.embeddings) if isinstance(virtual, Prompt) else 0


def first_position(virtual: Virtual | None) -> int:
    """Return the position of the first token of a text."""
    if isinstance(virtual, Prefix) and virtual.gate is None:
        return virtual.keys.shape[1]
    return 0


def put_in(x: jax.Array, positions: jax.Array, virtual: Virtual | None) -> jax.Array:
    """Return embeddings x (b, t, d) with those of a `Prompt` at the start of each text."""
    if not isinstance(virtual, Prompt):
        return x
    length = len(virtual.embeddings)
    own = virtual.embeddings.astype(x.dtype)[jnp.minimum(positions, length - 1)]
    return jnp.where((positions < length)[..., None], own, x)


def by_layer(virtual: Virtual | None) -> Prefix | None:
    """Return the prefix, whose arrays have a layer axis to scan over; None for other values."""
    return virtual if isinstance(virtual, Prefix) else None
