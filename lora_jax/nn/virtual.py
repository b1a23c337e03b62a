"""Virtual tokens: what prompt and prefix tuning hand to the forward beside the parameters.

    Prompt   embeddings in the place of tokens        (arXiv 2104.08691)
    Prefix   keys and values in front of every layer  (arXiv 2101.00190)

Every text has its own, also where several are packed into a row. The embeddings of a `Prompt` take
the places of the first tokens of a text, which a batch must leave for them (`placeholders`); a
`Prefix` takes no places, but the positions that come first.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompt:
    """Embeddings of virtual tokens, as the first layer gets them."""

    embeddings: jax.Array  # (p, d)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Keys and values of virtual tokens; keys as attention compares them, rotated already.

    Without a gate they are keys among others, at positions 0 to p - 1, and the text begins at
    position p. With one, what attention finds in the prefix alone is added with the weight
    tanh(gate) (arXiv 2303.16199): at zero the layer is what it was, and the text begins at 0.
    """

    keys: jax.Array  # (layers, p, k * h)
    values: jax.Array  # (layers, p, k * h)
    gate: jax.Array | None = None  # (layers,)

    def heads(self, rows: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer (p, k * h) for a batch: (b, k, p, h) each."""

        def split(x: jax.Array) -> jax.Array:
            x = x.reshape(len(x), -1, head_dim).swapaxes(0, 1)
            return jnp.broadcast_to(x, (rows, *x.shape))

        return split(self.keys), split(self.values)

    def visible(self, positions: jax.Array, window: int | None) -> jax.Array:
        """What tokens at `positions` (b, t) see of it: (b, t, p)."""
        length = self.keys.shape[1]
        everywhere = jnp.ones((*positions.shape, length), bool)
        if window is None or self.gate is not None:
            return everywhere
        return positions[:, :, None] - jnp.arange(length) < window


Virtual = Prompt | Prefix


def placeholders(virtual: Virtual | None) -> int:
    """Tokens that a batch must hold at the start of every text for a `Prompt`; what they are does
    not matter.
    """
    return len(virtual.embeddings) if isinstance(virtual, Prompt) else 0


def first_position(virtual: Virtual | None) -> int:
    """The position of a text's first token."""
    if isinstance(virtual, Prefix) and virtual.gate is None:
        return virtual.keys.shape[1]
    return 0


def put_in(x: jax.Array, positions: jax.Array, virtual: Virtual | None) -> jax.Array:
    """Embeddings (b, t, d) of tokens, those of a `Prompt` in their places."""
    if not isinstance(virtual, Prompt):
        return x
    length = len(virtual.embeddings)
    own = virtual.embeddings.astype(x.dtype)[jnp.minimum(positions, length - 1)]
    return jnp.where((positions < length)[..., None], own, x)


def by_layer(virtual: Virtual | None) -> Prefix | None:
    """What is to be split over the layers."""
    return virtual if isinstance(virtual, Prefix) else None
