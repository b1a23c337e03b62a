"""PEFT adapter directories <-> adapter trees.

    tree   model/layers/self_attn/q_proj/lora_a                              (layers, in, rank)
    file   base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight    (rank, in)

`adapter_config.json` and `adapter_model.safetensors` are PEFT's; `lora_jax.json` holds what PEFT
has no field for.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from lora_jax import tree
from lora_jax.config import AdapterConfig, UserError
from lora_jax.formats.safetensors import copy_side_files, new_directory, open_tensors, write_json

_PREFIX = "base_model.model."
_PARTS = {"lora_a": "lora_A", "lora_b": "lora_B"}

# Fields of adapter_config.json that are read, and those that say nothing about the numbers.
_READ = frozenset(
    """
    peft_type r lora_alpha lora_dropout use_rslora target_modules exclude_modules
    layers_to_transform rank_pattern alpha_pattern
    """.split()
)
_INERT = frozenset(
    """
    base_model_name_or_path revision task_type inference_mode auto_mapping peft_version
    megatron_core qalora_group_size layers_pattern ensure_weight_tying runtime_config
    """.split()
)
# Inits after which PEFT adapts the base as it stands; the others (pissa, olora, ...) change it
# again at every load.
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica", "lora_ga")
_HARMLESS_VALUES = (None, False, [], {}, 0, "", "none")


def write_adapter(
    target: Path,
    adapters: Mapping,
    params: Mapping,
    config: AdapterConfig,
    *,
    base_model: str,
    source: Path | None = None,
    chat_template: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a PEFT adapter directory; equal adapters give equal bytes.

    `params` may hold arrays or shapes. `source` is the base model's directory, whose tokenizer is
    copied; `chat_template` replaces its template; `extra` joins lora_jax.json.
    """
    targets = tree.find_targets(params, config)
    flat = tree.flatten(jax.device_get(adapters))
    tensors = {}
    for found in targets:
        for i, (name, rank) in enumerate(zip(found.names, found.ranks, strict=True)):
            if rank:
                a, b = (flat[(*found.path, part)] for part in ("lora_a", "lora_b"))
                a, b = (a[i], b[i]) if found.stacked else (a, b)
                tensors[f"{_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(a[:, :rank].T)
                tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b[:rank].T)
    with new_directory(target) as temporary:
        save_file(
            dict(sorted(tensors.items())),
            temporary / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        write_json(
            temporary / "adapter_config.json", _to_peft_config(targets, params, config, base_model)
        )
        write_json(temporary / "lora_jax.json", {"base_model": base_model, **(extra or {})})
        if source is not None:
            copy_side_files(source, temporary, chat_template)
            (temporary / "generation_config.json").unlink(missing_ok=True)


def _to_peft_config(
    targets: Sequence[tree.Target], params: Mapping, config: AdapterConfig, base_model: str
) -> dict:
    """Patterns are written out per module: PEFT takes the first pattern that matches, and sorting
    would reorder them.
    """
    adapted = {
        name: (rank, alpha)
        for found in targets
        for name, rank, alpha in zip(found.names, found.ranks, found.alphas, strict=True)
        if rank
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _integral(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": _shortest_target_list(set(adapted), params),
        "rank_pattern": {name: rank for name, (rank, _) in adapted.items() if rank != config.rank},
        "alpha_pattern": {
            name: _integral(alpha) for name, (_, alpha) in adapted.items() if alpha != config.alpha
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _shortest_target_list(adapted: set[str], params: Mapping) -> list[str]:
    """Module names such as q_proj when they select exactly the adapted modules, full paths
    otherwise.
    """
    everything = {
        name
        for path, leaf in tree.flatten(params).items()
        for name in tree.slice_names(path[:-1], leaf.shape)
    }
    short = sorted({name.rpartition(".")[2] for name in adapted})
    return (
        short
        if {name for name in everything if tree.matches(name, short)} == adapted
        else sorted(adapted)
    )


def _integral(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def read_config(directory: Path, params: Mapping) -> AdapterConfig:
    """The `AdapterConfig` of a PEFT directory. Entries of target_modules that match nothing have no
    effect in PEFT and are left out.

    Raises:
        UserError: missing or damaged files, an adapter that is not LoRA, or active fields that are
            not supported.
    """
    file = directory / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{directory} is no PEFT adapter directory: it has no adapter_config.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        kind = content.get("peft_type") if isinstance(content, dict) else content
        raise UserError(f"{file}: peft_type={kind!r} is not supported, only 'LORA'")
    active = [
        f"{name}={value!r}"
        for name, value in content.items()
        if name not in _READ | _INERT
        and value not in (_PLAIN_INITS if name == "init_lora_weights" else _HARMLESS_VALUES)
    ]
    active += [f"{name}={content[name]!r}" for name in ("layers_pattern",) if content.get(name)]
    missing = [name for name in ("r", "target_modules") if content.get(name) is None]
    if active or missing:
        raise UserError(
            f"{file}: "
            + "; ".join(
                [
                    *(f"not supported: {text}" for text in active),
                    *(f"missing: {name}" for name in missing),
                ]
            )
        )
    names = [
        name
        for path, leaf in tree.flatten(params).items()
        for name in tree.slice_names(path[:-1], leaf.shape)
    ]
    try:
        return AdapterConfig(
            rank=int(content["r"]),
            alpha=float(content.get("lora_alpha", 8)),
            dropout=float(content.get("lora_dropout", 0.0)),
            use_rslora=bool(content.get("use_rslora", False)),
            target_modules=_effective(content["target_modules"], names),
            exclude_modules=_effective(content.get("exclude_modules"), names) or None,
            layers_to_transform=content.get("layers_to_transform"),
            rank_pattern={
                key: int(value) for key, value in (content.get("rank_pattern") or {}).items()
            },
            alpha_pattern={
                key: float(value) for key, value in (content.get("alpha_pattern") or {}).items()
            },
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} has a value of the wrong type: {error}") from error


def _effective(spec: Any, names: Sequence[str]) -> Any:
    if not isinstance(spec, list):
        return spec
    return [entry for entry in spec if any(tree.matches(name, [entry]) for name in names)] or spec


def read_fingerprint(directory: Path) -> dict[str, str]:
    """What the adapter was trained on, by `lora_jax.formats.fingerprint`; empty for adapters of
    other tools.

    Raises:
        UserError: lora_jax.json is damaged.
    """
    file = directory / "lora_jax.json"
    if not file.is_file():
        return {}
    try:
        stored = json.loads(file.read_text(encoding="utf-8")).get("fingerprint", {})
        return {str(name): str(digest) for name, digest in stored.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error}") from error


def read_adapter(directory: Path, params: Mapping) -> tuple[dict, AdapterConfig]:
    """Adapters (float32) and their config from a PEFT directory, checked against the model that
    they shall adapt.

    Raises:
        UserError: as `read_config`; and tensors that are missing, unexpected or mis-shaped, all of
            them listed.
    """
    config = read_config(directory, params)
    targets = tree.find_targets(params, config)
    file = directory / "adapter_model.safetensors"
    with open_tensors(file) as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    # PEFT saves the frozen weight of an adapted head beside its adapter; it is the base's own.
    for name in (name for found in targets for name in found.names):
        tensors.pop(f"{_PREFIX}{name}.base_layer.weight", None)
    expected = {}
    for found in targets:
        for name, rank in zip(found.names, found.ranks, strict=True):
            if rank:
                expected[f"{_PREFIX}{name}.lora_A.weight"] = (rank, found.shape[0])
                expected[f"{_PREFIX}{name}.lora_B.weight"] = (found.shape[1], rank)
    problems = [
        f"missing {name} {shape}" for name, shape in expected.items() if name not in tensors
    ]
    problems += [
        f"unexpected {name} {array.shape}"
        for name, array in tensors.items()
        if name not in expected
    ]
    problems += [
        f"{name} has shape {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems += [
        f"{name} holds numbers that are not finite"
        for name, x in tensors.items()
        if not np.isfinite(x.astype(np.float32)).all()
    ]
    if problems:
        raise UserError(
            f"{file} does not fit the model and its adapter_config.json:\n  "
            + tree.summarize(problems)
        )
    adapters = {}
    for found in targets:
        for part, columns_first in (("lora_a", False), ("lora_b", True)):
            rows = []
            for name, rank in zip(found.names, found.ranks, strict=True):
                slot = np.zeros(
                    (found.rank, found.shape[1]) if columns_first else (found.shape[0], found.rank),
                    np.float32,
                )
                if rank:
                    value = tensors[f"{_PREFIX}{name}.{_PARTS[part]}.weight"].astype(np.float32).T
                    slot[tuple(slice(n) for n in value.shape)] = value
                rows.append(slot)
            adapters[(*found.path, part)] = np.stack(rows) if found.stacked else rows[0]
    return tree.unflatten(adapters), config
