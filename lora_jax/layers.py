"""What decoder models are built from: Linear, Embed, RMSNorm, rotary positions, attention with an
optional cache.

Shape letters: b batch, t time (queries), s source time (keys), d model, n heads, k kv heads, g = n
/ k, h head size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
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
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(x.dtype) * self.scale.get_value().astype(x.dtype)


def rope_frequencies(head_dim: int, parameters: dict) -> np.ndarray:
    """Inverse frequencies (head_dim / 2,) of rotary positions (arXiv 2104.09864), as transformers
    computes them.

    `parameters` is the `rope_parameters` mapping of a Hugging Face config: rope_theta, rope_type
    default, linear (arXiv 2306.15595) or llama3 with their fields.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = np.float32(1.0) / np.float32(parameters["rope_theta"]) ** exponents
    match parameters["rope_type"]:
        case "linear":
            return inverse / np.float32(parameters["factor"])
        case "llama3":
            old = parameters["original_max_position_embeddings"]
            low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
            wavelength = 2 * np.pi / inverse
            smooth = np.clip((old / wavelength - low) / (high - low), 0, 1)
            return ((1 - smooth) * inverse / parameters["factor"] + smooth * inverse).astype(
                np.float32
            )
    return inverse


def rope(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (b, t, 1, h) in float32 for positions (b, t)."""
    angles = positions[:, :, None].astype(jnp.float32) * jnp.asarray(frequencies)
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate queries or keys (b, t, heads, h) by their positions; halves are paired as in Hugging
    Face models.
    """
    cos, sin = (part.astype(x.dtype) for part in cos_sin)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


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


def attention_masks(
    segment_ids: jax.Array, cache: Cache | None, window: int | None
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


def attention(
    queries: jax.Array,
    keys_values: list[tuple[jax.Array, jax.Array]],
    masks: tuple[jax.Array, ...],
    scale: float,
) -> jax.Array:
    """Grouped-query attention (arXiv 2305.13245) over one or more blocks of keys and values.

    queries (b, t, n, h); each block is keys and values (b, k, s, h) with a mask (b, t, s). Returns
    (b, t, n, h). Scores and softmax are in float32. Blocks are joined at the scores, so a cache is
    read and never copied.
    """
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
