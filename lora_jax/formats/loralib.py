"""State dicts of loralib (github.com/microsoft/LoRA), saved as a safetensors file -> adapters.

    file   model.layers.3.self_attn.q_proj.lora_A (r, in), .lora_B (out, r), .bias (out,)
           model.embed_tokens.lora_A (r, vocab), .lora_B (d, r)

The file is what `loralib.lora_state_dict` gives. It holds ranks and no alpha.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from lora_jax import tree
from lora_jax.config import AdapterConfig, expand
from lora_jax.errors import UserError, nearest, raise_all
from lora_jax.formats.peft_digest import find_change
from lora_jax.formats.peft_tensors import PREFIX, unpack
from lora_jax.formats.tensors import read_floats
from lora_jax.sharding import place_adapters
from lora_jax.targets import HEAD, find_trainable

# What says something that these files cannot hold.
_ABSENT = ("use_rslora", "use_dora", "modules_to_save", "trainable_token_indices")

Modules = dict[str, dict[str, np.ndarray]]  # by module path: lora_A, lora_B, bias


def read_loralib(
    file: str | Path, params: Mapping, config: AdapterConfig
) -> tuple[dict, AdapterConfig]:
    """Read adapters (float32) and their config from a state dict of loralib. The update of a module
    is scaled by alpha / r: alpha (and alpha_pattern) come from `config`, every r from the file, and
    so do target_modules, rank, rank_pattern and bias.

    A module path may lack the first names of the model's, or have more, as long as one module fits.

    Raises:
        UserError: settings in `config` that the file cannot have; keys that are unknown or fit no
            module or several; a missing partner; wrong shapes; numbers that are not finite; the
            grouped matrices of MergedLinear; all of them listed. And what `find_trainable` refuses.
    """
    file = expand(file)
    raise_all(
        [
            f"{name}={getattr(config, name)!r}, but {file} holds plain LoRA (loralib); leave it out"
            for name in _ABSENT
            if getattr(config, name)
        ]
    )
    tensors, metadata = read_floats(file)
    find_change(file, tensors, metadata)  # of these files, notes alone
    weights, biases = _weights(params), _biases(params)
    places = {"lora_A": weights, "lora_B": weights, "bias": biases}
    modules, problems = _by_module(tensors, places)
    problems += [p for name, parts in modules.items() for p in _problems(name, parts, weights)]
    problems += [
        f"{key} holds numbers that are not finite"
        for key, array in tensors.items()
        if not np.isfinite(array.astype(np.float32)).all()
    ]
    kind, wanted = _bias(modules, biases)
    for name in wanted:
        shape = modules.get(name, {}).get("bias", np.zeros(0)).shape
        if shape != biases[name]:
            found = f"has shape {shape}" if "bias" in modules.get(name, {}) else "is missing"
            problems.append(f"{name}.bias {found}, expected {biases[name]}")
    if not any("lora_A" in parts for parts in modules.values()):
        problems.append("no lora_A in it")
    if problems:
        raise UserError(f"{file} does not fit the model:\n  " + tree.summarize(problems))
    config = _config(modules, params, config, kind)
    leaves = unpack(_as_peft(modules, params), find_trainable(params, config))
    return place_adapters(tree.unflatten(leaves), params), config


def _weights(params: Mapping) -> dict[str, tuple[int, ...]]:
    """Return the shapes (in, out) or (vocab, d) of what can have an adapter, by module path."""
    found = {
        name: tuple(leaf.shape[-2:])
        for path, leaf in tree.flatten(params).items()
        if path[-1] in ("kernel", "embedding")
        for name in tree.slice_names(path[:-1], leaf.shape)
    }
    if (tied := tree.tied_embedding(params)) is not None:
        found[HEAD[0]] = found[tree.dotted(tied[:-1])][::-1]
    return found


def _biases(params: Mapping) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(leaf.shape[-1:])
        for path, leaf in tree.flatten(params).items()
        if path[-1] == "bias"
        for name in tree.slice_names(path[:-1], leaf.shape)
    }


def _by_module(
    tensors: Mapping[str, np.ndarray], places: Mapping[str, Collection[str]]
) -> tuple[Modules, list[str]]:
    """Return the tensors by the model's module paths, and the keys for which there is none.
    `places` has the modules that can have each part.
    """
    modules: Modules = {}
    problems = []
    for key, array in tensors.items():
        written, _, part = key.rpartition(".")
        if part not in places or not written:
            problems.append(f"{key} is none of: {', '.join(f'MODULE.{p}' for p in places)}")
            continue
        names = places[part]
        fitting = [written] if written in names else [n for n in names if _ends_alike(written, n)]
        if len(fitting) != 1:
            problems.append(
                f"{key} fits several modules: {', '.join(fitting[:3])}, ..."
                if fitting
                else f"{key} fits no module that can have it.{nearest(written, names)}"
            )
        elif part in modules.setdefault(fitting[0], {}):
            problems.append(f"{key} is a second {part} of {fitting[0]}")
        else:
            modules[fitting[0]][part] = array
    return modules, problems


def _ends_alike(one: str, other: str) -> bool:
    return one.endswith(f".{other}") or other.endswith(f".{one}")


def _problems(
    name: str, parts: Mapping[str, np.ndarray], weights: Mapping[str, tuple[int, ...]]
) -> Iterable[str]:
    """Yield problems of the pair of one module."""
    pair = {part: parts[part].shape for part in ("lora_A", "lora_B") if part in parts}
    if len(pair) == 1:
        (there,) = pair
        yield f"{name} has a {there} and no {'lora_B' if there == 'lora_A' else 'lora_A'}"
    if len(pair) < 2:
        return
    a, b = pair["lora_A"], pair["lora_B"]
    rows, columns = weights[name]
    groups = a[0] // b[1] if len(a) == len(b) == 2 and b[1] else 0
    if groups > 1 and a == (groups * b[1], rows):
        yield (
            f"{name}: lora_A {a} and lora_B {b} are {groups} groups of loralib's MergedLinear, "
            f"which is not supported; save a lora_A and a lora_B of rank {b[1]} for each projection"
        )
    elif len(a) != 2 or a != (a[0], rows) or b != (columns, a[0]) or not a[0]:
        yield f"{name}: lora_A {a} and lora_B {b}, expected (r, {rows}) and ({columns}, r)"


def _bias(modules: Modules, biases: Mapping[str, tuple[int, ...]]) -> tuple[str, list[str]]:
    """Return the kind of `bias` that the file was saved with, and the modules whose biases it must
    hold then.
    """
    given = {name for name, parts in modules.items() if "bias" in parts}
    adapted = {name for name, parts in modules.items() if "lora_A" in parts}
    if not given:
        return "none", []
    kind = "lora_only" if given <= adapted else "all"
    return kind, sorted(name for name in biases if kind == "all" or name in adapted)


def _config(modules: Modules, params: Mapping, config: AdapterConfig, bias: str) -> AdapterConfig:
    ranks = {name: len(parts["lora_A"]) for name, parts in modules.items() if "lora_A" in parts}
    rank = max(Counter(sorted(ranks.values())).items(), key=lambda item: item[1])[0]
    tied = tree.tied_embedding(params)
    one_weight = tied is not None and {HEAD[0], tree.dotted(tied[:-1])} & set(ranks)
    if one_weight and HEAD[0] in ranks and config.ensure_weight_tying:
        raise UserError(
            f"ensure_weight_tying=true, but the file adapts {HEAD[0]} by itself; set it to false"
        )
    return dataclasses.replace(
        config,
        rank=rank,
        rank_pattern={name: own for name, own in sorted(ranks.items()) if own != rank},
        target_modules=sorted(ranks),
        exclude_modules=None,
        layers_to_transform=None,
        init="default",
        bias=bias,
        ensure_weight_tying=bool(config.ensure_weight_tying) if one_weight else None,
    )


def _as_peft(modules: Modules, params: Mapping) -> dict[str, np.ndarray]:
    """Return the same tensors under PEFT's names."""
    embeddings = {tree.dotted(p[:-1]) for p in tree.flatten(params) if p[-1] == "embedding"}
    tensors = {}
    for name, parts in modules.items():
        names = {
            "lora_A": "lora_embedding_A" if name in embeddings else "lora_A.weight",
            "lora_B": "lora_embedding_B" if name in embeddings else "lora_B.weight",
            "bias": "base_layer.bias" if "lora_A" in parts else "bias",
        }
        tensors |= {f"{PREFIX}{name}.{names[part]}": array for part, array in parts.items()}
    return tensors
