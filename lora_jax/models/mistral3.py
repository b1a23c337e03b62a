"""Mistral Small 3.1 and 3.2 and Ministral 3: the text of a model that reads images, `model_type`
mistral3.

model / language_model / ...    as `mistral` or `ministral3`
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from lora_jax.models import ministral3, mistral
from lora_jax.models.decoder import RULES as TEXT_RULES
from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.reader import ConfigReader
from lora_jax.models.towers import LLAVA, Tower, read_text, tower_rules

RULES = tower_rules(TEXT_RULES)
NAMES = LLAVA

# The text of a config.json without `text_config`.
_USUAL = {
    "vocab_size": 131_072,
    "hidden_size": 5120,
    "intermediate_size": 32_768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e9,
    "sliding_window": None,
}


def read_config(reader: ConfigReader) -> DecoderConfig:
    """Read the config of the text from config.json; defaults are those of transformers."""
    reader.inert("projector_hidden_act", "vision_feature_layer", "multimodal_projector_bias")
    reader.inert("spatial_merge_size")
    given = reader.content.get("text_config")
    if isinstance(given, Mapping) and given.get("model_type") == "ministral3":
        return ministral3.read_config(read_text(reader, "ministral3", ties=True))
    return mistral.read_config(read_text(reader, "mistral", ties=True, usual=_USUAL))


class Text(mistral.Model):
    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        scales = isinstance(config, ministral3.Config)
        super().__init__(config, ministral3.Block if scales else mistral.Block, rngs=rngs)


class Model(Tower, Text):
    pass
