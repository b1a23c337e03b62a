"""Model directories of Hugging Face, written: safetensors files, config.json and side files."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lora_jax import tree
from lora_jax.config import expand
from lora_jax.errors import UserError
from lora_jax.formats.directories import new_directory_on_main
from lora_jax.formats.model_tensors import carried_tensors, stored_names
from lora_jax.formats.names import Piece, pieces
from lora_jax.formats.side_files import copy_side_files, write_generation_config, write_json
from lora_jax.formats.tensors import Tensor, read_whole
from lora_jax.models import Model
from lora_jax.sharding import gather_to_host
from lora_jax.targets import HEAD
from lora_jax.weights import Untied


def parse_size(text: str) -> int:
    """Return the bytes of "5GB", "200MB" (decimal, as Hugging Face counts) or a plain number.

    Raises:
        UserError: the text is not a positive size.

    Example:
        >>> parse_size("200MB")
        200000000
    """
    units = {
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "KIB": 2**10,
        "MIB": 2**20,
        "GIB": 2**30,
        "B": 1,
        "": 1,
    }
    digits = text.strip().rstrip("BbIiKkMmGgTt ")
    try:
        size = int(float(digits) * units[text.strip()[len(digits) :].strip().upper()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"size {text!r} is not a positive size; write it as 5GB or 200MB")
    return size


def write_model(
    target: str | Path,
    model: Model,
    params: Mapping,
    source: str | Path,
    max_shard_size: str = "5GB",
    chat_template: str | None = None,
    stops: Collection[int] = (),
) -> None:
    """Write a new Hugging Face directory; it appears complete or not at all. See
    `write_model_files`.

    Raises:
        UserError: `target` exists and is not empty, or cannot be written; a malformed size.
    """
    with new_directory_on_main(target) as directory:
        write_model_files(directory, model, params, source, max_shard_size, chat_template, stops)


def write_model_files(
    directory: str | Path | None,
    model: Model,
    params: Mapping,
    source: str | Path,
    max_shard_size: str = "5GB",
    chat_template: str | None = None,
    stops: Collection[int] = (),
) -> None:
    """Write the files of a model into an empty directory.

    These are the weights in safetensors (several shards with an index above `max_shard_size`),
    config.json, and the side files of `source`; of a model that reads images also its other
    tensors, bit for bit, or dequantised. One shard at a time is gathered to the host. All
    hosts must call; those whose `directory` is None write nothing.

    Args:
        directory: on the main host, a directory such as that of `new_directory_on_main`.
        model: the description of the model.
        params: plain arrays, such as `lora.merge` returns.
        source: the directory of the base; its tokenizer, chat templates, generation config and
            licence are copied.
        max_shard_size: the largest file of weights, as in "5GB" or "200MB".
        chat_template: Jinja text that replaces all chat templates of `source`.
        stops: token ids added to those that end a generation.
    """
    source, limit = expand(source), parse_size(max_shard_size)
    leaves, config = tree.flatten(params), dict(model.hf_config)
    config.pop("quantization_config", None)  # weights are floats once they are read
    for path, leaf in list(leaves.items()):
        if isinstance(leaf, Untied):
            leaves |= {path: leaf.embed, HEAD: jnp.swapaxes(leaf.head, 0, 1)}
            config["tie_word_embeddings"] = False
    carried = carried_tensors(source, model)
    directory = None if directory is None else expand(directory)
    renamed = stored_names(source, model) if carried else {}
    _write_weights(directory, leaves, model, limit, renamed, carried)
    if directory is None:
        return
    dtypes = {str(leaf.dtype) for leaf in leaves.values()}
    if len(dtypes) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = dtypes.pop()
    write_json(directory / "config.json", config)
    copy_side_files(source, directory, chat_template)
    write_generation_config(source, directory, stops)


def _write_weights(
    directory: Path | None,
    leaves: Mapping[tree.Path, Any],
    model: Model,
    limit: int,
    renamed: Mapping[str, str],
    carried: Mapping[str, Tensor],
) -> None:
    """Write the safetensors files of at most `limit` bytes, and their index if there are several.
    All hosts gather; those without a directory write nothing. `renamed` has names that differ in
    the files, and `carried` tensors to copy.
    """
    places: dict[str, tuple[tree.Path, Piece]] = {}
    for path, leaf in leaves.items():
        for piece in pieces(path, leaf.shape, model.names):
            places[renamed.get(piece.name, piece.name)] = (path, piece)
    sizes = {
        name: math.prod(piece.shape) * leaves[path].dtype.itemsize
        for name, (path, piece) in places.items()
    }
    for name, tensor in carried.items():
        sizes[name] = math.prod(tensor.shape) * tensor.dtype.itemsize
    shards = _shards(sizes, limit)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {}
        for name in names:
            weight_map[name] = file
            if name in carried:
                if directory is not None:
                    content[name] = read_whole(carried[name])
                continue
            path, piece = places[name]
            array = gather_to_host(leaves[path][piece.place()])
            if directory is not None:
                content[name] = np.ascontiguousarray(array.T if piece.transposed else array)
        if directory is not None:
            save_file(content, directory / file, metadata={"format": "pt"})
    if directory is not None and len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Divide tensors, in the order of their names, into files of at most `limit` bytes; a larger
    tensor has a file of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sizes):
        if shards[-1] and filled + sizes[name] > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name]
    return shards
