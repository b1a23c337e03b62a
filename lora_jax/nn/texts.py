"""The texts of a packed batch, and which tokens of a row see which others.

Texts that begin alike may share their start. A row then holds them like the branches of a tree, a
shared part before the parts that go on from it:

    texts        a b c d    a b c e f    x y
    tokens       a b c d e f x y
    seen_until   6 6 6 4 6 6 8 8     the slot behind the last token that sees this one
    positions    0 1 2 3 3 4 0 1

A token sees another one if that one is before it in the row, and it is before `seen_until` of the
other. Shape letters: b batch, t time.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Texts:
    """Positions of the tokens in their texts, and the texts of the tokens."""

    positions: jax.Array  # (b, t)
    segment_ids: jax.Array  # (b, t), 0 for padding
    seen_until: jax.Array | None = None  # (b, t); None: no text shares a token with another

    def visible(self, causal: bool = True, window: int | None = None) -> jax.Array:
        """Return the mask (b, t, t) of the tokens of a text among each other: a query sees the keys
        of its own text; with `causal` those up to itself; with a `window` those fewer than `window`
        tokens away.
        """
        time = jnp.arange(self.segment_ids.shape[1])
        before = (time[:, None] - time[None, :])[None]
        if self.seen_until is None:
            seen = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
            distance = before  # the tokens of a text are adjacent
        else:
            seen = time[:, None] < self.seen_until[:, None, :]
            distance = self.positions[:, :, None] - self.positions[:, None, :]
        if causal:
            seen &= before >= 0
        return seen if window is None else seen & (jnp.abs(distance) < window)
