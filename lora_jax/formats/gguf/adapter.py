"""Adapters as GGUF files that llama.cpp and Ollama load over the GGUF file of the base.

    tree   model/layers/self_attn/q_proj/lora_a, lora_b     (layers, in, rank), (.., rank, out)
    file   blk.3.attn_q.weight.lora_a, .lora_b              (rank, in), (out, rank)

llama.cpp computes W + alpha / rank B A, with one alpha for the file and the rank of each pair. What
a scale differs by goes into B. Rows of B are in the order of the rows of the base's file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import tree
from lora_jax.adapters.low_rank import as_plain
from lora_jax.config import AdapterConfig, expand
from lora_jax.errors import raise_all
from lora_jax.formats.directories import new_directory_on_main
from lora_jax.formats.gguf.file import Stored, write_file
from lora_jax.formats.gguf.modelfile import (
    BASE_FILE,
    PLAIN_CHAT,
    Chat,
    make_modelfile,
    write_modelfile,
)
from lora_jax.formats.gguf.tensors import Entry, interleaved, list_entries
from lora_jax.formats.serving import beyond_pairs
from lora_jax.formats.side_files import load_tokenizer
from lora_jax.models.common import Model
from lora_jax.sharding import gather_to_host
from lora_jax.targets import Target, Trainable, as_trainable

ADAPTER_FILE = "adapter.gguf"
# model_type of config.json -> architecture in GGUF files.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "gemma3_text": "gemma3"}
_MERGE = "export a GGUF model with --merged"


def write_gguf_adapter(
    target: str | Path,
    adapters: Mapping,
    model: Model,
    config: AdapterConfig | Trainable,
    *,
    base_model: str,
    chat: Chat = PLAIN_CHAT,
) -> None:
    """Write a directory with `adapter.gguf`, for llama.cpp, and a Modelfile for Ollama; equal
    adapters give equal bytes. All hosts must call, and the main one writes.

    Args:
        target: the new directory.
        adapters: the trained tree.
        model: the base; its weights may be shapes.
        config: what the adapters train.
        base_model: name of the base, for people who read the file.
        chat: stop tokens, template and system prompt for the Modelfile.

    Raises:
        UserError: what the file cannot hold (`gguf_adapter_problems`); `target` exists and is not
            empty, or cannot be written.
    """
    found = as_trainable(model.params, config)
    raise_all(gguf_adapter_problems(found, model))
    leaves: Any = tree.flatten(jax.tree.map(gather_to_host, adapters))
    if found.config.changes_base:
        leaves, found = as_plain(leaves, found)
    architecture = ARCHITECTURES[model.hf_config["model_type"]]
    fields = {
        "general.type": "adapter",
        "general.base_model.count": 1,
        "general.base_model.0.name": base_model,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(found.config.alpha),
    }
    tensors = _pairs(leaves, found, _entries(model))
    weights = [
        f"# {BASE_FILE} is the GGUF file of {base_model}: put it next to this file.",
        f"FROM ./{BASE_FILE}",
        f"ADAPTER ./{ADAPTER_FILE}",
    ]
    tokenizer = load_tokenizer(model.directory) if chat.stops else None
    text = make_modelfile(chat, tokenizer, weights)
    with new_directory_on_main(expand(target)) as directory:
        if directory is not None:
            write_file(directory / ADAPTER_FILE, architecture, fields, tensors)
            write_modelfile(directory, text, chat)


def gguf_adapter_problems(found: Trainable, model: Model) -> list[str]:
    """List what keeps these adapters from being a GGUF file, with remedies; empty if nothing."""
    config = found.config
    kind = model.hf_config.get("model_type")
    if model.labels or kind not in ARCHITECTURES:
        what = "a classifier" if model.labels else f"model_type={kind!r}"
        return [
            f"a GGUF file cannot be written for {what}; supported: {', '.join(ARCHITECTURES)}; "
            "use --format peft or hf"
        ]
    if config.trains_virtual_tokens:
        return [f"a GGUF adapter has no virtual tokens (method={config.method}); use --format peft"]
    if not config.trains_lora:
        return [f"a GGUF adapter cannot hold method={config.method}; {_MERGE}"]
    problems = [
        f"a GGUF adapter cannot hold {setting}; {_MERGE}" for setting in beyond_pairs(config)
    ]
    if config.init == "loftq":
        problems.append(
            "init=loftq made up for the error of the quantised base, which the base's GGUF file "
            f"does not have; {_MERGE}"
        )
    known = _entries(model)
    unknown = sorted(
        {tree.dotted(one.path) for one in found.targets if not set(one.names) <= known.keys()}
    )
    if unknown:
        problems.append(
            f"a GGUF adapter cannot hold adapters of {', '.join(unknown)} "
            f"(target_modules={config.target_modules!r}); {_MERGE}"
        )
    return problems


def _entries(model: Model) -> dict[str, Entry]:
    """Return the matrices of the layers, by the names of their modules."""
    entries = list_entries(ARCHITECTURES[model.hf_config["model_type"]], vars(model.config))
    return {
        entry.target.removesuffix(".weight"): entry
        for entry in entries
        if entry.source.startswith("blk.") and len(entry.shape) == 2
    }


def _pairs(leaves: Mapping, found: Trainable, entries: Mapping[str, Entry]) -> list[Stored]:
    """Return both tensors of every adapted matrix, in the order of the base's tensors."""
    places = {
        name: (target, layer)
        for target in found.targets
        for layer, name in enumerate(target.names)
        if target.ranks[layer]
    }
    tensors = []
    for name, entry in entries.items():
        if name in places:
            target, layer = places[name]
            for suffix, value in zip(
                ("lora_a", "lora_b"), _factors(leaves, found, target, layer, entry), strict=True
            ):
                tensors.append(
                    Stored(f"{entry.source}.{suffix}", value.shape, "float32", lambda v=value: v)
                )
    return tensors


def _factors(
    leaves: Mapping, found: Trainable, target: Target, layer: int, entry: Entry
) -> tuple[np.ndarray, np.ndarray]:
    """Return A (rank, in) and B (out, rank) of one layer, scaled for the alpha of the file."""
    index, rank = (layer,) if target.stacked else (), target.ranks[layer]
    a = np.asarray(leaves[(*target.path, "lora_a")], np.float32)[index][:, :rank].T
    b = np.asarray(leaves[(*target.path, "lora_b")], np.float32)[index][:rank].T
    scale = target.alphas[layer] / (rank**0.5 if found.config.use_rslora else rank)
    factor = scale * rank / found.config.alpha
    if factor != 1:
        b = (b.astype(np.float64) * factor).astype(np.float32)
    return a, interleaved(b, entry.heads) if entry.heads else b
