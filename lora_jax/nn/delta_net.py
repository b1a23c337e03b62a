"""A layer's mixer of tokens by the gated delta rule (arXiv 2412.06464)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.nn.cache import LayerState
from lora_jax.nn.delta import Delta, advance, unit, whole
from lora_jax.nn.modules import ACTIVATIONS, Linear, RMSNorm
from lora_jax.nn.short_conv import ShortConv, convolve, starts
from lora_jax.nn.texts import Texts
from lora_jax.shared_input import share


@dataclass(frozen=True)
class Sizes:
    """Heads of a layer: several consecutive ones of values share one of queries and keys."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def keys(self) -> int:
        """Number of features of queries, and of keys."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Number of features of values."""
        return self.value_heads * self.value_dim

    @property
    def states(self) -> tuple[tuple[tuple[int, ...], Any], ...]:
        """Shapes and dtypes of what a layer keeps of a text: see `CacheShape`."""
        state = (self.value_heads, self.key_dim, self.value_dim)
        return ((self.taps - 1, 2 * self.keys + self.values), None), (state, jnp.float32)


class GatedNorm(RMSNorm):
    """x / rms(x) * scale * silu(gate), the gate in float32."""

    def gated(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """Return the product for x and gates (..., features)."""
        return (self(x) * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


class GatedDeltaNet(nnx.Module):
    """Queries, keys and values after a short convolution, the delta rule over them, and a gate.

    A family whose projections are others overrides `make_projections` and `project`.
    """

    def __init__(self, d: int, sizes: Sizes, act: str, epsilon: float, *, rngs: nnx.Rngs):
        self.make_projections(d, sizes, rngs)
        self.conv1d = ShortConv(2 * sizes.keys + sizes.values, sizes.taps, rngs=rngs)
        self.dt_bias = nnx.Param(jnp.ones(sizes.value_heads))
        self.A_log = nnx.Param(jnp.zeros(sizes.value_heads))
        self.norm = GatedNorm(sizes.value_dim, epsilon, rngs=rngs)
        self.out_proj = Linear(sizes.values, d, rngs=rngs)
        self.sizes, self.act = sizes, act

    def make_projections(self, d: int, sizes: Sizes, rngs: nnx.Rngs) -> None:
        """Make the linears that `project` reads."""
        self.in_proj_qkvz = Linear(d, 2 * sizes.keys + 2 * sizes.values, rngs=rngs)
        self.in_proj_ba = Linear(d, 2 * sizes.value_heads, rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values in one (b, t, features), gates (b, t, values), and the
        logits of strengths and of decays (b, t, value heads).
        """
        s, shape = self.sizes, x.shape[:2]
        group = s.value_heads // s.key_heads
        parts = self.in_proj_qkvz(x).reshape(*shape, s.key_heads, -1)
        ends = (s.key_dim, 2 * s.key_dim, 2 * s.key_dim + group * s.value_dim)
        *qkv, gate = (part.reshape(*shape, -1) for part in jnp.split(parts, ends, axis=-1))
        pair = self.in_proj_ba(x).reshape(*shape, s.key_heads, 2 * group)
        strength, step = (part.reshape(*shape, -1) for part in jnp.split(pair, 2, axis=-1))
        return jnp.concatenate(qkv, axis=-1), gate, strength, step

    def __call__(
        self, x: jax.Array, texts: Texts, cached: LayerState | None
    ) -> tuple[jax.Array, LayerState | None]:
        """Return the output (b, t, d) for x (b, t, d), and the cache after the new tokens."""
        mixed, gate, strength, step = self.project(share(x))
        mixed, states = convolve(self.conv1d, mixed, texts, cached)
        inputs = self._inputs(ACTIVATIONS[self.act](mixed), strength, step)
        if cached is None:
            out = whole(inputs, texts.segment_ids)
        else:
            *_, state = cached.read()
            out, state = advance(inputs, texts, starts(texts), state)
            cached = cached.write(*states, state)
        normed = self.norm.gated(out.astype(x.dtype), gate.reshape(out.shape))
        return self.out_proj(normed.reshape(*x.shape[:2], -1)), cached

    def _inputs(self, mixed: jax.Array, strength: jax.Array, step: jax.Array) -> Delta:
        s, shape = self.sizes, mixed.shape[:2]
        q, k, v = jnp.split(mixed, (s.keys, 2 * s.keys), axis=-1)
        q, k = (unit(part.reshape(*shape, s.key_heads, s.key_dim)) for part in (q, k))
        q, k = (
            jnp.repeat(part, s.value_heads // s.key_heads, axis=2)
            for part in (q * s.key_dim**-0.5, k)
        )
        rate = jnp.exp(self.A_log.get_value().astype(jnp.float32))
        bias = self.dt_bias.get_value().astype(jnp.float32)
        decay = -rate * jax.nn.softplus(step.astype(jnp.float32) + bias)
        values = v.reshape(*shape, s.value_heads, s.value_dim)
        return Delta(q, k, values, decay, jax.nn.sigmoid(strength))
