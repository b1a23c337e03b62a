"""OLMo 2: norms after attention and MLP, and over all of queries and keys, `model_type` olmo2.

model / layers / {post_attention,post_feedforward}_layernorm / scale    (layers, d)
model / layers / self_attn / {q,k}_norm / scale                         (layers, heads * head_dim)
"""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from lora_jax.models import decoder
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import AttentionInputs, DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.attention import KVContext
from lora_jax.nn.modules import RMSNorm


@dataclass(frozen=True)
class Config(DecoderConfig):
    attention_bias: bool


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    return Config(
        **read_decoder(reader, Defaults((50_304, 4096, 11_008, 32, 32), rms_norm_eps=1e-5)),
        attention_bias=reader.boolean("attention_bias", False),
    )


class Attention(decoder.Attention):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        bias = config.attention_bias
        super().__init__(config, use_bias=bias, output_bias=bias, rngs=rngs)
        n, k, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_norm = RMSNorm(n * h, config.rms_norm_eps, rngs=rngs)
        self.k_norm = RMSNorm(k * h, config.rms_norm_eps, rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
        return self.heads(q), self.heads(k), self.heads(self.v_proj(x))


class Block(nnx.Module):
    """A layer with norms behind attention and MLP; `attention` is the attention class."""

    def __init__(self, config: Config, *, attention: Any = Attention, rngs: nnx.Rngs):
        d, epsilon = config.hidden_size, config.rms_norm_eps
        self.self_attn = attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, epsilon, rngs=rngs)
        self.mlp = decoder.MLP(config, rngs=rngs)
        self.post_feedforward_layernorm = RMSNorm(d, epsilon, rngs=rngs)

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kv: KVContext
    ) -> tuple[jax.Array, Any, Any]:
        y, new = self.self_attn(x, inputs, kv)
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(x)), new, None


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, rngs=rngs)
