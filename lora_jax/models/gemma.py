"""Gemma 1: Llama with norms that multiply by 1 + scale, and embeddings times sqrt(d), `model_type`
gemma.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.models import decoder
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.modules import OffsetRMSNorm


@dataclass(frozen=True)
class Config(DecoderConfig):
    attention_bias: bool


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers. As there, the
    activation "gelu" of the first files is the approximation with tanh.
    """
    reader.inert("hidden_activation")  # next to `hidden_act` in old files, and not read
    reader.only("use_bidirectional_attention", None, False)
    fields = read_decoder(
        reader,
        Defaults(
            sizes=(256_000, 3072, 24_576, 28, 16),
            max_position_embeddings=8192,
            num_key_value_heads=16,
            head_dim=256,
            hidden_act=("hidden_act", "gelu_pytorch_tanh"),
            tie_word_embeddings=True,
        ),
    )
    if fields["hidden_act"] == "gelu":
        fields["hidden_act"] = "gelu_pytorch_tanh"
    return Config(**fields, attention_bias=reader.boolean("attention_bias", False))


class Block(decoder.Block):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        bias = config.attention_bias
        attention = decoder.Attention(config, use_bias=bias, output_bias=bias, rngs=rngs)
        mlp = decoder.MLP(config, rngs=rngs)
        super().__init__(config, attention, mlp, OffsetRMSNorm, rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, OffsetRMSNorm, rngs=rngs)

    def embed(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        x = super().embed(tokens, dtype)
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
