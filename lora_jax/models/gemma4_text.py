"""Gemma 4, text only: heads of two sizes, and inputs of their own for layers of the small models,
`model_type` gemma4_text.

model / layers / STACK / self_attn                       `lora_jax.models.several_heads`
model / layers / STACK / layer_scalar                    (layers, 1), times the output
model / {embed_tokens_per_layer,..}, layers / STACK / {per_layer_input_gate,..}
                                                         `lora_jax.models.per_layer`
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.models import decoder, gemma2, per_layer
from lora_jax.models.decoder import AttentionInputs, Defaults, read_decoder
from lora_jax.models.reader import FULL, SLIDING, ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.models.several_heads import (
    SHAPES,
    SHARED,
    Attention,
    HeadsConfig,
    SharedAttention,
    read_heads,
)
from lora_jax.nn.attention import KVContext
from lora_jax.nn.modules import WideRMSNorm

RULES = (*per_layer.RULES, (r"model\.layers\..*layer_scalar", P(None)), *decoder.RULES)
_ROPE = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
}
_EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class Config(HeadsConfig):
    final_logit_softcapping: float | None
    hidden_size_per_layer_input: int  # 0: layers have no inputs of their own
    vocab_size_per_layer_input: int


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    reader.only("use_bidirectional_attention", None, "vision", why="tokens see those after them")
    reader.only("enable_moe_block", False, why="experts next to an MLP")
    reader.inert(*_EXPERTS)
    if reader.content.get("rope_parameters") is None:
        reader.content = {**reader.content, "rope_parameters": _ROPE}
    fields = read_decoder(
        reader,
        Defaults(
            sizes=(262_144, 2304, 9216, 30, 8),
            max_position_embeddings=131_072,
            num_key_value_heads=4,
            head_dim=256,
            hidden_act=("hidden_activation", "gelu_pytorch_tanh"),
            tie_word_embeddings=True,
        ),
        sliding_window=reader.integer("sliding_window", 512),
        slides=lambda layer: (layer + 1) % 6 > 0,
        rope_rules=RopeRules(local=(None, 10_000.0), types=("default", "linear", "proportional")),
    )
    reader.only("rope_theta", None, why="rope_parameters are read by layer type")
    return Config(
        **read_heads(reader, fields),
        final_logit_softcapping=reader.optional_number("final_logit_softcapping", None),
        **per_layer.read_sizes(reader, fields["vocab_size"]),
    )


class Block(gemma2.Block):
    def __init__(self, config: Config, *, shape: str, rngs: nnx.Rngs):
        own = SharedAttention if shape.endswith(SHARED) else Attention
        config = config.of_shape(shape)
        super().__init__(config, attention=own, norm=WideRMSNorm, rngs=rngs)
        if config.hidden_size_per_layer_input:
            per_layer.add_gate(self, config, rngs)
        self.layer_scalar = nnx.Param(jnp.ones(1))
        self.act = config.hidden_act

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kv: KVContext
    ) -> tuple[jax.Array, Any, Any]:
        x, cached, routing = super().__call__(x, inputs, kv)
        if inputs.per_layer is not None:
            x = per_layer.mix(self, self.act, x, inputs.per_layer)
        return x * self.layer_scalar.get_value().astype(x.dtype), cached, routing


class Model(gemma2.Model):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        blocks = {shape: partial(Block, shape=shape) for shape in SHAPES}
        super().__init__(config, block=blocks, norm=WideRMSNorm, rngs=rngs)
        if config.hidden_size_per_layer_input:
            per_layer.add_embeddings(self.model, config, rngs)

    def per_layer(self, tokens: jax.Array, embeddings: jax.Array) -> Any:
        if not self.config.hidden_size_per_layer_input:
            return None
        return per_layer.own_inputs(self.decoder, self.config, tokens, embeddings)
