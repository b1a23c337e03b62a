"""PEFT adapter directories <-> adapter trees.

    tree   model/layers/self_attn/q_proj/lora_a                              (layers, in, rank)
    file   base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight    (rank, in)

`adapter_config.json` (`peft_config`) and `adapter_model.safetensors` (`peft_tensors`) are PEFT's;
`lora_jax.json` holds what PEFT has no field for. Adapters of an init that takes its part out of the
base are written as those of twice the rank over the original base.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import save_file

from lora_jax import adapters as methods
from lora_jax import tree
from lora_jax.adapters.lora import as_plain
from lora_jax.config import AdapterConfig, UserError, raise_all
from lora_jax.formats.peft_config import from_peft_config, to_peft_config
from lora_jax.formats.peft_tensors import (
    adapted_modules,
    check,
    copies,
    pack,
    unpack,
    with_one_scale,
    within_limits,
)
from lora_jax.formats.safetensors import copy_side_files, new_directory, open_tensors, write_json
from lora_jax.targets import CHANGING_INITS, Trainable, find_trainable

_PROFILES = ("vllm",)


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
    profile: str | None = None,
) -> None:
    """Write a PEFT adapter directory; equal adapters give equal bytes.

    `params` may hold arrays or shapes. `source` is the base model's directory, whose tokenizer is
    copied; `chat_template` replaces its template; `extra` joins lora_jax.json. With `profile`
    "vllm" all modules get one rank and one alpha, as vLLM reads no patterns.

    Raises:
        UserError: what PEFT has no form for (`peft_problems`); with a profile also what its reader
            cannot load; an unknown profile.
    """
    found = find_trainable(params, config)
    if profile is not None and profile not in _PROFILES:
        raise UserError(f"profile={profile!r} is not one of: {', '.join(_PROFILES)}")
    raise_all(peft_problems(found) + (_unservable(found) if profile else []))
    leaves: Any = tree.flatten(jax.device_get(adapters))
    if config.init in CHANGING_INITS:
        leaves, found = within_limits(*as_plain(leaves, found))
    if profile:
        leaves, found = with_one_scale(leaves, found)
    with new_directory(target) as temporary:
        save_file(
            pack(leaves, found),
            temporary / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        write_json(temporary / "adapter_config.json", to_peft_config(found, params, base_model))
        write_json(temporary / "lora_jax.json", {"base_model": base_model, **(extra or {})})
        if source is not None:
            copy_side_files(source, temporary, chat_template)
            (temporary / "generation_config.json").unlink(missing_ok=True)


def peft_problems(found: Trainable) -> list[str]:
    """Why these adapters have no form in PEFT, each with what to do; empty if they have one."""
    config = found.config
    if config.method == "full":
        return ["method=full trains the model itself, which is no adapter; use --format hf"]
    tied = config.ensure_weight_tying and any(t.leaf == "embedding" for t in found.targets)
    if config.use_dora and tied:
        return [
            "use_dora=true and ensure_weight_tying=true: PEFT gives embedding and output head sizes"
            " of their own, so that they part; export with --format hf, or leave one out"
        ]
    return []


def serving_problems(found: Trainable) -> list[str]:
    """Why vLLM cannot load the PEFT directory of these adapters, or would get other numbers, each
    with what to do; empty if it serves them rightly.
    """
    config, problems = found.config, _unservable(found)
    power = 0.5 if config.use_rslora else 1.0
    usual = config.alpha / config.rank**power
    if any(
        rank > config.rank or not math.isclose(alpha / rank**power, usual)
        for rank, alpha in adapted_modules(found).values()
    ):
        problems.append(
            "vLLM does not read rank_pattern and alpha_pattern and would scale wrongly; export "
            "with --profile vllm, which folds them in"
        )
    return problems


def _unservable(found: Trainable) -> list[str]:
    config = found.config
    given = {
        "use_dora": config.use_dora,
        "bias": None if config.bias == "none" else config.bias,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
    }
    return [
        f"vLLM cannot load adapters with {name}={value!r}; export a merged model with --format hf"
        for name, value in given.items()
        if value
    ]


def read_config(directory: Path, params: Mapping) -> AdapterConfig:
    """The `AdapterConfig` of a PEFT directory, by PEFT's rules.

    Raises:
        UserError: missing or damaged files, an adapter that is not LoRA, active fields that are not
            supported; what `find_trainable` refuses.
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
    try:
        return from_peft_config(content, params)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


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
    they shall adapt; `params` may hold arrays or shapes.

    Raises:
        UserError: as `read_config`; and tensors that are missing, unexpected, mis-shaped, not
            finite or contradictory, all of them listed.
    """
    config = read_config(directory, params)
    file = directory / "adapter_model.safetensors"
    try:
        found = find_trainable(params, config)
        shapes = tree.flatten(methods.shapes(params, config))
    except UserError as error:
        raise UserError(f"{directory / 'adapter_config.json'}: {error}") from error
    with open_tensors(file) as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    for key in copies(tensors, found):
        del tensors[key]
    check(tensors, found, f"{file} does not fit the model and its adapter_config.json")
    return tree.unflatten(unpack(tensors, found, shapes)), config
