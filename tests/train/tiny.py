"""Tiny random models, tokenizers, rows and configs, for tests and the scripts that they start."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from lora_jax import config as configs
from lora_jax import models, tree
from lora_jax.formats.names import pieces

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")


TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


ROWS = [
    {"prompt": question, "completion": answer}
    for question, answer in (("one", "eins"), ("two", "zwei"), ("three", "drei"), ("four", "vier"))
]


# 23 examples make a number of rows that no batch divides.
SUMS = [
    {"prompt": f"what is {i} plus {i * 7 % 5}", "completion": str(i + i * 7 % 5) * (1 + i % 3)}
    for i in range(23)
]


def random_params(shapes, seed=0):
    """Arrays for a tree of shapes: norms near one, other leaves about 1 / sqrt(inputs)."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1] == "scale":
            return jnp.asarray(1 + 0.1 * noise)
        scale = 0.5 if path[-1] == "embedding" else leaf.shape[-2] ** -0.5
        return jnp.asarray(scale * noise)

    return tree.unflatten({path: draw(path, leaf) for path, leaf in tree.flatten(shapes).items()})


def random_adapters(adapters, seed=1):
    """Adapters with both halves away from zero."""
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def tiny_model(seed=0, **fields):
    """A model with random weights; `fields` replace those of `TINY`."""
    model = models.describe(TINY | fields)
    return model.replace(params=random_params(model.params, seed))


def make_config(*overrides):
    """A config with a model named, whose other settings are the defaults and `overrides`."""
    return configs.parse({"model": "tiny"}, overrides)


def random_batch(rows=4, time=12, vocab=272, seed=0, weights=(0.0, 1.0)):
    """Rows of one segment each, with `loss_weights` drawn from `weights`."""
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, vocab, (rows, time)).astype(np.int32),
        "loss_weights": rng.choice(np.asarray(weights, np.float32), (rows, time)),
        "segment_ids": np.ones((rows, time), np.int32),
        "positions": np.tile(np.arange(time, dtype=np.int32), (rows, 1)),
    }


def distance(found, expected):
    """The largest max|x - y| / max(1, max|y|) over the leaves of two trees."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.max(np.abs(x - y)) / max(1.0, np.max(np.abs(y))))
        for x, y in ((np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs)
    )


def write_tokenizer(directory, chat_template=CHATML):
    """A tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    backend = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)


def write_model(directory, *, chat_template=CHATML, seed=0, **fields):
    """A Hugging Face directory: config.json, model.safetensors, tokenizer."""
    directory.mkdir(parents=True)
    model = tiny_model(seed, **fields)
    (directory / "config.json").write_text(json.dumps(TINY | fields))
    tensors = {}
    for path, leaf in tree.flatten(model.params).items():
        for piece in pieces(path, leaf.shape, model.names):
            array = np.asarray(leaf)[piece.place()]
            tensors[piece.name] = np.ascontiguousarray(array.T if piece.transposed else array)
    save_file(tensors, directory / "model.safetensors")
    write_tokenizer(directory, chat_template)
    return directory


def write_rows(file, rows=ROWS):
    """A .jsonl file of rows."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
