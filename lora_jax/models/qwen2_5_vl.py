"""Qwen 2.5 VL: the text of a model that reads images, `model_type` qwen2_5_vl.

model / language_model / ...    as `qwen2`
"""

from collections.abc import Mapping

from lora_jax.models import qwen2
from lora_jax.models.decoder import RULES as TEXT_RULES
from lora_jax.models.decoder import DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.models.towers import (
    IMAGES,
    QWEN,
    Tower,
    read_text,
    tower_rules,
    without_sections,
)

RULES = tower_rules(TEXT_RULES)
NAMES = QWEN


def read_config(reader: ConfigReader) -> DecoderConfig:
    """Read the config of the text from config.json; defaults are those of transformers. The fields
    of the text may be outside of `text_config`, as in the published files.
    """
    nested, text = reader.content.get("text_config"), reader
    if nested is None:
        reader.inert("text_config", *IMAGES)
    else:
        ties = isinstance(nested, Mapping) and bool(nested.get("tie_word_embeddings"))
        text = read_text(reader, "qwen2_5_vl_text", ties)
    text.content = without_sections(text.content)
    fields = read_decoder(
        text,
        Defaults(
            sizes=(152_064, 8192, 29_568, 80, 64),
            max_position_embeddings=32_768,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
        ),
        rope_rules=RopeRules(theta=1_000_000.0),
        **qwen2.window_fields(text, first=80),
    )
    return DecoderConfig(**fields)


class Model(Tower, qwen2.Model):
    pass
