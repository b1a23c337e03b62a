"""Gemma 2: a softcap on scores and logits, a window in every other layer, `model_type` gemma2.

model / layers / {input,post_attention,pre_feedforward,post_feedforward}_layernorm / scale

Norms multiply by 1 + scale, and embeddings by sqrt(d).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.models import decoder
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import AttentionInputs, DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.models.rotary import PLAIN_ROPE, RopeRules
from lora_jax.nn.attention import KVContext, apply_softcap
from lora_jax.nn.modules import OffsetRMSNorm


@dataclass(frozen=True)
class Config(DecoderConfig):
    attention_bias: bool
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None


def gemma_fields(
    reader: ConfigReader,
    sizes: tuple[int, int, int, int, int],
    max_position_embeddings: int,
    slides: Callable[[int], bool],
    rope_rules: RopeRules = PLAIN_ROPE,
) -> dict[str, Any]:
    """Read the fields that Gemma 2 and 3 share; `slides` and `rope_rules` as in `read_decoder`."""
    reader.inert("hidden_act")  # next to `hidden_activation` in old files, and never used
    reader.only("use_bidirectional_attention", False, None)
    window = reader.optional_integer("sliding_window", 4096)
    reader.only("sliding_window_size", window, None, why="the window is sliding_window")
    return {
        **read_decoder(
            reader,
            Defaults(
                sizes,
                max_position_embeddings,
                num_key_value_heads=4,
                head_dim=256,
                hidden_act=("hidden_activation", "gelu_pytorch_tanh"),
                tie_word_embeddings=True,
            ),
            sliding_window=window,
            slides=slides,
            rope_rules=rope_rules,
        ),
        "attention_bias": reader.boolean("attention_bias", False),
        "query_pre_attn_scalar": reader.number("query_pre_attn_scalar", 256, above=0),
    }


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    return Config(
        **gemma_fields(
            reader,
            sizes=(256_000, 2304, 9216, 26, 8),
            max_position_embeddings=8192,
            slides=lambda layer: layer % 2 == 0,
        ),
        attn_logit_softcapping=reader.optional_number("attn_logit_softcapping", 50.0),
        final_logit_softcapping=reader.optional_number("final_logit_softcapping", 30.0),
    )


class Attention(decoder.Attention):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        bias = config.attention_bias
        super().__init__(
            config,
            use_bias=bias,
            output_bias=bias,
            scale=config.query_pre_attn_scalar**-0.5,
            softcap=config.attn_logit_softcapping,
            rngs=rngs,
        )


class Block(nnx.Module):
    """A layer with norms before and after attention and MLP, of the classes given."""

    def __init__(
        self,
        config: Any,
        *,
        attention: Any = Attention,
        norm: Any = OffsetRMSNorm,
        rngs: nnx.Rngs,
    ):
        size, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = norm(size, epsilon, rngs=rngs)
        self.self_attn = attention(config, rngs=rngs)
        self.post_attention_layernorm = norm(size, epsilon, rngs=rngs)
        self.pre_feedforward_layernorm = norm(size, epsilon, rngs=rngs)
        self.mlp = decoder.MLP(config, rngs=rngs)
        self.post_feedforward_layernorm = norm(size, epsilon, rngs=rngs)

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kv: KVContext
    ) -> tuple[jax.Array, Any, Any]:
        y, cached = self.self_attn(self.input_layernorm(x), inputs, kv)
        x = x + self.post_attention_layernorm(y)
        y, routing = self.feed_forward(x, inputs)
        return x + self.post_feedforward_layernorm(y), cached, routing

    def feed_forward(self, x: jax.Array, inputs: AttentionInputs) -> tuple[jax.Array, Any]:
        """Return the output of the MLP before its norm, and the `Routing` of experts or None."""
        return self.mlp(self.pre_feedforward_layernorm(x)), None


class Model(decoder.CausalLM):
    def __init__(
        self, config: Any, *, block: Any = Block, norm: Any = OffsetRMSNorm, rngs: nnx.Rngs
    ):
        super().__init__(config, block, norm, rngs=rngs)

    def embed(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        x = super().embed(tokens, dtype)
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        limit = self.config.final_logit_softcapping
        logits = super().logits(hidden)
        return logits if limit is None else apply_softcap(logits, limit)
