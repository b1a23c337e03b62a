"""gpt-oss: a sink in the softmax of every head, a window in every other layer, and experts with
biases, `model_type` gpt_oss.

model / layers / self_attn / sinks                       (layers, heads)
model / layers / mlp / router / {kernel,bias}            (layers, d, experts), (layers, experts)
model / layers / mlp / experts / gate_up_proj / kernel   (layers, experts, d, 2 f): gate and up in
                                                         turns, as in the files
model / layers / mlp / experts / gate_up_proj / bias     (layers, experts, 2 f)
model / layers / mlp / experts / down_proj / {kernel,bias}
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.models import decoder, sparse
from lora_jax.models.common import Names
from lora_jax.models.decoder import DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.nn.modules import Linear, WideRMSNorm

NAMES = Names(experts={"gate_up_proj": (), "down_proj": ()})
RULES = (
    (r"model\.layers\.self_attn\.sinks", P("tensor")),
    (r"model\.layers\.mlp\.router\.kernel", P(None, None)),
    (r"model\.layers\.mlp\.router\.bias", P(None)),
    (r"model\.layers\.mlp\.experts\.gate_up_proj\.bias", P(None, "tensor")),
    (r"model\.layers\.mlp\.experts\.down_proj\.bias", P(None, None)),
    *sparse.RULES,
)
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Config(DecoderConfig):
    attention_bias: bool
    num_local_experts: int
    num_experts_per_tok: int
    swiglu_alpha: float
    swiglu_limit: float

    @property
    def attention_sinks(self) -> bool:
        """True: every head has a sink."""
        return True


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    reader.alias("num_experts", "num_local_experts")
    # In the files of the authors; transformers reads neither.
    reader.inert("experts_per_token", "initial_context_length")
    sparse.note_router_loss(reader)
    experts = reader.integer("num_local_experts", 128)
    given = reader.content.get("rope_parameters")
    if given is None and not reader.content.get("rope_scaling"):
        reader.content = {**reader.content, "rope_parameters": _YARN}
    return Config(
        **read_decoder(
            reader,
            Defaults(
                sizes=(201_088, 2880, 2880, 36, 64),
                max_position_embeddings=131_072,
                num_key_value_heads=8,
                head_dim=64,
                rms_norm_eps=1e-5,
            ),
            sliding_window=reader.optional_integer("sliding_window", 128),
            slides=lambda layer: layer % 2 == 0,
            rope_rules=RopeRules(theta=150_000.0),
        ),
        attention_bias=reader.boolean("attention_bias", True),
        num_local_experts=experts,
        num_experts_per_tok=sparse.read_chosen(reader, experts, 4),
        swiglu_alpha=reader.number("swiglu_alpha", 1.702),
        swiglu_limit=reader.number("swiglu_limit", 7.0, above=0),
    )


class Attention(decoder.Attention):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        bias = config.attention_bias
        super().__init__(config, use_bias=bias, output_bias=bias, rngs=rngs)
        self.sinks = nnx.Param(jnp.zeros(config.num_attention_heads))

    def sink_logits(self) -> jax.Array:
        return self.sinks.get_value()


class Experts(sparse.Experts):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        sizes = (config.num_local_experts, config.hidden_size, config.intermediate_size)
        super().__init__(*sizes, config.hidden_act, use_bias=True, rngs=rngs)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit

    def gated(self, gate_up: jax.Array) -> jax.Array:
        """Return (up + 1) * gate * sigmoid(alpha * gate), both clipped at the limit."""
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


class SparseMLP(sparse.SparseMLP):
    """The softmax is over the chosen experts, which equals shares that add up to 1."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.router = Linear(config.hidden_size, config.num_local_experts, use_bias=True, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.chosen, self.normalize = config.num_experts_per_tok, True

    def scores(self, x: jax.Array) -> jax.Array:
        return self.router(x)


class Block(sparse.Block):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        attention, mlp = Attention(config, rngs=rngs), SparseMLP(config, rngs=rngs)
        super().__init__(config, attention, mlp, WideRMSNorm, rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, WideRMSNorm, rngs=rngs)
