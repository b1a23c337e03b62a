"""What models are built from: Linear, Embed, norms, attention with an optional cache.

Shape letters: b batch, t time (queries), s source time (keys), d model, n heads, k kv heads, g = n
/ k, h head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax import weights
from lora_jax.nn import kernels
from lora_jax.nn.virtual import Prefix

_NORMAL = nnx.initializers.normal(0.02)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
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
        wide = x.astype(jnp.float32)
        return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)


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
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(variance + self.epsilon)).astype(x.dtype)
        return normed * self.scale.get_value().astype(x.dtype) + self.bias.get_value().astype(
            x.dtype
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far. A model reads it and returns it with the new
    tokens written.
    """

    keys: jax.Array  # (layers, b, k, s, h), already rotated
    values: jax.Array  # (layers, b, k, s, h)
    segment_ids: jax.Array  # (b, s); 0: nothing there
    length: jax.Array  # () how many slots are used

    def write(self, keys: jax.Array, values: jax.Array, segment_ids: jax.Array) -> "Cache":
        """Put the keys and values (layers, b, k, t, h) of new tokens behind the used slots."""
        zero = jnp.zeros_like(self.length)
        start = (zero, zero, zero, self.length, zero)
        return Cache(
            jax.lax.dynamic_update_slice(self.keys, keys.astype(self.keys.dtype), start),
            jax.lax.dynamic_update_slice(self.values, values.astype(self.values.dtype), start),
            jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, (zero, self.length)),
            self.length + segment_ids.shape[1],
        )


def empty_cache(layers: int, rows: int, slots: int, kv_heads: int, head_dim: int, dtype) -> Cache:
    shape = (layers, rows, kv_heads, slots, head_dim)
    return Cache(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((rows, slots), jnp.int32),
        jnp.int32(0),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Past:
    """What a layer's attention sees beside the new tokens."""

    cached: tuple[jax.Array, jax.Array] | None = None  # keys and values (b, k, s, h)
    prefix: Prefix | None = None  # one layer of it


def attention_masks(
    segment_ids: jax.Array, cache: Cache | None, window: int | None = None
) -> tuple[jax.Array, ...]:
    """What each query may see: (b, t, t) among the new tokens and, with a cache, (b, t, s) in it
    before them.

    A query sees keys of its own segment, not after itself, and within `window` tokens (itself
    included) if given. Inside a segment tokens stand next to each other, so distance in slots is
    distance in positions.
    """
    time = jnp.arange(segment_ids.shape[1])

    def visible(distance: jax.Array, key_segments: jax.Array) -> jax.Array:
        near = distance >= 0
        if window is not None:
            near &= distance < window
        return near[None] & (segment_ids[:, :, None] == key_segments[:, None, :])

    new = visible(time[:, None] - time[None, :], segment_ids)
    if cache is None:
        return (new,)
    slots = jnp.arange(cache.segment_ids.shape[1])
    old = visible(cache.length + time[:, None] - slots[None, :], cache.segment_ids)
    return new, old & (slots < cache.length)[None, None, :]


def sights(
    kernel: str,
    segment_ids: jax.Array,
    cache: Cache | None = None,
    windows: Sequence[int | None] = (None,),
    beside: Sequence[jax.Array] = (),
) -> list[Any]:
    """What queries may see in layers of each of `windows`: for `attention`, masks, or with a fused
    kernel and neither cache nor prefix, which they do not read, a `Sight`. `beside` says what is
    seen of a prefix in each, (b, t, p).
    """
    if beside:
        return [
            (*attention_masks(segment_ids, cache, window), mask)
            for window, mask in zip(windows, beside, strict=True)
        ]
    if kernel == "xla" or cache is not None:
        return [attention_masks(segment_ids, cache, window) for window in windows]
    kinds = range(len(windows))
    return [kernels.Sight(segment_ids, jnp.int32(i), kernel, tuple(windows)) for i in kinds]


def bend(x: jax.Array, limit: float) -> jax.Array:
    """x where it is small, never beyond +-limit."""
    return limit * jnp.tanh(x / limit)


def attention(
    queries: jax.Array,
    keys_values: list[tuple[jax.Array, jax.Array]],
    masks: tuple[jax.Array, ...] | kernels.Sight,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Grouped-query attention (arXiv 2305.13245) over one or more blocks of keys and values.

    queries (b, t, n, h); each block is keys and values (b, k, s, h) with a mask (b, t, s). Returns
    (b, t, n, h). Scores and softmax are in float32; with `softcap` scores are bent to stay below it
    (arXiv 2408.00118). Blocks are joined at the scores, so a cache is read and never copied.

    With a `Sight` in place of masks a fused kernel computes it, over one block.
    """
    if isinstance(masks, kernels.Sight):
        ((keys, values),) = keys_values
        return kernels.attend(queries, keys, values, masks, scale, softcap)
    b, t, n, h = queries.shape
    kv_heads = keys_values[0][0].shape[1]
    group = n // kv_heads
    # One batched product over kv heads: (b, k, g * t, h) x (b, k, s, h).
    grouped = (
        queries.reshape(b, t, kv_heads, group, h)
        .transpose(0, 2, 3, 1, 4)
        .reshape(b, kv_heads, group * t, h)
    )
    scores = []
    for (keys, _), mask in zip(keys_values, masks, strict=True):
        block = jnp.einsum(
            "bkqh,bksh->bkqs",
            grouped,
            keys.astype(queries.dtype),
            preferred_element_type=jnp.float32,
        )
        block = block.reshape(b, kv_heads, group, t, -1) * scale
        block = block if softcap is None else bend(block, softcap)
        scores.append(jnp.where(mask[:, None, None], block, -1e30))
    probabilities = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(queries.dtype)
    probabilities = probabilities.reshape(b, kv_heads, group * t, -1)
    ends = np.cumsum([keys.shape[2] for keys, _ in keys_values])
    mixed = sum(
        jnp.einsum("bkqs,bksh->bkqh", part, values.astype(queries.dtype))
        for part, (_, values) in zip(
            jnp.split(probabilities, ends[:-1], axis=-1), keys_values, strict=True
        )
    )
    mixed = jnp.asarray(mixed)
    return mixed.reshape(b, kv_heads, group, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def attend(
    queries: jax.Array,
    new: tuple[jax.Array, jax.Array],
    past: Past,
    masks: tuple[jax.Array, ...],
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """`attention` over the `new` keys and values (b, k, t, h), those of the past, and a prefix."""
    blocks = [new] if past.cached is None else [new, past.cached]
    prefix = past.prefix
    if prefix is None:
        return attention(queries, blocks, masks, scale, softcap)
    own = prefix.heads(queries.shape[0], queries.shape[-1])
    if prefix.gate is None:
        return attention(queries, [*blocks, own], masks, scale, softcap)
    mixed = attention(queries, blocks, masks[:-1], scale, softcap)
    beside = attention(queries, [own], masks[-1:], scale, softcap)
    return mixed + jnp.tanh(prefix.gate).astype(mixed.dtype) * beside
