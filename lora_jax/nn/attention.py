"""Grouped-query attention: masks, and attention over new tokens, a cache and a prefix.

Shape letters: b batch, t time (queries), s source time (keys), d model, n heads, k kv heads, g = n
/ k, h head size, p prefix length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.nn import kernels
from lora_jax.nn.cache import Cache, LayerCache
from lora_jax.nn.kernels import MaskSpec
from lora_jax.nn.texts import Texts
from lora_jax.nn.virtual import Prefix


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVContext:
    """Keys and values that a layer attends to in addition to those of the new tokens; of a layer
    without attention its state.
    """

    cached: Any = None  # a `LayerCache`, or a `LayerState`
    prefix: Prefix | None = None  # the slice of this layer


def attention_masks(
    texts: Texts, cache: Cache | None = None, window: int | None = None
) -> tuple[jax.Array, ...]:
    """Return the causal mask (b, t, t) among new tokens or, with a cache, (b, t, s) for its slots,
    which hold the new tokens too.

    A query sees the keys of its own text up to itself and, with a `window`, only the last `window`
    tokens (itself included).
    """
    if cache is None:
        return (texts.visible(window=window),)
    distance = texts.positions[:, :, None] - jnp.arange(cache.slots)
    near = distance >= 0
    near = near if window is None else near & (distance < window)
    return (near & (texts.segment_ids != 0)[:, :, None],)


def mask_specs(
    kernel: str,
    texts: Texts,
    cache: Cache | None = None,
    windows: Sequence[int | None] = (None,),
    prefix_masks: Sequence[jax.Array] = (),
) -> list[Any]:
    """Return the masks argument of `attention` for each of `windows`: a tuple of masks or, for a
    fused kernel without cache and prefix, a `MaskSpec`. `prefix_masks` (b, t, p), one per window,
    are the masks of a prefix.
    """
    if prefix_masks:
        return [
            (*attention_masks(texts, cache, window), mask)
            for window, mask in zip(windows, prefix_masks, strict=True)
        ]
    if kernel == "xla" or cache is not None:
        return [attention_masks(texts, cache, window) for window in windows]
    kinds = range(len(windows))
    return [MaskSpec(texts, jnp.int32(i), kernel, tuple(windows)) for i in kinds]


def apply_softcap(x: jax.Array, limit: float) -> jax.Array:
    """limit * tanh(x / limit): about x where x is small, between -limit and limit everywhere."""
    return limit * jnp.tanh(x / limit)


def attention(
    queries: jax.Array,
    keys_values: list[tuple[jax.Array, jax.Array]],
    masks: tuple[jax.Array, ...] | MaskSpec,
    scale: float,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query attention (arXiv 2305.13245) over one or more blocks of keys and values.

    queries (b, t, n, h); each block is keys and values (b, k, s, h) with a mask (b, t, s). Returns
    (b, t, n, h). Scores and softmax are in float32; `softcap` limits the scores (arXiv 2408.00118).
    `sinks` (n,) are the scores of one more key per head, whose value is zero (arXiv 2309.17453).
    Only scores are concatenated over blocks.

    With a `MaskSpec` in place of masks, a fused kernel computes it over one block.
    """
    if isinstance(masks, MaskSpec):
        ((keys, values),) = keys_values
        return kernels.attend(queries, keys, values, masks, scale, softcap, sinks)
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
        block = block if softcap is None else apply_softcap(block, softcap)
        scores.append(jnp.where(mask[:, None, None], block, -1e30))
    probabilities = _softmax(scores, sinks).astype(queries.dtype)
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


def _softmax(scores: list[jax.Array], sinks: jax.Array | None) -> jax.Array:
    """Return probabilities (b, k, g, t, s) of scores in blocks, without those of sinks (n,)."""
    if sinks is None:
        return jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    b, kv_heads, group, t, _ = scores[0].shape
    sink = sinks.astype(jnp.float32).reshape(1, kv_heads, group, 1, 1)
    sink = jnp.broadcast_to(sink, (b, kv_heads, group, t, 1))
    return jax.nn.softmax(jnp.concatenate([*scores, sink], axis=-1), axis=-1)[..., :-1]


def attend(
    queries: jax.Array,
    new: tuple[jax.Array, jax.Array],
    kv: KVContext,
    masks: tuple[jax.Array, ...],
    scale: float,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache | None]:
    """`attention` over the `new` keys and values (b, k, t, h), the cache and the prefix of `kv`.
    Return its result and the cache with `new` written, if there is one.

    A prefix with a gate has a softmax of its own without sinks, and its result is added times
    tanh(gate) (arXiv 2303.16199).
    """
    cached = None if kv.cached is None else kv.cached.write(*new)
    blocks = [new if cached is None else cached.read()]
    prefix = kv.prefix
    if prefix is None:
        return attention(queries, blocks, masks, scale, softcap, sinks), cached
    own = prefix.heads(queries.shape[0], queries.shape[-1])
    if prefix.gate is None:
        return attention(queries, [*blocks, own], masks, scale, softcap, sinks), cached
    mixed = attention(queries, blocks, masks[:-1], scale, softcap, sinks)
    gated = attention(queries, [own], masks[-1:], scale, softcap)
    return mixed + jnp.tanh(prefix.gate).astype(mixed.dtype) * gated, cached
