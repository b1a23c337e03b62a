"""Qwen 3: Llama with a norm on every head of queries and keys, `model_type` qwen3.

model / layers / self_attn / {q,k}_norm / scale    (layers, head_dim)
"""

import dataclasses
from dataclasses import dataclass

import jax
from flax import nnx

from lora_jax.models import decoder, qwen2
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import DecoderConfig, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.modules import RMSNorm


@dataclass(frozen=True)
class Config(DecoderConfig):
    attention_bias: bool


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    reader.only("use_qk_norm", True)
    return Config(
        **read_decoder(
            reader, dataclasses.replace(qwen2.DEFAULTS, head_dim=128), **qwen2.window_fields(reader)
        ),
        attention_bias=reader.boolean("attention_bias", False),
    )


class Attention(decoder.Attention):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        bias = config.attention_bias
        super().__init__(config, use_bias=bias, output_bias=bias, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class Block(decoder.Block):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        mlp = decoder.MLP(config, rngs=rngs)
        super().__init__(config, Attention(config, rngs=rngs), mlp, rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, rngs=rngs)
