"""GGUF to a Hugging Face directory, without torch: llama models with a byte-level BPE tokenizer.

    convert(Path("model.Q4_1.gguf"), Path("cache/model"))

    model.gguf ->  cache/model/config.json  generation_config.json  model.safetensors (float32)
                               tokenizer.json  tokenizer_config.json

Quantised tensors are dequantised. The rows of q and k are stored interleaved for llama.cpp's rotary
embedding and are put back into Hugging Face's order. Formats: ggml's gguf.md, safetensors' README.
"""

import json
import math
import shutil
import struct
import uuid
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lora_jax.config import UserError
from lora_jax.formats.gguf_tokenizer import metadata_value, read_tokenizer

# The llama.* settings that are read here, or change nothing; any other that is not zero is refused.
KNOWN = {
    f"llama.{key}"
    for key in (
        "vocab_size context_length embedding_length block_count feed_forward_length"
        " attention.head_count attention.head_count_kv attention.layer_norm_rms_epsilon"
        " attention.key_length attention.value_length rope.dimension_count rope.freq_base"
        " rope.scaling.type rope.scaling.factor rope.scaling.original_context_length"
        " rope.scaling.finetuned tensor_data_layout"
    ).split()
}


def convert(source: Path, target: Path) -> Path:
    """Write the Hugging Face directory of a GGUF file and return it; a finished `target` is kept.

    The directory appears complete or not at all, also when two processes convert at once.

    Raises:
        UserError: the file is missing, damaged or truncated; its architecture, tokenizer, tensors
            or settings are not supported; `target` is something else or cannot be written.
    """
    source, target = Path(source), Path(target)
    if (target / "config.json").is_file():
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"cannot convert {source} into {target}: it exists and is no converted model"
        )
    reader = _open(source)
    try:
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise UserError(f"{source} is damaged or truncated: {error}") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tensors, source)
    plan = _plan(config, tensors, source)
    tokenizer, tokenizer_config = read_tokenizer(metadata, config, source)
    generation = {
        k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config
    }

    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        partial.mkdir(parents=True)
        _write_safetensors(partial / "model.safetensors", plan, tensors, source)
        tokenizer.save(str(partial / "tokenizer.json"))
        for name, content in (
            ("tokenizer_config.json", tokenizer_config),
            ("generation_config.json", generation),
            ("config.json", config),
        ):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.rename(target)
    except OSError as error:
        # A finished target now means that another process was first, with the same content.
        if not (target / "config.json").is_file():
            raise UserError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _open(source: Path) -> gguf.GGUFReader:
    if not source.is_file():
        raise UserError(f"GGUF file {source} does not exist")
    try:
        return gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        # The reader has no error type of its own: a cut file gives empty slices and wrong shapes.
        raise UserError(f"{source} is no GGUF file, or damaged or truncated: {error}") from error


def _config(metadata: dict[str, Any], tensors: dict[str, Any], source: Path) -> dict[str, Any]:
    """config.json of a `LlamaForCausalLM`."""
    architecture = metadata_value(metadata, "general.architecture", str, source)
    if architecture != "llama":
        raise UserError(f"{source} has architecture {architecture!r}; supported: llama")
    unknown = [
        f"{key}={value!r}"
        for key, value in metadata.items()
        if key.startswith("llama.") and value and key not in KNOWN
    ]
    if unknown:
        raise UserError(f"{source} has settings that are not supported: {', '.join(unknown)}")

    def integer(key: str) -> int:
        return metadata_value(metadata, f"llama.{key}", int, source)

    heads = integer("attention.head_count")
    kv_heads = heads
    if "llama.attention.head_count_kv" in metadata:
        kv_heads = integer("attention.head_count_kv")
    hidden = integer("embedding_length")
    sizes = {
        key: metadata.get(f"llama.{key}")
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    }
    head_dim = sizes["attention.key_length"] or hidden // heads
    wrong = [f"{key}={value}" for key, value in sizes.items() if value not in (None, head_dim)]
    if wrong or heads % kv_heads or head_dim % 2:
        raise UserError(
            f"{source}: {heads} heads of size {head_dim}, {kv_heads} kv heads {' '.join(wrong)} are"
            " not supported: keys, values and rotation need one even size, and equal groups"
        )
    if "token_embd.weight" not in tensors:
        raise UserError(f"{source} has no tensor token_embd.weight")
    # float32 in the file: 1e-5 reads as 9.999999747378752e-06. Seven digits are all that it holds.
    epsilon = metadata_value(metadata, "llama.attention.layer_norm_rms_epsilon", float, source)
    ids = {
        f"{name}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "dtype": "float32",
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": integer("feed_forward_length"),
        "max_position_embeddings": integer("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": integer("block_count"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": float(f"{epsilon:.7g}"),
        "rope_theta": float(metadata.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(metadata, tensors, head_dim, source),
        "tie_word_embeddings": "output.weight" not in tensors,
        "use_cache": True,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        **ids,
    }


def _rope_scaling(
    metadata: dict[str, Any], tensors: dict, head_dim: int, source: Path
) -> dict | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    factor = metadata.get("llama.rope.scaling.factor")
    if "rope_freqs.weight" in tensors:
        # Llama 3.1 stores its frequency divisors, not the settings they come from. The released
        # models differ in `factor` only; the divisors say whether this is one of them.
        divisors = np.asarray(tensors["rope_freqs.weight"].data, np.float32)
        scaling = {
            "rope_type": "llama3",
            "factor": float(f"{divisors.max():.7g}"),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        theta = float(metadata.get("llama.rope.freq_base", 10000.0))
        expected = _llama3_divisors(scaling, theta, head_dim)
        if (
            kind == "none"
            and divisors.shape == expected.shape
            and np.allclose(divisors, expected, rtol=1e-4)
        ):
            return scaling
        raise UserError(
            f"{source}: its rope_freqs.weight is not Llama 3.1's; no other is supported"
        )
    if kind == "none":
        return None
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": float(factor)}
    raise UserError(
        f"{source} has rope scaling {kind!r} (factor {factor}); supported: none, linear, llama3"
    )


def _llama3_divisors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """What each rotary frequency is divided by: 1 for short waves, `factor` for long ones."""
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi)
    turns = turns * theta ** -(
        np.arange(0, head_dim, 2) / head_dim
    )  # per original context, of each frequency
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)


def _plan(
    config: dict[str, Any], tensors: dict[str, Any], source: Path
) -> list[tuple[str, str, tuple, int]]:
    """(HF name, GGUF name, shape, heads to un-permute or 0) of each tensor; all are in the file."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n, k = config["num_attention_heads"], config["num_key_value_heads"]
    h = config["head_dim"]
    plan: list[tuple[str, str, tuple[int, ...], int]]
    plan = [("model.embed_tokens.weight", "token_embd.weight", (v, d), 0)]
    for i in range(config["num_hidden_layers"]):
        plan += [
            (f"model.layers.{i}.{there}.weight", f"blk.{i}.{here}.weight", shape, heads)
            for there, here, shape, heads in (
                ("input_layernorm", "attn_norm", (d,), 0),
                ("self_attn.q_proj", "attn_q", (n * h, d), n),
                ("self_attn.k_proj", "attn_k", (k * h, d), k),
                ("self_attn.v_proj", "attn_v", (k * h, d), 0),
                ("self_attn.o_proj", "attn_output", (d, n * h), 0),
                ("post_attention_layernorm", "ffn_norm", (d,), 0),
                ("mlp.gate_proj", "ffn_gate", (f, d), 0),
                ("mlp.up_proj", "ffn_up", (f, d), 0),
                ("mlp.down_proj", "ffn_down", (d, f), 0),
            )
        ]
    plan.append(("model.norm.weight", "output_norm.weight", (d,), 0))
    if not config["tie_word_embeddings"]:
        plan.append(("lm_head.weight", "output.weight", (v, d), 0))
    problems = [f"no tensor {here}" for _, here, _, _ in plan if here not in tensors]
    for _, here, shape, _ in plan:
        found = (
            tuple(int(size) for size in reversed(tensors[here].shape)) if here in tensors else shape
        )
        if found != shape:
            problems.append(f"{here} has shape {found}, expected {shape}")
    extra = sorted(set(tensors) - {here for _, here, _, _ in plan} - {"rope_freqs.weight"})
    problems += [f"tensor {name} is not one of a plain llama model" for name in extra]
    if problems:
        shown = "; ".join(problems[:8]) + (
            f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        )
        raise UserError(f"{source} is damaged or not supported: {shown}")
    return plan


def _write_safetensors(path: Path, plan: list, tensors: dict[str, Any], source: Path) -> None:
    """One tensor in memory at a time; the library's own writer wants all of them at once."""
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt"}
    }  # transformers refuses a file without it
    end = 0
    for there, _, shape, _ in plan:
        start, end = end, end + 4 * math.prod(shape)
        header[there] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensor data is aligned to 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, here, shape, heads in plan:
            tensor = tensors[here]
            try:
                array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            except NotImplementedError as error:
                supported = ", ".join(sorted(kind.name for kind in _supported_types()))
                raise UserError(
                    f"{source}: tensor {here} has type {tensor.tensor_type.name}; supported:"
                    f" {supported}"
                ) from error
            if heads:  # llama.cpp: the two halves of each head, interleaved
                array = (
                    array.reshape(heads, shape[0] // heads // 2, 2, -1)
                    .swapaxes(1, 2)
                    .reshape(shape)
                )
            file.write(np.ascontiguousarray(array, "<f4").data)


def _supported_types() -> list[gguf.GGMLQuantizationType]:
    kinds = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        kinds.append(kind)
    return kinds
