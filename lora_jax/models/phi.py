"""Phi 1, 1.5 and 2: attention and MLP side by side behind one layer norm, heads that are rotated in
part, biases everywhere, `model_type` phi.

model / layers / self_attn / dense / {kernel,bias}                    (layers, n * h, d)
model / layers / self_attn / {q,k}_layernorm / {scale,bias}           (layers, h), if `qk_layernorm`
model / layers / mlp / {fc1,fc2} / {kernel,bias}                      (layers, d, f), (layers, f, d)
model / final_layernorm / {scale,bias}, lm_head / bias
"""

from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.models import decoder
from lora_jax.models.decoder import DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.nn.modules import LayerNorm, Linear

RULES = (
    *decoder.RULES,
    (r"model\.layers\..*\.fc1\.kernel", P("fsdp", "tensor")),
    (r"model\.layers\..*\.fc1\.bias", P("tensor")),
    (r"model\.layers\..*\.(dense|fc2)\.kernel", P("tensor", "fsdp")),
    (r"model\.layers\..*\.(dense|fc2)\.bias", P(None)),
    (r"model\.final_layernorm\.(scale|bias)", P(None)),
    (r"lm_head\.bias", P("tensor")),
)


@dataclass(frozen=True)
class Config(DecoderConfig):
    qk_layernorm: bool


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    reader.only("tie_word_embeddings", False, why="the output head has a bias")
    fields = read_decoder(
        reader,
        Defaults(
            sizes=(51_200, 2048, 8192, 24, 32),
            rms_norm_eps=1e-5,
            epsilon="layer_norm_eps",
            hidden_act=("hidden_act", "gelu_new"),
        ),
        rope_rules=RopeRules(partial=True, share=0.5),
    )
    return Config(**fields, qk_layernorm=reader.boolean("qk_layernorm", False))


class Attention(decoder.Attention):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, use_bias=True, output_bias=True, rngs=rngs)
        self.dense = self.o_proj
        del self.o_proj
        self.has_norms = config.qk_layernorm
        if self.has_norms:
            self.q_layernorm = LayerNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)
            self.k_layernorm = LayerNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = super().project(x)
        return (self.q_layernorm(q), self.k_layernorm(k), v) if self.has_norms else (q, k, v)

    def output(self, mixed: jax.Array, *rest: jax.Array) -> jax.Array:
        return self.dense(mixed)


class Block(decoder.ParallelBlock):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        mlp = decoder.PlainMLP(config, ("fc1", "fc2"), use_bias=True, rngs=rngs)
        super().__init__(config, Attention(config, rngs=rngs), mlp, LayerNorm, rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, LayerNorm, rngs=rngs)
        self.decoder.final_layernorm = self.decoder.norm
        del self.decoder.norm
        self.lm_head = Linear(config.hidden_size, config.vocab_size, use_bias=True, rngs=rngs)

    def final_norm(self, x: jax.Array) -> jax.Array:
        return self.decoder.final_layernorm(x)
