"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, `model_type` qwen2."""

from typing import Any

from flax import nnx

from lora_jax.models import decoder
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import ConfigReader

DEFAULTS = Defaults(
    sizes=(151_936, 4096, 22_016, 32, 32), max_position_embeddings=32768, num_key_value_heads=32
)


def read_window(reader: ConfigReader) -> int | None:
    """Read the window in tokens; None unless `use_sliding_window`."""
    if reader.boolean("use_sliding_window", False):
        return reader.optional_integer("sliding_window", 4096)
    reader.inert("sliding_window")
    return None


def window_fields(reader: ConfigReader, first: int = 28) -> dict[str, Any]:
    """Read Qwen's window, and the layers that have it: those from `max_window_layers` on, which is
    `first` by default.
    """
    # A way to attend beyond 256k tokens that other programs have; transformers does not read it.
    reader.inert("dual_chunk_attention_config")
    window, first = read_window(reader), reader.integer("max_window_layers", first, least=0)
    return {
        "sliding_window": window,
        "slides": lambda layer: window is not None and layer >= first,
    }


def read_config(reader: ConfigReader) -> DecoderConfig:
    """Read a `DecoderConfig` from config.json; defaults are those of transformers."""
    return DecoderConfig(**read_decoder(reader, DEFAULTS, **window_fields(reader)))


class Block(decoder.Block):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        attention = decoder.Attention(config, use_bias=True, rngs=rngs)
        super().__init__(config, attention, decoder.MLP(config, rngs=rngs), rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, Block, rngs=rngs)
