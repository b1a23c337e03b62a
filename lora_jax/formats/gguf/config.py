"""config.json of a Hugging Face model, from the metadata of a GGUF file."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.config import shown
from lora_jax.errors import UserError
from lora_jax.formats.gguf.metadata import metadata_value

# Settings that are read, or have no effect; any other that is not zero is refused.
_COMMON = (
    "vocab_size context_length embedding_length block_count feed_forward_length"
    " attention.head_count attention.head_count_kv attention.layer_norm_rms_epsilon"
    " attention.key_length attention.value_length rope.dimension_count rope.freq_base"
    " rope.scaling.type rope.scaling.factor rope.scaling.original_context_length"
    " rope.scaling.finetuned"
)
KNOWN = {
    "llama": f"{_COMMON} tensor_data_layout".split(),
    "gemma3": f"{_COMMON} attention.sliding_window final_logit_softcapping".split(),
}
# Constants of the architecture in llama.cpp; files do not have them.
GEMMA3_FULL_EVERY = 6  # every 6th layer has full attention, the others a window
GEMMA3_LOCAL_THETA = 10_000.0
GEMMA3_27B_LAYERS = 62  # the only model size whose scores are not scaled by the head size


def make_config(
    architecture: str, metadata: dict[str, Any], tensors: dict[str, Any], source: Path
) -> dict[str, Any]:
    """Return config.json of a `LlamaForCausalLM` or a `Gemma3ForCausalLM`.

    Raises:
        UserError: metadata that is missing, damaged or not supported.
    """
    _check_blocks(architecture, metadata, tensors, source)
    _check_settings(architecture, metadata, source)

    def integer(key: str) -> int:
        return metadata_value(metadata, f"{architecture}.{key}", int, source)

    heads, kv_heads, head_dim = _head_sizes(architecture, metadata, source)
    if "token_embd.weight" not in tensors:
        raise UserError(f"{source} has no tensor token_embd.weight")
    key = f"{architecture}.attention.layer_norm_rms_epsilon"
    epsilon = metadata_value(metadata, key, float, source)
    ids = {
        f"{name}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    theta = float(metadata.get(f"{architecture}.rope.freq_base", 10000.0))
    config = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "head_dim": head_dim,
        "hidden_size": integer("embedding_length"),
        "initializer_range": 0.02,
        "intermediate_size": integer("feed_forward_length"),
        "max_position_embeddings": integer("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": integer("block_count"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": _seven_digits(epsilon),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(architecture, metadata, tensors, head_dim, theta, source),
        "tie_word_embeddings": "output.weight" not in tensors,
        "use_cache": True,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        **ids,
    }
    if architecture == "gemma3":
        return config | _gemma3_fields(metadata, config)
    return config | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "mlp_bias": False,
    }


def _check_settings(architecture: str, metadata: dict[str, Any], source: Path) -> None:
    """Raise for settings that may change the results and are not read here."""
    known = {f"{architecture}.{key}" for key in KNOWN[architecture]}
    unknown = [
        f"{shown(key)}={shown(repr(value))}"
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.") and value and key not in known
    ]
    if unknown:
        raise UserError(f"{source} has settings that are not supported: {', '.join(unknown)}")


def _check_blocks(
    architecture: str, metadata: dict[str, Any], tensors: dict[str, Any], source: Path
) -> None:
    """Raise for more layers than the file can hold, before tensors are listed for each."""
    blocks = metadata_value(metadata, f"{architecture}.block_count", int, source)
    if blocks > len(tensors):
        raise UserError(
            f"{source} is damaged: {architecture}.block_count={blocks}, and it has only "
            f"{len(tensors)} tensors"
        )


def _head_sizes(architecture: str, metadata: dict[str, Any], source: Path) -> tuple[int, int, int]:
    """Return the numbers of heads and kv heads, and the head size."""

    def integer(key: str) -> int:
        return metadata_value(metadata, f"{architecture}.{key}", int, source)

    heads = integer("attention.head_count")
    kv_heads = heads
    if f"{architecture}.attention.head_count_kv" in metadata:
        kv_heads = integer("attention.head_count_kv")
    sizes = {
        key: metadata.get(f"{architecture}.{key}")
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    }
    head_dim = sizes["attention.key_length"] or integer("embedding_length") // heads
    wrong = [f"{key}={value}" for key, value in sizes.items() if value not in (None, head_dim)]
    if wrong or heads % kv_heads or head_dim % 2:
        raise UserError(
            f"{source}: {heads} heads of size {head_dim}, {kv_heads} kv heads {' '.join(wrong)} are"
            " not supported: keys, values and rotation need the same even size, and the heads must"
            " be a multiple of the kv heads"
        )
    return heads, kv_heads, head_dim


def _gemma3_fields(metadata: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json that Gemma 3 has in addition to those of llama."""
    layers, window = config["num_hidden_layers"], metadata.get("gemma3.attention.sliding_window")
    slides = [bool(window) and (layer + 1) % GEMMA3_FULL_EVERY > 0 for layer in range(layers)]
    scalar = config["head_dim"]
    if layers == GEMMA3_27B_LAYERS:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    limit = metadata.get("gemma3.final_logit_softcapping")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "final_logit_softcapping": _seven_digits(limit) if limit else None,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention" if here else "full_attention" for here in slides],
        "query_pre_attn_scalar": scalar,
        "rope_local_base_freq": GEMMA3_LOCAL_THETA,
        "sliding_window": window or None,
    }


def _seven_digits(value: float) -> float:
    """Round a float32 value of the file to its seven digits: 1e-5 is read as 9.9999997e-06."""
    return float(f"{value:.7g}")


def _rope_scaling(
    architecture: str,
    metadata: dict[str, Any],
    tensors: dict[str, Any],
    head_dim: int,
    theta: float,
    source: Path,
) -> dict[str, Any] | None:
    """Return `rope_scaling` of config.json; None without scaling."""
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = metadata.get(f"{architecture}.rope.scaling.factor")
    if "rope_freqs.weight" in tensors and architecture == "llama":
        # Files of Llama 3.1 have the frequency divisors, not the settings they come from. The
        # released models differ in `factor` only; the divisors show if this is one of them.
        divisors = np.asarray(tensors["rope_freqs.weight"].data, np.float32)
        scaling = {
            "rope_type": "llama3",
            "factor": _seven_digits(float(divisors.max())),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        expected = llama3_divisors(scaling, theta, head_dim)
        if (
            kind == "none"
            and divisors.shape == expected.shape
            and np.allclose(divisors, expected, rtol=1e-4)
        ):
            return scaling
        raise UserError(
            f"{source}: its rope_freqs.weight is not that of Llama 3.1; no other is supported"
        )
    if kind == "none":
        return None
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": float(factor)}
    raise UserError(
        f"{source} has rope scaling {kind!r} (factor {factor}); supported: none, linear, llama3"
    )


def llama3_divisors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Return the divisor of each rotary frequency: 1 for short waves, `factor` for long ones."""
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi)
    # Rotations of each frequency within the original context.
    turns = turns * theta ** -(np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
