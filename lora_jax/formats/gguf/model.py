"""Models as GGUF files for llama.cpp and Ollama: weights, settings and tokenizer in one file.

tree   model/layers/self_attn/q_proj/kernel       (layers, in, out)
file   blk.3.attn_q.weight                        (out, in), rows of q and k interleaved
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import models, tree
from lora_jax.config import expand
from lora_jax.errors import UserError, raise_all
from lora_jax.formats.directories import new_directory_on_main
from lora_jax.formats.gguf.adapter import ARCHITECTURES
from lora_jax.formats.gguf.config import llama3_divisors, make_config
from lora_jax.formats.gguf.file import Stored, write_file
from lora_jax.formats.gguf.modelfile import PLAIN_CHAT, Chat, make_modelfile, write_modelfile
from lora_jax.formats.gguf.tensors import Entry, interleaved, list_entries
from lora_jax.formats.gguf.vocabulary import vocabulary_fields
from lora_jax.formats.names import Piece, pieces
from lora_jax.formats.side_files import generation_stops, load_tokenizer
from lora_jax.models.common import Model
from lora_jax.models.reader import FULL
from lora_jax.sharding import gather_to_host
from lora_jax.targets import HEAD
from lora_jax.weights import Untied

MODEL_FILE = "model.gguf"
_ROPE_FREQS = "rope_freqs.weight"


def write_gguf_model(
    target: str | Path, model: Model, params: Mapping, *, chat: Chat = PLAIN_CHAT
) -> None:
    """Write a directory with `model.gguf`, for llama.cpp, and a Modelfile for Ollama; equal weights
    give equal bytes. All hosts must call, and the main one writes.

    Args:
        target: the new directory.
        model: the description of the model; `model.directory` has its tokenizer.
        params: plain arrays in float32, float16 or bfloat16, such as `lora.merge` returns. Norms
            are float32 in the file.
        chat: stop tokens, template and system prompt.

    Raises:
        UserError: what the file cannot hold (`gguf_model_problems`); `target` exists and is not
            empty, or cannot be written.
    """
    with new_directory_on_main(target) as directory:
        write_gguf_model_files(directory, model, params, chat)


def write_gguf_model_files(
    directory: str | Path | None, model: Model, params: Mapping, chat: Chat = PLAIN_CHAT
) -> None:
    """Write the files of `write_gguf_model` into an empty directory; hosts whose `directory` is
    None only gather the weights.

    Raises:
        UserError: as `write_gguf_model`.
    """
    directory = None if directory is None else expand(directory)
    leaves: dict[tree.Path, Any] = dict(tree.flatten(params))
    for path, leaf in list(leaves.items()):
        if isinstance(leaf, Untied):
            leaves |= {path: leaf.embed, HEAD: jnp.swapaxes(leaf.head, 0, 1)}
    model = _with_own_head(model) if HEAD in leaves else model
    raise_all(gguf_model_problems(model))
    architecture = ARCHITECTURES[model.hf_config["model_type"]]
    fields, extra = _settings(architecture, model)
    tokenizer = load_tokenizer(model.directory)
    stops = [*generation_stops(model.directory), *sorted(chat.stops)]
    fields |= _vocabulary(architecture, model, tokenizer, stops, chat)
    text = make_modelfile(chat, tokenizer, [f"FROM ./{MODEL_FILE}"])
    entries = list_entries(architecture, vars(model.config))
    tensors = [*extra, *_weights(leaves, entries, model)]
    write_file(None if directory is None else directory / MODEL_FILE, architecture, fields, tensors)
    if directory is not None:
        write_modelfile(directory, text, chat)


def gguf_model_problems(model: Model) -> list[str]:
    """List what keeps a model from being a GGUF file that llama.cpp computes alike; empty if
    nothing. The tokenizer is included.

    Settings are those that our own reader of such a file finds in it.
    """
    kind = model.hf_config.get("model_type")
    if model.labels or kind not in ARCHITECTURES:
        what = "a classifier" if model.labels else f"model_type={kind!r}"
        return [
            f"a GGUF file cannot be written for {what}; supported: {', '.join(ARCHITECTURES)}; "
            "use --format hf"
        ]
    architecture = ARCHITECTURES[kind]
    own, file = _without_long_window(model), _read_back(architecture, model)
    problems = [
        f"a GGUF file of architecture {architecture} cannot hold {name}={own[name]!r} (it is "
        f"{file[name]!r} there); use --format hf"
        for name in file.keys() & own.keys()
        if not _same(own[name], file[name])
    ]
    try:
        _vocabulary(architecture, model, load_tokenizer(model.directory), [], PLAIN_CHAT)
    except UserError as error:
        problems.append(str(error))
    return sorted(problems)


def _vocabulary(
    architecture: str, model: Model, tokenizer: Any, stops: list[int], chat: Chat
) -> dict[str, Any]:
    return vocabulary_fields(tokenizer, architecture, model.config.vocab_size, stops, chat.template)


def _with_own_head(model: Model) -> Model:
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    return model.replace(config=config)


def _settings(architecture: str, model: Model) -> tuple[dict[str, Any], list[Stored]]:
    """Return the metadata of the architecture, and tensors that hold settings."""
    config, extra = model.config, []
    rope = config.rope_parameters[FULL]
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": config.head_dim,
    }
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "llama3" and architecture == "llama":
        divisors = llama3_divisors(rope, rope["rope_theta"], config.head_dim).astype(np.float32)
        extra = [Stored(_ROPE_FREQS, divisors.shape, "float32", lambda: divisors)]
    if architecture == "gemma3":
        if config.sliding_window:
            values["attention.sliding_window"] = config.sliding_window
        if config.final_logit_softcapping:
            values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    fields = {f"{architecture}.{name}": value for name, value in values.items()}
    return {"general.type": "model", **fields}, extra


def _read_back(architecture: str, model: Model) -> dict[str, Any]:
    """Return the settings that a file of this model has for our own reader."""
    fields, extra = _settings(architecture, model)
    entries = list_entries(architecture, vars(model.config))
    tensors: dict[str, Any] = {
        entry.source: SimpleNamespace(shape=entry.shape[::-1]) for entry in entries
    }
    tensors |= {one.name: SimpleNamespace(shape=one.shape, data=one.read()) for one in extra}
    try:
        content = make_config(architecture, fields, tensors, model.directory)
    except UserError as error:
        raise UserError(f"a GGUF file cannot be written: {error}") from error
    return vars(models.describe(content).config)


def _without_long_window(model: Model) -> dict[str, Any]:
    """Return the settings of a model; a window as long as the longest text is none."""
    config, is_llama = model.config, ARCHITECTURES[model.hf_config["model_type"]] == "llama"
    if is_llama and (config.sliding_window or 0) >= config.max_position_embeddings:
        kinds = (FULL,) * config.num_hidden_layers
        return vars(config) | {"sliding_window": None, "layer_types": kinds}
    return vars(config)


def _same(own: Any, other: Any) -> bool:
    """Compare two settings; numbers by the seven digits of float32."""
    if isinstance(own, Mapping) and isinstance(other, Mapping):
        return own.keys() == other.keys() and all(_same(own[key], other[key]) for key in own)
    if isinstance(own, float) and isinstance(other, float | int):
        return math.isclose(own, other, rel_tol=1e-6)
    return own == other


def _weights(leaves: Mapping, entries: list[Entry], model: Model) -> list[Stored]:
    """Return the tensors of the file."""
    places: dict[str, tuple[tree.Path, Piece]] = {}
    for path, leaf in leaves.items():
        places |= {piece.name: (path, piece) for piece in pieces(path, leaf.shape, model.names)}
    tensors = []
    for entry in entries:
        path, piece = places[entry.target]
        dtype = str(leaves[path].dtype) if len(entry.shape) > 1 else "float32"
        tensors.append(
            Stored(
                entry.source,
                entry.shape,
                dtype,
                lambda leaf=leaves[path], piece=piece, entry=entry: _read(leaf, piece, entry),
            )
        )
    return tensors


def _read(leaf: Any, piece: Piece, entry: Entry) -> np.ndarray:
    """Return the values of a tensor as they are in the file."""
    array = np.asarray(gather_to_host(leaf[piece.place()]))
    array = array.T if piece.transposed else array
    if entry.heads:
        array = interleaved(array, entry.heads)
    return array.astype(np.float32) + np.float32(entry.offset) if array.ndim == 1 else array
