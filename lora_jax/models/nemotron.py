"""Nemotron and Minitron: layer norms that multiply by 1 + scale, heads that are rotated in part, an
MLP of two linears and a squared ReLU, `model_type` nemotron.

model / layers / {input,post_attention}_layernorm, norm / {scale,bias}
"""

from flax import nnx

from lora_jax.models import decoder
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import Defaults, read_decoder
from lora_jax.models.llama import Config
from lora_jax.models.reader import ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.nn.modules import OffsetLayerNorm


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    bias = reader.boolean("attention_bias", False)
    fields = read_decoder(
        reader,
        Defaults(
            sizes=(256_000, 6144, 24_576, 32, 48),
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            epsilon="norm_eps",
            hidden_act=("hidden_act", "relu2"),
        ),
        rope_rules=RopeRules(partial=True, share=0.5),
    )
    return Config(
        **fields,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=reader.boolean("mlp_bias", False),
    )


class Block(decoder.Block):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        bias = config.attention_bias
        attention = decoder.Attention(config, use_bias=bias, output_bias=bias, rngs=rngs)
        mlp = decoder.PlainMLP(config, use_bias=config.mlp_bias, rngs=rngs)
        super().__init__(config, attention, mlp, OffsetLayerNorm, rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, OffsetLayerNorm, rngs=rngs)
