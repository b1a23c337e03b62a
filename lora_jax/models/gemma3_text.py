"""Gemma 3, text only: Gemma 2 with norms on queries and keys in place of a softcap on scores, and
other rotary positions in layers with a window, `model_type` gemma3_text.

model / layers / self_attn / {q,k}_norm / scale    (layers, head_dim)
"""

import functools
from dataclasses import dataclass

import jax
from flax import nnx

from lora_jax.models import decoder, gemma2
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.reader import ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.nn.modules import OffsetRMSNorm


@dataclass(frozen=True)
class Config(DecoderConfig):
    attention_bias: bool
    query_pre_attn_scalar: float
    final_logit_softcapping: float | None


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    pattern = reader.integer("sliding_window_pattern", 6)
    # transformers writes the first next to layer_types, reads the second, and uses neither.
    reader.inert("_sliding_window_pattern", "attn_logit_softcapping")
    reader.only("use_qk_norm", True)
    return Config(
        **gemma2.gemma_fields(
            reader,
            sizes=(262_208, 2304, 9216, 26, 8),
            max_position_embeddings=131_072,
            slides=lambda layer: (layer + 1) % pattern > 0,
            rope_rules=RopeRules(theta=1_000_000.0, local=("rope_local_base_freq", 10_000.0)),
        ),
        final_logit_softcapping=reader.optional_number("final_logit_softcapping", None),
    )


class Attention(decoder.Attention):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        bias, scale = config.attention_bias, config.query_pre_attn_scalar**-0.5
        super().__init__(config, use_bias=bias, output_bias=bias, scale=scale, rngs=rngs)
        self.q_norm = OffsetRMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)
        self.k_norm = OffsetRMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class Model(gemma2.Model):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        block = functools.partial(gemma2.Block, attention=Attention)
        super().__init__(config, block=block, rngs=rngs)
