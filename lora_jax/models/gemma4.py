"""Gemma 4: the text of a model that reads images and sound, `model_type` gemma4.

model / language_model / ...    as `gemma4_text`
"""

from lora_jax.models import gemma4_text
from lora_jax.models.common import Names
from lora_jax.models.reader import ConfigReader
from lora_jax.models.towers import Tower, read_text, tower_rules

RULES = tower_rules(gemma4_text.RULES)
NAMES = Names(carried=("vision_tower", "embed_vision", "audio_tower", "embed_audio"))
# Fields of images and sound.
_UNREAD = """audio_config audio_token_id boa_token_id boi_token_id eoa_token_id eoa_token_index
eoi_token_id vision_soft_tokens_per_image"""


def read_config(reader: ConfigReader) -> gemma4_text.Config:
    """Read the config of the text from config.json; defaults are those of transformers."""
    reader.inert(*_UNREAD.split())
    return gemma4_text.read_config(read_text(reader, "gemma4_text", ties=True))


class Model(Tower, gemma4_text.Model):
    pass
