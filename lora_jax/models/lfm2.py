"""LFM 2: short convolutions between gates in most layers, attention in the others, `model_type`
lfm2.

model / layers / STACK / {operator_norm,ffn_norm} / scale           (layers, d)
model / layers / STACK / conv / {in,out}_proj / kernel              (layers, d, 3 d), (layers, d, d)
model / layers / STACK / conv / conv / taps                         (layers, d, 1, k)
model / layers / STACK / self_attn / {q,k,v,out}_proj / kernel      and {q,k}_layernorm / scale
model / layers / STACK / feed_forward / {w1,w2,w3} / kernel
model / embedding_norm / scale                                      (d,), after the last layer

There are two stacks: see `lora_jax.models.stacks`.
"""

from dataclasses import dataclass
from functools import partial
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
from lora_jax.nn.modules import Linear, RMSNorm
from lora_jax.nn.short_conv import ShortConv, convolve
from lora_jax.shared_input import share

RULES = (
    *decoder.RULES,
    (r"model\.layers\..*\.(in_proj|w1|w3)\.kernel", P("fsdp", "tensor")),
    (r"model\.layers\..*\.(out_proj|w2)\.kernel", P("tensor", "fsdp")),
    (r"model\.layers\..*\.in_proj\.bias", P("tensor")),
    (r"model\.layers\..*\.conv\.taps|.*\.(out_proj|conv)\.bias", P(None)),
    (r"model\.embedding_norm\.scale", P(None)),
)
CONV = "conv"
# Fields of the authors' files that transformers does not read, or that repeat others.
_UNREAD = """block_dim block_mlp_init_scale block_norm_eps block_out_init_scale block_use_swiglu
block_use_xavier_init conv_dim conv_dim_out conv_use_xavier_init num_heads theta use_pos_enc"""


@dataclass(frozen=True)
class Config(DecoderConfig):
    kinds: tuple[str, ...]  # of layers
    conv_taps: int
    conv_bias: bool

    @property
    def mixers(self) -> tuple[str, ...]:
        return self.kinds

    @property
    def state_shapes(self) -> tuple[tuple[tuple[int, ...], Any], ...]:
        return (((self.conv_taps - 1, self.hidden_size), None),)


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    reader.inert(*_UNREAD.split())
    reader.alias("block_ff_dim", "intermediate_size")
    reader.alias("tie_embedding", "tie_word_embeddings")
    reader.only("hidden_act", "silu", why="transformers does not read it in this family")
    layers = reader.integer("num_hidden_layers", 32)
    full = reader.indices("full_attn_idxs", range(layers))
    kinds = reader.take_kinds([FULL if i in full else CONV for i in range(layers)], (FULL, CONV))
    if FULL not in kinds:
        reader.refuse(f"no layer has {FULL}, and a cache without keys is not supported")
    fields = read_decoder(
        reader,
        Defaults(
            sizes=(65_536, 2560, 12_288, 32, 32),
            max_position_embeddings=128_000,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            epsilon="norm_eps",
            tie_word_embeddings=True,
        ),
        rope_rules=RopeRules(theta=1_000_000.0),
    )
    fields["intermediate_size"] = _inner_size(reader, fields["intermediate_size"])
    return Config(
        **fields,
        kinds=tuple(ATTENTION if kind == FULL else CONV for kind in kinds),
        conv_taps=reader.integer("conv_L_cache", 3),
        conv_bias=reader.boolean("conv_bias", False),
    )


def _inner_size(reader: ConfigReader, given: int) -> int:
    """Return the width of the MLP, which is two thirds of that of config.json, rounded up."""
    step = reader.integer("block_multiple_of", 256)
    factor = reader.optional_number("block_ffn_dim_multiplier", 1.0)
    if not reader.boolean("block_auto_adjust_ff_dim", True):
        return given
    size = int(2 * given / 3)
    return max(1, size) if factor is None else max(1, -(-int(factor * size) // step)) * step


class Attention(decoder.Attention):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.out_proj = self.o_proj
        del self.o_proj
        self.q_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)
        self.k_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = super().project(x)
        return self.q_layernorm(q), self.k_layernorm(k), v

    def output(self, mixed: jax.Array, *rest: jax.Array) -> jax.Array:
        return self.out_proj(mixed)


class Conv(nnx.Module):
    """out(c * conv(b * x)), with b, c and x from one projection."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d, bias = config.hidden_size, config.conv_bias
        self.in_proj = Linear(d, 3 * d, use_bias=bias, rngs=rngs)
        self.conv = ShortConv(d, config.conv_taps, use_bias=bias, rngs=rngs)
        self.out_proj = Linear(d, d, use_bias=bias, rngs=rngs)

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kv: KVContext
    ) -> tuple[jax.Array, Any]:
        before, after, x = jnp.split(self.in_proj(share(x)), 3, axis=-1)
        y, states = convolve(self.conv, before * x, inputs.texts, kv.cached)
        cached = None if kv.cached is None else kv.cached.write(*states)
        return self.out_proj(after * y), cached


class Block(nnx.Module):
    """A layer whose tokens are mixed by the module `mixer`, self_attn or conv."""

    def __init__(self, config: Config, mixer: str, *, rngs: nnx.Rngs):
        d, epsilon = config.hidden_size, config.rms_norm_eps
        self.operator_norm = RMSNorm(d, epsilon, rngs=rngs)
        setattr(self, mixer, (Conv if mixer == CONV else Attention)(config, rngs=rngs))
        self.ffn_norm = RMSNorm(d, epsilon, rngs=rngs)
        self.feed_forward = decoder.MLP(config, ("w1", "w3", "w2"), rngs=rngs)
        self.mixer = mixer

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kv: KVContext
    ) -> tuple[jax.Array, Any, Any]:
        y, cached = getattr(self, self.mixer)(self.operator_norm(x), inputs, kv)
        x = x + y
        return x + self.feed_forward(self.ffn_norm(x)), cached, None


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        blocks = {ATTENTION: partial(Block, mixer="self_attn"), CONV: partial(Block, mixer=CONV)}
        super().__init__(config, blocks, rngs=rngs)
        self.decoder.embedding_norm = self.decoder.norm
        del self.decoder.norm

    def final_norm(self, x: jax.Array) -> jax.Array:
        return self.decoder.embedding_norm(x)
