"""Mistral: Llama with a sliding window in every layer, `model_type` mistral."""

from typing import Any

from flax import nnx

from lora_jax.models import common
from lora_jax.models.common import RULES as RULES
from lora_jax.models.common import DecoderConfig, read_decoder
from lora_jax.models.reader import ConfigReader


def read_fields(reader: ConfigReader, **options: Any) -> dict[str, Any]:
    """Read what Mistral and Ministral have in common; `options` as for `read_decoder`."""
    defaults = {"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8}
    window = reader.optional_integer("sliding_window", 4096)
    sizes = (32000, 4096, 14336, 32, 32)
    return read_decoder(reader, sizes=sizes, sliding_window=window, **defaults, **options)


def read_config(reader: ConfigReader) -> DecoderConfig:
    """A `DecoderConfig` from config.json; defaults are those of transformers."""
    return DecoderConfig(**read_fields(reader))


class Block(common.Block):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        attention, mlp = common.Attention(config, rngs=rngs), common.MLP(config, rngs=rngs)
        super().__init__(config, attention, mlp, rngs=rngs)


class Model(common.CausalLM):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, Block, rngs=rngs)
