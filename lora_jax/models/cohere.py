"""Command R and Aya: attention and MLP side by side behind one norm, rotated pairs of adjacent
features, scaled logits, `model_type` cohere.

model / layers / self_attn / {q,k}_norm / scale    (layers, heads, h), if `use_qk_norm`
"""

from dataclasses import dataclass

import jax
from flax import nnx

from lora_jax.models import decoder
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import AttentionInputs, DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.nn.modules import PlainLayerNorm
from lora_jax.nn.rope import rotate_pairs


@dataclass(frozen=True)
class Config(DecoderConfig):
    attention_bias: bool
    use_qk_norm: bool
    logit_scale: float


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    fields = read_decoder(
        reader,
        Defaults(
            sizes=(256_000, 8192, 22_528, 40, 64),
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            epsilon="layer_norm_eps",
            tie_word_embeddings=True,
        ),
        rope_rules=RopeRules(theta=500_000.0),
    )
    return Config(
        **fields,
        attention_bias=reader.boolean("attention_bias", False),
        use_qk_norm=reader.boolean("use_qk_norm", False),
        logit_scale=reader.number("logit_scale", 0.0625),
    )


class Attention(decoder.Attention):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        bias, epsilon = config.attention_bias, config.rms_norm_eps
        super().__init__(config, use_bias=bias, output_bias=bias, rngs=rngs)
        n, k, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.has_norms = config.use_qk_norm
        if self.has_norms:
            self.q_norm = PlainLayerNorm((n, h), epsilon, rngs=rngs)
            self.k_norm = PlainLayerNorm((k, h), epsilon, rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = super().project(x)
        return (self.q_norm(q), self.k_norm(k), v) if self.has_norms else (q, k, v)

    def rotate(self, x: jax.Array, inputs: AttentionInputs) -> jax.Array:
        return rotate_pairs(x, inputs.cos_sin)


class Block(decoder.ParallelBlock):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        attention, mlp = Attention(config, rngs=rngs), decoder.MLP(config, rngs=rngs)
        super().__init__(config, attention, mlp, PlainLayerNorm, rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, PlainLayerNorm, rngs=rngs)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return super().logits(hidden) * self.config.logit_scale
