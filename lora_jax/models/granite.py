"""Granite 3 and 4, dense: Llama with four constant factors, `model_type` granite.

x = embedding_multiplier * embed(tokens)
x = x + residual_multiplier * attention(norm(x)), scores times attention_multiplier
x = x + residual_multiplier * mlp(norm(x))
logits = head(norm(x)) / logits_scaling
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.models import decoder
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import AttentionInputs, DecoderConfig, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.attention import KVContext


@dataclass(frozen=True)
class Config(DecoderConfig):
    attention_bias: bool
    mlp_bias: bool
    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    return Config(
        **read_decoder(reader),
        attention_bias=reader.boolean("attention_bias", False),
        mlp_bias=reader.boolean("mlp_bias", False),
        embedding_multiplier=reader.number("embedding_multiplier", 1.0),
        attention_multiplier=reader.number("attention_multiplier", 1.0),
        residual_multiplier=reader.number("residual_multiplier", 1.0),
        logits_scaling=reader.number("logits_scaling", 1.0, above=0),
    )


class Block(decoder.Block):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        bias, scale = config.attention_bias, config.attention_multiplier
        attention = decoder.Attention(
            config, use_bias=bias, output_bias=bias, scale=scale, rngs=rngs
        )
        mlp = decoder.MLP(config, use_bias=config.mlp_bias, rngs=rngs)
        super().__init__(config, attention, mlp, rngs=rngs)
        self.multiplier = config.residual_multiplier

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kv: KVContext
    ) -> tuple[jax.Array, Any, Any]:
        y, cached = self.self_attn(self.input_layernorm(x), inputs, kv)
        x = x + y * self.multiplier
        return x + self.mlp(self.post_attention_layernorm(x)) * self.multiplier, cached, None


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, rngs=rngs)

    def first_input(self, embeddings: jax.Array) -> jax.Array:
        return embeddings * jnp.asarray(self.config.embedding_multiplier, embeddings.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return super().logits(hidden) / self.config.logits_scaling
