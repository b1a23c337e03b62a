"""OLMo 3: OLMo 2 with a window in three of four layers, `model_type` olmo3."""

from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import Defaults, read_decoder
from lora_jax.models.olmo2 import Config
from lora_jax.models.olmo2 import Model as Model
from lora_jax.models.reader import ConfigReader
from lora_jax.models.rotary import RopeRules


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers. `rope_theta` and
    `rope_scaling` are those of layers without a window.
    """
    return Config(
        **read_decoder(
            reader,
            Defaults((50_304, 4096, 11_008, 32, 32), rms_norm_eps=1e-5),
            sliding_window=reader.optional_integer("sliding_window", 4096),
            slides=lambda layer: (layer + 1) % 4 > 0,
            rope_rules=RopeRules(theta=500_000.0, local=(None, 500_000.0)),
        ),
        attention_bias=reader.boolean("attention_bias", False),
    )
