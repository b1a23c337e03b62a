"""Mistral: Llama with a sliding window in every layer, `model_type` mistral."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from lora_jax.models import decoder
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import ConfigReader


def read_fields(
    reader: ConfigReader, slides: Callable[[int], bool] | None = None
) -> dict[str, Any]:
    """Read the fields of Mistral and Ministral; `slides` as in `read_decoder`."""
    sizes = (32000, 4096, 14336, 32, 32)
    defaults = Defaults(sizes, max_position_embeddings=4096 * 32, num_key_value_heads=8)
    window = reader.optional_integer("sliding_window", 4096)
    return read_decoder(reader, defaults, sliding_window=window, slides=slides)


def read_config(reader: ConfigReader) -> DecoderConfig:
    """Read a `DecoderConfig` from config.json; defaults are those of transformers."""
    return DecoderConfig(**read_fields(reader))


class Block(decoder.Block):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        attention, mlp = decoder.Attention(config, rngs=rngs), decoder.MLP(config, rngs=rngs)
        super().__init__(config, attention, mlp, rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: Any, block: Callable = Block, *, rngs: nnx.Rngs):
        super().__init__(config, block, rngs=rngs)
