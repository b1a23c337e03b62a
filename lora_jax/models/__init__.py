"""Model families, one file per Hugging Face `model_type`."""

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from flax import nnx

from lora_jax import tree
from lora_jax.config import shown
from lora_jax.errors import UserError, nearest
from lora_jax.models import (
    arcee,
    bert,
    camembert,
    cohere,
    distilbert,
    electra,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    gemma3_text,
    gemma4,
    gemma4_text,
    glm4,
    gpt2,
    gpt_oss,
    granite,
    lfm2,
    llama,
    ministral,
    ministral3,
    mistral,
    mistral3,
    mixtral,
    modernbert,
    nemotron,
    olmo2,
    olmo3,
    phi,
    phi3,
    qwen2,
    qwen2_5_vl,
    qwen3,
    qwen3_5,
    qwen3_5_text,
    qwen3_moe,
    qwen3_next,
    qwen3_vl,
    roberta,
    seed_oss,
    smollm3,
    smolvlm,
    starcoder2,
    xlm_roberta,
)
from lora_jax.models.common import Model, Names, attention_heads
from lora_jax.models.quantization import check_quantization
from lora_jax.models.reader import ConfigReader

_MODULES = (
    *(arcee, bert, camembert, cohere, distilbert, electra, exaone4, gemma, gemma2, gemma3),
    *(gemma3_text, gemma4, gemma4_text, glm4, gpt2, gpt_oss, granite, lfm2, llama, ministral),
    *(ministral3, mistral, mistral3, mixtral, modernbert, nemotron, olmo2, olmo3, phi, phi3, qwen2),
    *(qwen2_5_vl, qwen3, qwen3_5, qwen3_5_text, qwen3_moe, qwen3_next, qwen3_vl, roberta, seed_oss),
    *(smollm3, smolvlm, starcoder2, xlm_roberta),
)
_MOST_NUMBERS, _MOST_TENSORS = 10**13, 400_000  # the largest open models have 10**12 in 70,000
FAMILIES = {module.__name__.rpartition(".")[2]: module for module in _MODULES}
FAMILIES["xlm-roberta"] = FAMILIES.pop("xlm_roberta")  # its model_type is not a valid module name
CLASSIFIERS = tuple(name for name, module in FAMILIES.items() if hasattr(module, "ARCHITECTURE"))


def describe(
    hf_config: Mapping[str, Any],
    ignore: Container[str] = (),
    labels: Sequence[str] | None = None,
) -> Model:
    """Return the model of a config.json with shapes (float32) in place of weights.

    Args:
        hf_config: the content of config.json.
        ignore: fields known not to affect results.
        labels: labels of a classifier, by default those of the config. If they differ, or their
            order does, the head is a new one.

    Raises:
        UserError: a family that is not supported, or fields that are missing, mistyped or not
            understood.
    """
    reader = ConfigReader(hf_config, ignore)
    family = FAMILIES.get(str(reader.model_type))
    if family is None:
        raise _unknown(hf_config)
    fresh: tuple[str, ...] = ()
    if labels is not None:
        old = ConfigReader(hf_config).labels()
        fresh = family.NAMES.heads[:1] if tuple(labels) != old else ()
        hf_config = _with_labels(hf_config, labels, family.ARCHITECTURE)
        reader = ConfigReader(hf_config, ignore)
    config, names = family.read_config(reader), getattr(family, "NAMES", Names())
    names = names.without(getattr(config, "unread", ""))
    check_quantization(reader, names)
    reader.finish()
    if names.carried:
        reader.notes.append(
            f"model_type={reader.model_type!r} reads images: only its text is loaded and trained, "
            f"without {' and '.join(names.carried)}; an export of the model copies these tensors"
        )
    for kv_heads in {number: None for number, _ in attention_heads(config)}:
        if config.num_attention_heads % kv_heads:
            raise UserError(
                f"config.json: num_attention_heads={config.num_attention_heads} is not a multiple "
                f"of num_key_value_heads={kv_heads}"
            )
    graphdef, template = nnx.split(nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0))))
    _check_size(nnx.to_pure_dict(template))
    return Model(
        graphdef,
        template,
        nnx.to_pure_dict(template),
        config,
        dict(hf_config),
        family.RULES,
        names,
        fresh=fresh,
        notes=tuple(reader.notes),
    )


def ties_embeddings(hf_config: Mapping[str, Any]) -> bool:
    """Return True if a config.json ties the output head to the embedding, explicitly or by the
    default of the family.
    """
    reader = ConfigReader(hf_config)
    family = FAMILIES.get(str(reader.model_type))
    return family is not None and bool(
        getattr(family.read_config(reader), "tie_word_embeddings", False)
    )


def _unknown(hf_config: Mapping[str, Any]) -> UserError:
    """Return the error for a model type that is not supported: the nearest one that is, and what
    can be done with the text of a model that reads images.
    """
    kind, text = hf_config.get("model_type"), hf_config.get("text_config")
    message = (
        f"config.json: model_type={shown(repr(kind))} is not supported; these are: "
        f"{', '.join(FAMILIES)}.{nearest(str(kind), FAMILIES)}"
    )
    if isinstance(text, Mapping):
        inner = str(text.get("model_type"))
        message += f" Its text_config has model_type={shown(repr(inner))}, which is " + (
            "supported: save that part by itself, with save_pretrained of transformers"
            if inner in FAMILIES
            else "not supported either"
        )
    return UserError(message)


def _check_size(params: Mapping[str, Any]) -> None:
    """Raise for a model larger than any that exists, before its tensors are listed."""
    leaves = tree.flatten(params)
    matrices = sum(math.prod(leaf.shape[: tree.lead_axes(path)]) for path, leaf in leaves.items())
    numbers = sum(math.prod(leaf.shape) for leaf in leaves.values())
    if matrices > _MOST_TENSORS or numbers > _MOST_NUMBERS:
        raise UserError(
            f"config.json: its sizes make a model of {numbers:.1e} parameters in {matrices:,} "
            f"matrices; at most {_MOST_NUMBERS:.0e} in {_MOST_TENSORS:,} are supported"
        )


def _with_labels(hf_config: Mapping[str, Any], labels: Sequence[str], architecture: str) -> dict:
    named = {
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "architectures": [architecture],
    }
    return {key: value for key, value in hf_config.items() if key != "num_labels"} | named
