"""Model families, one file per Hugging Face `model_type`."""

from collections.abc import Container, Mapping
from typing import Any

from flax import nnx

from lora_jax.config import UserError
from lora_jax.models import (
    gemma2,
    gemma3_text,
    gpt2,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)
from lora_jax.models.common import Model, Names
from lora_jax.models.reader import ConfigReader

_MODULES = (
    *(gemma2, gemma3_text, gpt2, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3, qwen3_moe),
)
FAMILIES = {module.__name__.rpartition(".")[2]: module for module in _MODULES}


def describe(hf_config: Mapping[str, Any], ignore: Container[str] = ()) -> Model:
    """The model of a config.json with shapes (float32) in place of weights; allocates nothing.

    Raises:
        UserError: a family that is not supported, or fields that are missing, mistyped or not
            understood.
    """
    reader = ConfigReader(hf_config, ignore)
    family = FAMILIES.get(str(reader.model_type))
    if family is None:
        raise UserError(
            f"model_type={reader.model_type!r} is not supported; these are: {', '.join(FAMILIES)}"
        )
    config = family.read_config(reader)
    reader.finish()
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"config.json: num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    graphdef, template = nnx.split(nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0))))
    return Model(
        graphdef,
        template,
        nnx.to_pure_dict(template),
        config,
        dict(hf_config),
        family.RULES,
        getattr(family, "NAMES", Names()),
    )
