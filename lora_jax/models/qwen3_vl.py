"""Qwen 3 VL, dense: the text of a model that reads images, `model_type` qwen3_vl.

model / language_model / ...    as `qwen3`
"""

from lora_jax.models import qwen3
from lora_jax.models.decoder import RULES as TEXT_RULES
from lora_jax.models.decoder import Defaults, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.models.towers import QWEN, Tower, read_text, tower_rules, without_sections

RULES = tower_rules(TEXT_RULES)
NAMES = QWEN


def read_config(reader: ConfigReader) -> qwen3.Config:
    """Read the config of the text from config.json; defaults are those of transformers."""
    text = read_text(reader, "qwen3_vl_text", ties=False)
    text.content = without_sections(text.content)
    fields = read_decoder(
        text,
        Defaults(
            sizes=(151_936, 4096, 22_016, 32, 32),
            max_position_embeddings=128_000,
            num_key_value_heads=32,
            head_dim=128,
        ),
        rope_rules=RopeRules(theta=500_000.0),
    )
    return qwen3.Config(**fields, attention_bias=text.boolean("attention_bias", False))


class Model(Tower, qwen3.Model):
    pass
