"""Qwen 3.5, dense: the text of a model that reads images, `model_type` qwen3_5.

model / language_model / ...    as `qwen3_5_text`
"""

from dataclasses import replace

from lora_jax.models import hybrid, qwen3_5_text
from lora_jax.models.reader import ConfigReader
from lora_jax.models.towers import QWEN, Tower, read_text, tower_rules

RULES = tower_rules(qwen3_5_text.RULES)
NAMES = replace(QWEN, no_weights=hybrid.NO_WEIGHTS)


def read_config(reader: ConfigReader) -> hybrid.HybridConfig:
    """Read the config of the text from config.json; defaults are those of transformers."""
    reader.inert("language_model_only")
    return qwen3_5_text.read_config(read_text(reader, "qwen3_5_text", ties=False))


class Model(Tower, qwen3_5_text.Model):
    pass
