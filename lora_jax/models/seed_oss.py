"""Seed-OSS: Llama with biases on queries, keys and values, `model_type` seed_oss."""

from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import Defaults, read_decoder
from lora_jax.models.llama import Config
from lora_jax.models.llama import Model as Model
from lora_jax.models.reader import ConfigReader


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    fields = read_decoder(
        reader,
        Defaults(
            sizes=(155_136, 4096, 27_648, 64, 80),
            max_position_embeddings=524_288,
            num_key_value_heads=8,
            head_dim=None if reader.content.get("head_dim", 128) is None else 128,
        ),
    )
    return Config(
        **fields,
        attention_bias=reader.boolean("attention_bias", True),
        attention_out_bias=reader.boolean("attention_out_bias", False),
        mlp_bias=reader.boolean("mlp_bias", False),
    )
