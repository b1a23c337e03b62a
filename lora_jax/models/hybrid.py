"""Parts of Qwen 3 Next and 3.5: a gated delta rule in most layers, and attention with an output
gate in the others.

model / layers / STACK / linear_attn / conv1d / taps             (layers, features, 1, k)
model / layers / STACK / linear_attn / {A_log,dt_bias}           (layers, value heads)
model / layers / STACK / linear_attn / norm / scale, out_proj / kernel
model / layers / STACK / self_attn / q_proj / kernel             queries and gates, head by head

There are several stacks: see `lora_jax.models.stacks`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.models import decoder
from lora_jax.models.common import ATTENTION
from lora_jax.models.decoder import AttentionInputs, DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import FULL, ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.nn.attention import KVContext
from lora_jax.nn.delta_net import GatedDeltaNet, Sizes
from lora_jax.nn.modules import Linear, OffsetRMSNorm

RULES = (
    (r"model\.layers\..*\.out_proj\.kernel", P("tensor", "fsdp")),
    (r"model\.layers\..*\.(taps|A_log|dt_bias)", P(None)),
)
LINEAR = "linear_attention"
NO_WEIGHTS = r".*rotary_emb\.inv_freq|mtp\..*"  # layers that predict further tokens
_SIZES = {  # fields, and their defaults in transformers, in the order of `Sizes`
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


@dataclass(frozen=True)
class HybridConfig(DecoderConfig):
    kinds: tuple[str, ...]  # of layers
    attention_bias: bool
    linear: Sizes

    @property
    def mixers(self) -> tuple[str, ...]:
        return self.kinds

    @property
    def state_shapes(self) -> tuple[tuple[tuple[int, ...], Any], ...]:
        return self.linear.states


def read_hybrid(reader: ConfigReader, defaults: Defaults) -> dict[str, Any]:
    """Read the fields of a `HybridConfig` from config.json."""
    layers = reader.integer("num_hidden_layers", defaults.sizes[3])
    every = reader.integer("full_attention_interval", 4)
    usual = [LINEAR if (i + 1) % every else FULL for i in range(layers)]
    kinds = reader.take_kinds(usual, (FULL, LINEAR))
    if FULL not in kinds:
        reader.refuse(f"no layer has {FULL}, and a cache without keys is not supported")
    linear = Sizes(*(reader.integer(name, usual) for name, usual in _SIZES.items()))
    if linear.value_heads % linear.key_heads:
        reader.refuse(
            f"linear_num_value_heads={linear.value_heads} is not a multiple of "
            f"linear_num_key_heads={linear.key_heads}"
        )
    return {
        **read_decoder(reader, defaults, rope_rules=RopeRules(partial=True, share=0.25)),
        "kinds": tuple(ATTENTION if kind == FULL else LINEAR for kind in kinds),
        "attention_bias": reader.boolean("attention_bias", False),
        "linear": linear,
    }


class Attention(decoder.Attention):
    """Attention whose output is multiplied by gates, which `q_proj` makes next to the queries."""

    def __init__(self, config: HybridConfig, *, rngs: nnx.Rngs):
        bias, h = config.attention_bias, config.head_dim
        super().__init__(config, use_bias=bias, output_bias=bias, rngs=rngs)
        features = 2 * config.num_attention_heads * h
        self.q_proj = Linear(config.hidden_size, features, use_bias=bias, rngs=rngs)
        self.q_norm = OffsetRMSNorm(h, config.rms_norm_eps, rngs=rngs)
        self.k_norm = OffsetRMSNorm(h, config.rms_norm_eps, rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, ...]:
        both = self.q_proj(x).reshape(*x.shape[:2], -1, 2 * self.head_dim)
        q, gate = jnp.split(both, 2, axis=-1)
        k, v = self.heads(self.k_proj(x)), self.heads(self.v_proj(x))
        return self.q_norm(q), self.k_norm(k), v, gate.reshape(*x.shape[:2], -1)

    def output(self, mixed: jax.Array, *rest: jax.Array) -> jax.Array:
        (gate,) = rest
        return self.o_proj(mixed * jax.nn.sigmoid(gate))


class Block(nnx.Module):
    """A layer with norms before the mixer of its tokens, one of `mixers`, and the MLP.

    `mlp(x)` returns its output; with `has_experts`, `mlp(x, real)` returns its `Routing` too.
    """

    has_experts = False

    def __init__(
        self,
        config: Any,
        mixer: str,
        mlp: nnx.Module,
        net: Callable = GatedDeltaNet,
        *,
        rngs: nnx.Rngs,
    ):
        d, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = OffsetRMSNorm(d, epsilon, rngs=rngs)
        if mixer == ATTENTION:
            self.self_attn = Attention(config, rngs=rngs)
        else:
            self.linear_attn = net(d, config.linear, config.hidden_act, epsilon, rngs=rngs)
        self.post_attention_layernorm = OffsetRMSNorm(d, epsilon, rngs=rngs)
        self.mlp: Any = mlp
        self.mixer = mixer

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kv: KVContext
    ) -> tuple[jax.Array, Any, Any]:
        normed = self.input_layernorm(x)
        if self.mixer == ATTENTION:
            y, cached = self.self_attn(normed, inputs, kv)
        else:
            y, cached = self.linear_attn(normed, inputs.texts, kv.cached)
        x = x + y
        normed = self.post_attention_layernorm(x)
        if self.has_experts:
            y, routing = self.mlp(normed, inputs.real)
            return x + y, cached, routing
        return x + self.mlp(normed), cached, None


class SparseBlock(Block):
    has_experts = True
