"""Llama 2 and 3, Mistral, SmolLM2, TinyLlama: `model_type` llama and mistral.

model / embed_tokens / embedding                                        (vocab, d)
model / layers / {input,post_attention}_layernorm / scale               (layers, d)
model / layers / self_attn / {q,k,v,o}_proj / kernel                    (layers, in, out)
model / layers / mlp / {gate,up,down}_proj / kernel                     (layers, in, out)
model / norm / scale                                                    (d,)
lm_head / kernel                                                        (d, vocab), unless tied
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.layers import (
    ACTIVATIONS,
    Cache,
    Embed,
    Linear,
    RMSNorm,
    attention,
    attention_masks,
    rope,
    rope_frequencies,
    rotate,
)
from lora_jax.models.common import scan_layers
from lora_jax.models.reader import ConfigReader
from lora_jax.sharding import BATCH, constrain

RULES = (
    (r"model\.embed_tokens\.embedding", P("tensor", "fsdp")),
    (r"model\.layers\..*\.(q|k|v|gate|up)_proj\.kernel", P("fsdp", "tensor")),
    (r"model\.layers\..*\.(o|down)_proj\.kernel", P("tensor", "fsdp")),
    (r"model\.layers\..*\.(q|k|v|gate|up)_proj\.bias", P("tensor")),
    (r"model\.layers\..*\.(o|down)_proj\.bias", P(None)),
    (r"model\.(layers\..*)?norm\.scale", P(None)),
    (r"lm_head\.kernel", P("fsdp", "tensor")),
)


@dataclass(frozen=True)
class Config:
    """The fields of a Hugging Face config that decide the numbers, under their own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None


def read_config(reader: ConfigReader) -> Config:
    """A `Config` from config.json; defaults are those of transformers."""
    mistral = reader.model_type == "mistral"
    heads = reader.integer("num_attention_heads")
    hidden = reader.integer("hidden_size")
    reader.refuse_unless_zero("attention_dropout")
    max_positions = reader.integer("max_position_embeddings", 4096 * 32 if mistral else 2048)
    return Config(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=reader.integer("num_key_value_heads", 8 if mistral else heads),
        head_dim=reader.integer("head_dim", hidden // heads),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        hidden_act=reader.choice("hidden_act", "silu", ACTIVATIONS),
        rope_parameters=reader.rope_parameters(("default", "linear", "llama3"), max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        attention_bias=reader.boolean("attention_bias", False) if not mistral else False,
        mlp_bias=reader.boolean("mlp_bias", False) if not mistral else False,
        sliding_window=reader.optional_integer("sliding_window", 4096) if mistral else None,
    )


class Attention(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d, h = config.hidden_size, config.head_dim
        n, k = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(d, n * h, use_bias=config.attention_bias, rngs=rngs)
        self.k_proj = Linear(d, k * h, use_bias=config.attention_bias, rngs=rngs)
        self.v_proj = Linear(d, k * h, use_bias=config.attention_bias, rngs=rngs)
        self.o_proj = Linear(n * h, d, use_bias=config.attention_bias, rngs=rngs)
        self.head_dim = h

    def __call__(self, x, cos_sin, masks, cached):
        """x (b, t, d); cached: keys and values (b, k, s, h) of earlier tokens, or None. Returns y
        and the new ones.
        """
        b, t, _ = x.shape
        q, k, v = (
            proj(x).reshape(b, t, -1, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        blocks = [(k, v)] if cached is None else [(k, v), cached]
        mixed = attention(q, blocks, masks, self.head_dim**-0.5)
        return self.o_proj(mixed.reshape(b, t, -1)), (k, v)


class MLP(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(d, f, use_bias=config.mlp_bias, rngs=rngs)
        self.up_proj = Linear(d, f, use_bias=config.mlp_bias, rngs=rngs)
        self.down_proj = Linear(f, d, use_bias=config.mlp_bias, rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, x):
        return self.down_proj(ACTIVATIONS[self.act](self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, cos_sin, masks, cached):
        x = constrain(x, *BATCH, None, None)
        y, new = self.self_attn(self.input_layernorm(x), cos_sin, masks, cached)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), new


class Decoder(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.vmap(lambda own: Block(config, rngs=own))(
            rngs.split(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.model = Decoder(config, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, rngs=rngs)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: Cache | None = None,
        compute_dtype: Any = jnp.float32,
        remat: str = "none",
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states (b, t, d) of tokens (b, t), and the cache with them written if one is
        given.
        """
        config = self.config
        x = self.model.embed_tokens(tokens).astype(compute_dtype)
        cos_sin = rope(positions, rope_frequencies(config.head_dim, config.rope_parameters))
        masks = attention_masks(segment_ids, cache, config.sliding_window)
        cached = None if cache is None else (cache.keys, cache.values)

        def block(x, layer, cached):
            x, new = layer(x, cos_sin, masks, cached)
            return x, None if cache is None else new

        x, new = scan_layers(block, self.model.layers, x, cached, remat)
        return self.model.norm(x), None if cache is None else cache.write(
            new[0], new[1], segment_ids
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(..., d) -> (..., vocab) in the dtype of `hidden`."""
        return (
            self.model.embed_tokens.attend(hidden)
            if self.config.tie_word_embeddings
            else self.lm_head(hidden)
        )
