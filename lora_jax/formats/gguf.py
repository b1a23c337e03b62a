"""GGUF to a Hugging Face directory, without torch: llama with a byte-level BPE tokenizer, and the
text part of Gemma 3 with its SentencePiece one.

    convert(Path("model.Q4_1.gguf"), Path("cache/model"))

    model.gguf ->  cache/model/config.json  generation_config.json  model.safetensors (float32)
                               tokenizer.json  tokenizer_config.json

Quantised tensors are dequantised. Llama's rows of q and k are stored interleaved for llama.cpp's
rotary embedding and are put back into Hugging Face's order; Gemma's norms are stored with the 1
that Hugging Face adds when it applies them. Formats: ggml's gguf.md, safetensors' README.
"""

import json
import math
import shutil
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lora_jax.config import expand, is_file, shown
from lora_jax.errors import UserError
from lora_jax.formats.gguf_header import check_header
from lora_jax.formats.gguf_metadata import check_types
from lora_jax.formats.gguf_tokenizer import metadata_value, read_tokenizer
from lora_jax.formats.tensors import all_finite

# The settings that are read here, or change nothing; any other that is not zero is refused.
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
# What the norms and projections of a block are called here and there.
_ATTENTION = {f"self_attn.{c}_proj": f"attn_{c}" for c in "qkv"} | {
    "self_attn.o_proj": "attn_output"
}
_MLP = {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
BLOCKS = {
    "llama": {
        "input_layernorm": "attn_norm",
        **_ATTENTION,
        "post_attention_layernorm": "ffn_norm",
        **_MLP,
    },
    "gemma3": {
        "input_layernorm": "attn_norm",
        **_ATTENTION,
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        **_MLP,
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
# llama.cpp has these as constants of the architecture, not in the file.
GEMMA3_FULL_EVERY = 6  # of so many layers the last attends to everything, the others to a window
GEMMA3_LOCAL_THETA = 10_000.0
GEMMA3_27B_LAYERS = 62  # the one size whose scores are not scaled by the size of a head


@dataclass(frozen=True)
class Entry:
    """A tensor of the file and what it becomes."""

    target: str  # its Hugging Face name
    source: str  # its name in the file
    shape: tuple[int, ...]  # Hugging Face's
    heads: int = 0  # so many whose rows are interleaved
    offset: float = 0.0  # what the stored values have on top


def convert(source: str | Path, target: str | Path) -> Path:
    """Write the Hugging Face directory of a GGUF file and return it; a finished `target` is kept.

    The directory appears complete or not at all, also when two processes convert at once.

    Raises:
        UserError: the file is missing, damaged or truncated; its architecture, tokenizer, tensors
            or settings are not supported; `target` is something else or cannot be written.
    """
    target = expand(target)
    source = expand(source)
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
    check_types(metadata, source)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = metadata_value(metadata, "general.architecture", str, source)
    if architecture not in KNOWN:
        raise UserError(
            f"{source} has architecture {architecture!r}; supported: {', '.join(KNOWN)}"
        )
    _check_blocks(architecture, metadata, tensors, source)
    config = _config(architecture, metadata, tensors, source)
    plan = _plan(architecture, config, tensors, source)
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
    if not is_file(source):
        raise UserError(f"GGUF file {source} does not exist")
    check_header(source)
    try:
        return gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        # The reader has no error type of its own: a cut file gives empty slices and wrong shapes.
        raise UserError(f"{source} is no GGUF file, or damaged or truncated: {error}") from error


def _check_blocks(
    architecture: str, metadata: dict[str, Any], tensors: dict[str, Any], source: Path
) -> None:
    """Raise for more blocks than there can be, before anything is listed for each."""
    blocks = metadata_value(metadata, f"{architecture}.block_count", int, source)
    if blocks > len(tensors):
        raise UserError(
            f"{source} is damaged: {architecture}.block_count={blocks}, and it has only "
            f"{len(tensors)} tensors"
        )


def _config(
    architecture: str, metadata: dict[str, Any], tensors: dict[str, Any], source: Path
) -> dict[str, Any]:
    """config.json of a `LlamaForCausalLM` or a `Gemma3ForCausalLM`."""
    known = {f"{architecture}.{key}" for key in KNOWN[architecture]}
    unknown = [
        f"{shown(key)}={shown(repr(value))}"
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.") and value and key not in known
    ]
    if unknown:
        raise UserError(f"{source} has settings that are not supported: {', '.join(unknown)}")

    def integer(key: str) -> int:
        return metadata_value(metadata, f"{architecture}.{key}", int, source)

    heads = integer("attention.head_count")
    kv_heads = heads
    if f"{architecture}.attention.head_count_kv" in metadata:
        kv_heads = integer("attention.head_count_kv")
    hidden = integer("embedding_length")
    sizes = {
        key: metadata.get(f"{architecture}.{key}")
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
        "hidden_size": hidden,
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


def _gemma3_fields(metadata: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What config.json of Gemma 3 has beyond that of a llama."""
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
    """float32 in the file: 1e-5 reads as 9.999999747378752e-06. Seven digits are all it holds."""
    return float(f"{value:.7g}")


def _rope_scaling(
    architecture: str,
    metadata: dict[str, Any],
    tensors: dict[str, Any],
    head_dim: int,
    theta: float,
    source: Path,
) -> dict[str, Any] | None:
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = metadata.get(f"{architecture}.rope.scaling.factor")
    if "rope_freqs.weight" in tensors and architecture == "llama":
        # Llama 3.1 stores its frequency divisors, not the settings they come from. The released
        # models differ in `factor` only; the divisors say whether this is one of them.
        divisors = np.asarray(tensors["rope_freqs.weight"].data, np.float32)
        scaling = {
            "rope_type": "llama3",
            "factor": _seven_digits(float(divisors.max())),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
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
    architecture: str, config: dict[str, Any], tensors: dict[str, Any], source: Path
) -> list[Entry]:
    """Every tensor of the model; all of them are in the file."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n, k, h = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    shapes = {
        **{"q_proj": (n * h, d), "k_proj": (k * h, d), "v_proj": (k * h, d), "o_proj": (d, n * h)},
        **{"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)},
        **{"q_norm": (h,), "k_norm": (h,)},
    }
    interleaved = {"q_proj": n, "k_proj": k} if architecture == "llama" else {}
    offset = 1.0 if architecture == "gemma3" else 0.0
    plan = [Entry("model.embed_tokens.weight", "token_embd.weight", (v, d))]
    for i in range(config["num_hidden_layers"]):
        for there, here in BLOCKS[architecture].items():
            module = there.rpartition(".")[2]
            plan.append(
                Entry(
                    f"model.layers.{i}.{there}.weight",
                    f"blk.{i}.{here}.weight",
                    shapes.get(module, (d,)),
                    interleaved.get(module, 0),
                    offset if module.endswith("norm") else 0.0,
                )
            )
    plan.append(Entry("model.norm.weight", "output_norm.weight", (d,), offset=offset))
    if not config["tie_word_embeddings"]:
        plan.append(Entry("lm_head.weight", "output.weight", (v, d)))
    problems = [f"no tensor {entry.source}" for entry in plan if entry.source not in tensors]
    for entry in plan:
        if entry.source in tensors:
            found = tuple(int(size) for size in reversed(tensors[entry.source].shape))
            if found != entry.shape:
                problems.append(f"{entry.source} has shape {found}, expected {entry.shape}")
    used = {entry.source for entry in plan}
    used |= {"rope_freqs.weight"} if architecture == "llama" else set()
    extra = sorted(set(tensors) - used)
    problems += [f"tensor {name} is not one of a plain {architecture} model" for name in extra]
    if problems:
        shown = "; ".join(problems[:8]) + (
            f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        )
        raise UserError(f"{source} is damaged or not supported: {shown}")
    return plan


def _write_safetensors(
    path: Path, plan: list[Entry], tensors: dict[str, Any], source: Path
) -> None:
    """One tensor in memory at a time; the library's own writer wants all of them at once."""
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt"}
    }  # transformers refuses a file without it
    end = 0
    for entry in plan:
        start, end = end, end + 4 * math.prod(entry.shape)
        header[entry.target] = {"dtype": "F32", "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensor data is aligned to 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in plan:
            file.write(np.ascontiguousarray(_restored(entry, tensors, source), "<f4").data)


def _restored(entry: Entry, tensors: dict[str, Any], source: Path) -> np.ndarray:
    """The float32 values as Hugging Face has them."""
    tensor = tensors[entry.source]
    try:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(entry.shape)
    except NotImplementedError as error:
        supported = ", ".join(sorted(kind.name for kind in _supported_types()))
        raise UserError(
            f"{source}: tensor {entry.source} has type {tensor.tensor_type.name}; supported:"
            f" {supported}"
        ) from error
    if entry.heads:  # llama.cpp: the two halves of each head, interleaved
        pairs = array.reshape(entry.heads, entry.shape[0] // entry.heads // 2, 2, -1)
        array = pairs.swapaxes(1, 2).reshape(entry.shape)
    if not all_finite(array):
        raise UserError(
            f"{source}: weights are infinite or not a number in {entry.source}; the file is "
            "damaged, or a training diverged: get it again"
        )
    return array - np.float32(entry.offset) if entry.offset else array


def _supported_types() -> list[gguf.GGMLQuantizationType]:
    kinds = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        kinds.append(kind)
    return kinds
