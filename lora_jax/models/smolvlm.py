"""SmolVLM 2: the text of a model that reads images, `model_type` smolvlm.

model / text_model / ...    as `llama`
"""

from lora_jax.models import llama
from lora_jax.models.common import Names
from lora_jax.models.decoder import RULES as TEXT_RULES
from lora_jax.models.reader import ConfigReader
from lora_jax.models.towers import Tower, read_text, tower_rules

RULES = tower_rules(TEXT_RULES, "text_model")
NAMES = Names(carried=("vision_model", "connector"))


def read_config(reader: ConfigReader) -> llama.Config:
    """Read the config of the text from config.json; defaults are those of transformers."""
    reader.inert("scale_factor", "vocab_size", "_pad_token_id")
    text = read_text(reader, "llama", ties=False, usual={"rms_norm_eps": 1e-5})
    # Fields of the published files that no code reads.
    text.inert("perceiver_config", "pixel_shuffle_factor", "neftune_noise_alpha")
    text.only("use_resampler", False)
    text.only("qk_layer_norms", False)
    return llama.read_config(text)


class Model(Tower, llama.Model):
    NAME = "text_model"
