"""Gemma 3 of 4B and more: the text of a model that reads images, `model_type` gemma3.

model / language_model / ...    as `gemma3_text`
"""

from lora_jax.models import gemma3_text
from lora_jax.models.decoder import RULES as TEXT_RULES
from lora_jax.models.reader import ConfigReader
from lora_jax.models.towers import LLAVA, Tower, read_text, tower_rules

RULES = tower_rules(TEXT_RULES)
NAMES = LLAVA


def read_config(reader: ConfigReader) -> gemma3_text.Config:
    """Read the config of the text from config.json; defaults are those of transformers."""
    reader.inert("mm_tokens_per_image", "boi_token_index", "eoi_token_index")
    reader.inert("boi_token_id", "eoi_token_id")
    text = read_text(reader, "gemma3_text", ties=True)
    text.only("final_logit_softcapping", None, why="transformers does not read it next to images")
    return gemma3_text.read_config(text)


class Model(Tower, gemma3_text.Model):
    pass
