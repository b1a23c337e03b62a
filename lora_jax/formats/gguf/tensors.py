"""Tensors of a GGUF file, dequantised and written as safetensors with Hugging Face's names."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lora_jax.errors import UserError
from lora_jax.formats.tensors import all_finite

# Names of the norms and projections of a layer: Hugging Face -> GGUF.
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


@dataclass(frozen=True)
class Entry:
    """A tensor of the converted model, and its source in the GGUF file."""

    target: str  # its Hugging Face name
    source: str  # its name in the file
    shape: tuple[int, ...]  # Hugging Face's
    heads: int = 0  # number of heads whose rows are interleaved in the file
    offset: float = 0.0  # added to the values in the file


def list_entries(architecture: str, config: Mapping[str, Any]) -> list[Entry]:
    """Return all tensors of a model with these fields of config.json."""
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
        for name, stored in BLOCKS[architecture].items():
            module = name.rpartition(".")[2]
            plan.append(
                Entry(
                    f"model.layers.{i}.{name}.weight",
                    f"blk.{i}.{stored}.weight",
                    shapes.get(module, (d,)),
                    interleaved.get(module, 0),
                    offset if module.endswith("norm") else 0.0,
                )
            )
    plan.append(Entry("model.norm.weight", "output_norm.weight", (d,), offset=offset))
    if not config["tie_word_embeddings"]:
        plan.append(Entry("lm_head.weight", "output.weight", (v, d)))
    return plan


def plan_tensors(
    architecture: str, config: dict[str, Any], tensors: dict[str, Any], source: Path
) -> list[Entry]:
    """Return all tensors of the model in a file.

    Raises:
        UserError: tensors that are missing, of another shape, or not part of such a model.
    """
    plan = list_entries(architecture, config)
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
        rest = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        listed = "; ".join(problems[:8]) + rest
        raise UserError(f"{source} is damaged or not supported: {listed}")
    return plan


def write_safetensors(path: Path, plan: list[Entry], tensors: dict[str, Any], source: Path) -> None:
    """Write the tensors one at a time; the writer of safetensors needs all of them in memory."""
    # transformers refuses a file without this metadata.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
    """Return the float32 values of a tensor in Hugging Face's order."""
    tensor = tensors[entry.source]
    try:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(entry.shape)
    except NotImplementedError as error:
        supported = ", ".join(sorted(kind.name for kind in _supported_types()))
        raise UserError(
            f"{source}: tensor {entry.source} has type {tensor.tensor_type.name}; supported:"
            f" {supported}"
        ) from error
    if entry.heads:
        array = _swapped(array, entry.heads, (-1, 2))
    if not all_finite(array):
        raise UserError(
            f"{source}: weights are infinite or not a number in {entry.source}; the file is "
            "damaged, or a training diverged: get it again"
        )
    return array - np.float32(entry.offset) if entry.offset else array


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return rows of q or k in the order of a file, where the two halves of each head take turns,
    for llama.cpp's rotary embedding.
    """
    return _swapped(rows, heads, (2, -1))


def _swapped(rows: np.ndarray, heads: int, halves: tuple[int, int]) -> np.ndarray:
    """Return the rows of each head with their two indices swapped."""
    width = rows[0].size
    return rows.reshape(heads, *halves, width).swapaxes(1, 2).reshape(rows.shape)


def _supported_types() -> list[gguf.GGMLQuantizationType]:
    kinds = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        kinds.append(kind)
    return kinds
