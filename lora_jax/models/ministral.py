"""Ministral: Mistral with a window in the layers that `layer_types` names, `model_type`
ministral.
"""

from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.mistral import Model as Model
from lora_jax.models.mistral import read_fields
from lora_jax.models.reader import ConfigReader


def read_config(reader: ConfigReader) -> DecoderConfig:
    """Read a `DecoderConfig` from config.json; defaults are those of transformers."""
    slides = reader.content.get("sliding_window", 4096) is not None
    return DecoderConfig(**read_fields(reader, slides=lambda layer: slides))
