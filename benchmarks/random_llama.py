"""Random llamas as Hugging Face directories, and rows of random tokens for them.

    write(directory, SIZES["1b"])     # config.json, safetensors in bfloat16, a tokenizer

Norms are one. Other weights are pieces of one pool of normal numbers, which takes the time of the
disk and not that of a random generator.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHARD_BYTES = 500_000_000
_POOL = 2**22 + 1  # numbers; rows of a weight do not begin at the same one
_SPREAD = 0.02  # standard deviation of weights


def _shape(hidden: int, mlp: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128_256,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        **more,
    }


# Shapes of Llama 3.
SIZES = {
    "1b": _shape(2048, 8192, 16, 32, tie_word_embeddings=True),
    "3b": _shape(3072, 8192, 28, 24, tie_word_embeddings=True),
    "8b": _shape(4096, 14_336, 32, 32),
    "tiny": _shape(64, 128, 2, 4, num_key_value_heads=2, vocab_size=256),
}


def tensors(fields: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return names and shapes, in the order of the files."""
    d, f, v = (fields[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = d * fields["num_key_value_heads"] // fields["num_attention_heads"]
    yield "model.embed_tokens.weight", (v, d)
    for i in range(fields["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (d,),
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }.items():
            yield f"model.layers.{i}.{name}.weight", shape
    yield "model.norm.weight", (d,)
    if not fields["tie_word_embeddings"]:
        yield "lm_head.weight", (v, d)


def write(directory: Path, fields: Mapping[str, Any], seed: int = 0) -> Path:
    """Write a model with the fields of its config.json, and return its directory."""
    rng, shard, shards, weight_map = np.random.default_rng(seed), {}, 0, {}
    pool = (_SPREAD * rng.standard_normal(_POOL, np.float32)).astype(ml_dtypes.bfloat16)

    def flush() -> None:
        nonlocal shards
        shards += 1
        file = f"model-{shards:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in tensors(fields):
        start = int(rng.integers(_POOL // 2))
        if len(shape) == 1:
            shard[name] = np.ones(shape, ml_dtypes.bfloat16)
        else:
            shard[name] = np.resize(pool[start:], shape)
        if sum(array.nbytes for array in shard.values()) > SHARD_BYTES:
            flush()
    if shard:
        flush()
    (directory / "config.json").write_text(json.dumps(dict(fields)))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer of one word, for models whose rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(directory)
