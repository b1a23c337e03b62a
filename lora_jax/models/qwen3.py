"""Qwen 3: Llama with a norm on every head of queries and keys, `model_type` qwen3.

model / layers / self_attn / {q,k}_norm / scale    (layers, head_dim)
"""

from dataclasses import dataclass

import jax
from flax import nnx

from lora_jax.models import common
from lora_jax.models.common import RULES as RULES
from lora_jax.models.common import DecoderConfig, read_decoder
from lora_jax.models.qwen2 import SIZES, window_fields
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.modules import RMSNorm


@dataclass(frozen=True)
class Config(DecoderConfig):
    attention_bias: bool


def read_config(reader: ConfigReader) -> Config:
    """A `Config` from config.json; defaults are those of transformers."""
    reader.only("use_qk_norm", True)
    return Config(
        **read_decoder(
            reader,
            sizes=SIZES,
            max_position_embeddings=32768,
            num_key_value_heads=32,
            head_dim=128,
            **window_fields(reader),
        ),
        attention_bias=reader.boolean("attention_bias", False),
    )


class Attention(common.Attention):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        bias = config.attention_bias
        super().__init__(config, use_bias=bias, output_bias=bias, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class Block(common.Block):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        mlp = common.MLP(config, rngs=rngs)
        super().__init__(config, Attention(config, rngs=rngs), mlp, rngs=rngs)


class Model(common.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, rngs=rngs)
