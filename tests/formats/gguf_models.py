"""Tiny models that a GGUF file can hold, with tokenizers that llama.cpp has."""

import json

from lora_jax import formats
from lora_jax.formats.gguf import convert
from lora_jax.tree import flatten, unflatten

from ..train.tiny import random_params, write_model
from .test_gguf import write_gemma


def write_llama(directory, **fields):
    """A llama or mistral with a byte-level tokenizer of one merge, split as GPT-2's."""
    write_model(directory, **fields)
    with_merge(directory)
    return formats.load(directory)


def with_merge(directory):
    """Give the tokenizer of `write_model` a merge and GPT-2's split, without which there is no
    GGUF file.
    """
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"]["use_regex"] = True
    content["model"]["vocab"]["ab"] = len(content["model"]["vocab"])
    content["model"]["merges"] = [["a", "b"]]
    file.write_text(json.dumps(content))


def write_tiny(kind, directory):
    """A model of one of `KINDS`."""
    if kind == "gemma3":
        write_gemma(directory.with_suffix(".gguf"))
        model = formats.load(convert(directory.with_suffix(".gguf"), directory))
        leaves = flatten(random_params(model.params))
        # Larger ones, times sqrt(d), would drown what the layers add.
        leaves = {p: 0.05 * x if p[-1] == "embedding" else x for p, x in leaves.items()}
        return model.replace(params=unflatten(leaves))
    return write_llama(directory, **KINDS[kind])


KINDS = {
    "llama": dict(tie_word_embeddings=False, rope_theta=5000.0),
    "mistral": dict(
        model_type="mistral",
        architectures=["MistralForCausalLM"],
        sliding_window=None,
        head_dim=10,
    ),
    "gemma3": {},
}
