"""Embeddings and heads that PEFT saves whole and does not name in adapter_config.json.

    base_model.model.model.embed_tokens.weight               after resize_token_embeddings
    base_model.model.model.embed_tokens.base_layer.weight    under an adapter of the embedding

`peft` puts them into the base when it loads the adapter. Those equal to the base are left out; any
other becomes a module of `modules_to_save`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import hosts, tree
from lora_jax.config import AdapterConfig
from lora_jax.errors import UserError, raise_all
from lora_jax.formats.matrices import open_matrices
from lora_jax.formats.peft_tensors import PREFIX
from lora_jax.formats.tensors import has_weights
from lora_jax.models.common import Model
from lora_jax.targets import HEAD

Tensors = dict[str, np.ndarray]


def with_saved_modules(
    file: Path,
    tensors: Tensors,
    known: Collection[str],
    config: AdapterConfig,
    params: Mapping,
    base: Model | None,
) -> tuple[Tensors, AdapterConfig]:
    """The tensors and config of an adapter whose saved embeddings and head are modules of
    `modules_to_save`, or left out where they equal the base. `known` are the keys that `config`
    explains. The weights of the base are in `params`, or in the files of `base`; if they are in
    neither, nothing is left out.

    Raises:
        UserError: another vocabulary than the model's; two values for one tied weight; a weight
            under an adapter that is not the base's; as `open_matrices`.
    """
    homes = _homes(params)
    plain = {name: f"{PREFIX}{name}.weight" for name in homes}
    plain = {name: key for name, key in plain.items() if key in tensors and key not in known}
    frozen = {name: f"{PREFIX}{name}.base_layer.weight" for name in homes}
    frozen = {name: key for name, key in frozen.items() if key in tensors}
    if not plain and not frozen:
        return tensors, config
    found = {**plain, **frozen}
    raise_all([text for name, key in found.items() for text in _sizes(name, tensors[key], homes)])
    values = _base_values({homes[name][0] for name in found}, params, base)
    same = {
        name
        for name, key in found.items()
        if (value := values.get(homes[name][0])) is not None
        and _is_same(tensors[key], value, homes[name][0], rounded=name in frozen)
    }
    if other := [name for name in frozen if values and name not in same]:
        raise UserError(
            f"{file}: {frozen[other[0]]}, which the adapter was trained over, is not the weight of "
            "the model; give the base that the adapter was trained on"
        )
    dropped = {key for name, key in found.items() if name in same}
    kept = {name: key for name, key in plain.items() if name not in same}
    rest = {key: value for key, value in tensors.items() if key not in dropped}
    if equal := sorted(set(plain) & same):
        hosts.note(f"{file} holds {' and '.join(equal)} as in the base; left out")
    if not kept:
        return rest, config
    hosts.note(
        f"{file} holds {' and '.join(sorted(kept))} whole, and not as the base has it: read as "
        "modules_to_save, which train if training goes on"
    )
    saved, tied = [*kept], tree.tied_embedding(params)
    if tied is not None and (one := {tree.dotted(tied[:-1]), HEAD[0]}) & {*kept}:
        rest |= _both(file, one, kept, same & {*plain}, rest)
        saved = [name for name in saved if name not in one] + [tree.dotted(tied[:-1])]
        config = dataclasses.replace(config, ensure_weight_tying=True)
    saved += [name for name in config.modules_to_save or () if name not in saved]
    return rest, dataclasses.replace(config, modules_to_save=sorted(saved))


def _both(
    file: Path, one: set[str], kept: Mapping[str, str], same: Collection[str], tensors: Tensors
) -> Tensors:
    """The tensors of an embedding and the head that is tied to it, equal, under both names."""
    first, *others = [tensors[kept[name]] for name in sorted(one & {*kept})]
    if one & {*same} or any(not np.array_equal(first, value) for value in others):
        raise UserError(
            f"{file} holds two values, {' and '.join(sorted(one))}, of one weight: the model ties "
            "them. Give a base whose tie_word_embeddings is false, with an lm_head of its own"
        )
    return {f"{PREFIX}{name}.weight": first for name in one}


def _homes(params: Mapping) -> dict[str, tuple[tree.Path, tuple[int, ...]]]:
    """Leaf and shape in the files of each embedding and of the output head, by module path."""
    homes = {}
    for path, leaf in tree.flatten(params).items():
        if path[-1] == "embedding":
            homes[tree.dotted(path[:-1])] = (path, tuple(leaf.shape))
        elif path == HEAD:
            homes[HEAD[0]] = (path, tuple(leaf.shape[::-1]))
    if (tied := tree.tied_embedding(params)) is not None:
        homes[HEAD[0]] = homes[tree.dotted(tied[:-1])]
    return homes


def _sizes(name: str, value: np.ndarray, homes: Mapping[str, Any]) -> list[str]:
    wanted = homes[name][1]
    if value.shape == wanted:
        return []
    if value.ndim != 2 or value.shape[1:] != wanted[1:]:
        return [f"{name} has shape {value.shape} in the adapter, and {wanted} in the model"]
    rows = len(value)
    return [
        f"{name} has {rows} rows in the adapter, and {wanted[0]} in the model: the vocabulary was "
        f"resized for it. In transformers, load the base, call resize_token_embeddings({rows}) and "
        "save_pretrained, and give that directory as the model, with the adapter's tokenizer"
    ]


def _is_same(stored: np.ndarray, value: np.ndarray, path: tree.Path, rounded: bool) -> bool:
    """Compare a tensor with the weight of the base, `rounded` to the tensor's dtype or as it is."""
    stored = stored.T if path[-1] == "kernel" else stored
    value = value.astype(stored.dtype) if rounded else value
    return np.array_equal(stored.astype(np.float32), value.astype(np.float32))


def _base_values(
    paths: set[tree.Path], params: Mapping, base: Model | None
) -> dict[tree.Path, np.ndarray]:
    """The weights of the base in float32; empty if they are not available."""
    leaves = tree.flatten(params)
    if not any(isinstance(leaves[path], jax.ShapeDtypeStruct) for path in paths):
        return {path: np.asarray(leaves[path], np.float32) for path in paths}
    if base is None or not has_weights(base.directory):
        return {}
    with open_matrices(base.directory, base) as read:
        return {path: read(path, ()) for path in paths}
