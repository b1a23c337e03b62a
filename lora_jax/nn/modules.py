"""Layers that models are built from: Linear, Embed, norms and activations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import weights

_NORMAL = nnx.initializers.normal(0.02)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class Linear(nnx.Module):
    """y = x @ kernel + bias, with kernel (in, out)."""

    def __init__(
        self, features_in: int, features_out: int, *, use_bias: bool = False, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(_NORMAL(rngs.params(), (features_in, features_out)))
        self.bias = nnx.Param(jnp.zeros(features_out)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = weights.linear(x, self.kernel.get_value())
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class Embed(nnx.Module):
    """Token embeddings (vocab, d), also usable as a tied output head."""

    def __init__(self, vocab: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_NORMAL(rngs.params(), (vocab, features)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return weights.embed(tokens, self.embedding.get_value())

    def attend(self, x: jax.Array) -> jax.Array:
        return weights.unembed(x, self.embedding.get_value())


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, the mean square in float32 (arXiv 1910.07467)."""

    def __init__(self, features: int, epsilon: float, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(features))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        normed = self._normed(x).astype(x.dtype)
        return normed * self.scale.get_value().astype(x.dtype)

    def _normed(self, x: jax.Array) -> jax.Array:
        return _unit(x, self.epsilon)


def _unit(x: jax.Array, epsilon: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)


class UnitRMSNorm(nnx.Module):
    """x / rms(x) in float32, without a weight."""

    def __init__(self, epsilon: float):
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return _unit(x, self.epsilon).astype(x.dtype)


class WideRMSNorm(RMSNorm):
    """x / rms(x) * scale, all of it in float32: gpt-oss's and Gemma 4's."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return (self._normed(x) * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


class OffsetRMSNorm(RMSNorm):
    """x / rms(x) * (1 + scale), all of it in float32: Gemma's."""

    def __init__(self, features: int, epsilon: float, *, rngs: nnx.Rngs):
        super().__init__(features, epsilon, rngs=rngs)
        self.scale = nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = 1.0 + self.scale.get_value().astype(jnp.float32)
        return (self._normed(x) * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation * scale + bias, moments in float32 (arXiv 1607.06450)."""

    def __init__(self, features: int, epsilon: float, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        normed = self._normed(x).astype(x.dtype)
        return normed * self.scale.get_value().astype(x.dtype) + self.bias.get_value().astype(
            x.dtype
        )

    def _normed(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return wide * jax.lax.rsqrt(variance + self.epsilon)


class OffsetLayerNorm(LayerNorm):
    """(x - mean) / deviation * (1 + scale) + bias, all of it in float32: Nemotron's."""

    def __init__(self, features: int, epsilon: float, *, rngs: nnx.Rngs):
        super().__init__(features, epsilon, rngs=rngs)
        self.scale = nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = 1.0 + self.scale.get_value().astype(jnp.float32)
        return (self._normed(x) * scale + self.bias.get_value()).astype(x.dtype)


class PlainLayerNorm(LayerNorm):
    """(x - mean) / deviation * scale, all of it in float32, without a bias: Cohere's. With several
    axes in `features` the moments are those of the last one.
    """

    def __init__(self, features: int | tuple[int, ...], epsilon: float, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(features))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return (self._normed(x) * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)
