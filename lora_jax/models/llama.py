"""Llama 2 and 3, SmolLM2, TinyLlama: `model_type` llama."""

from dataclasses import dataclass

from flax import nnx

from lora_jax.models import decoder
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import DecoderConfig, read_decoder
from lora_jax.models.reader import ConfigReader


@dataclass(frozen=True)
class Config(DecoderConfig):
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    bias = reader.boolean("attention_bias", False)
    return Config(
        **read_decoder(reader),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=reader.boolean("mlp_bias", False),
    )


class Block(decoder.Block):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        bias, output_bias = config.attention_bias, config.attention_out_bias
        attention = decoder.Attention(config, use_bias=bias, output_bias=output_bias, rngs=rngs)
        mlp = decoder.MLP(config, use_bias=config.mlp_bias, rngs=rngs)
        super().__init__(config, attention, mlp, rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, rngs=rngs)
