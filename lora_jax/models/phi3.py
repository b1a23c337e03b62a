"""Phi 3, 3.5 and 4: Llama with fused projections and LongRoPE, `model_type` phi3.

model / layers / self_attn / qkv_proj / kernel    (layers, d, (n + 2 k) * h): queries, keys, values
model / layers / mlp / gate_up_proj / kernel      (layers, d, 2 f)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.models import decoder
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.nn.modules import ACTIVATIONS, Linear
from lora_jax.shared_input import share


def read_config(reader: ConfigReader) -> DecoderConfig:
    """Read a `DecoderConfig` from config.json; defaults are those of transformers."""
    reader.inert("full_attn_mod", "interpolate_factor")  # Phi-4-mini has them, and no code reads it
    fields = read_decoder(
        reader,
        Defaults((32064, 3072, 8192, 32, 32), max_position_embeddings=4096, rms_norm_eps=1e-5),
        sliding_window=reader.optional_integer("sliding_window", None),
        rope_rules=RopeRules(types=("default", "longrope"), partial=True, original=4096),
    )
    return DecoderConfig(**fields)


class Attention(decoder.Attention):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        n, k, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        del self.q_proj, self.k_proj, self.v_proj
        self.qkv_proj = Linear(config.hidden_size, (n + 2 * k) * h, rngs=rngs)
        self.ends = (n * h, (n + k) * h)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = jnp.split(self.qkv_proj(x), self.ends, axis=-1)
        return self.heads(q), self.heads(k), self.heads(v)


class MLP(nnx.Module):
    """down(act(a) * b), where a and b are the halves of gate_up(x), with the family's names of the
    two linears.
    """

    def __init__(
        self,
        config: DecoderConfig,
        names: tuple[str, str] = ("gate_up_proj", "down_proj"),
        *,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        d, f = config.hidden_size, config.intermediate_size
        setattr(self, names[0], Linear(d, 2 * f, use_bias=use_bias, rngs=rngs))
        setattr(self, names[1], Linear(f, d, use_bias=use_bias, rngs=rngs))
        self.names, self.act = names, config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        gate_up, down = (getattr(self, name) for name in self.names)
        gate, up = jnp.split(gate_up(share(x)), 2, axis=-1)
        return down(ACTIVATIONS[self.act](gate) * up)


class Block(decoder.Block):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, Attention(config, rngs=rngs), MLP(config, rngs=rngs), rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, Block, rngs=rngs)
