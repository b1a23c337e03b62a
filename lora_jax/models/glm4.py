"""GLM 4 of 2025 (9B and 32B): norms before and behind attention and MLP, a part of each head
rotated in pairs of adjacent features, a fused MLP, `model_type` glm4.

model / layers / {input,post_self_attn,post_attention,post_mlp}_layernorm / scale
model / layers / mlp / gate_up_proj / kernel    (layers, d, 2 f)
"""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from lora_jax.models import decoder, phi3
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import AttentionInputs, DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.nn.attention import KVContext
from lora_jax.nn.modules import RMSNorm
from lora_jax.nn.rope import rotate_pairs


@dataclass(frozen=True)
class Config(DecoderConfig):
    attention_bias: bool


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    fields = read_decoder(
        reader,
        Defaults(
            sizes=(151_552, 4096, 13_696, 40, 32),
            max_position_embeddings=131_072,
            num_key_value_heads=2,
            head_dim=128,
            rms_norm_eps=1.5625e-7,
        ),
        rope_rules=RopeRules(partial=True, share=0.5),
    )
    return Config(**fields, attention_bias=reader.boolean("attention_bias", True))


class Attention(decoder.Attention):
    def rotate(self, x: jax.Array, inputs: AttentionInputs) -> jax.Array:
        return rotate_pairs(x, inputs.cos_sin)


class Block(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, use_bias=config.attention_bias, rngs=rngs)
        self.post_self_attn_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.mlp = phi3.MLP(config, rngs=rngs)
        self.post_mlp_layernorm = norm()

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kv: KVContext
    ) -> tuple[jax.Array, Any, Any]:
        y, cached = self.self_attn(self.input_layernorm(x), inputs, kv)
        x = x + self.post_self_attn_layernorm(y)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + self.post_mlp_layernorm(y), cached, None


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, rngs=rngs)
