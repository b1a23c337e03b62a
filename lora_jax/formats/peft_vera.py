"""VeRA in PEFT's files.

    tree   model/layers/self_attn/q_proj/lambda_d                  (layers, r)
    file   base_model.model.model.layers.3.self_attn.q_proj.vera_lambda_d  (r,)
    tree   vera_a, vera_b                                          (in, r), (r, out)
    file   base_model.vera_A, base_model.vera_B                    (r, in), (out, r)

Written are the projections too (`save_projection`). In a file without them they are drawn again
from `projection_prng_key`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.adapters.vera import projections
from lora_jax.config import AdapterConfig
from lora_jax.errors import raise_all
from lora_jax.formats.peft_config import saved_modules, shortest_target_list
from lora_jax.formats.peft_config_reader import from_peft_config as read_settings
from lora_jax.formats.peft_forms import adapted_modules, is_parameter
from lora_jax.targets import Trainable
from lora_jax.tree import dotted, is_conv1d

_OWN = ("vera_dropout", "d_initial", "projection_prng_key", "save_projection", "init_weights")
_PROJECTIONS = {"vera_a": "base_model.vera_A", "vera_b": "base_model.vera_B"}


def problems(found: Trainable) -> list[str]:
    """List why PEFT has no form for these adapters."""
    odd = [
        dotted(target.path)
        for target in found.targets
        if is_parameter(target) or target.leaf == "embedding" or target.columns is not None
    ]
    if not odd:
        return []
    return [
        f"method=vera: in PEFT it is for linear layers only, and these are none: {', '.join(odd)}; "
        "leave them out of target_modules, or export with --format hf"
    ]


def to_peft_config(found: Trainable, params: Mapping, base_model: str, task_type: str) -> dict:
    """Return the fields of adapter_config.json."""
    config = found.config
    return {
        "peft_type": "VERA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "target_modules": shortest_target_list(set(adapted_modules(found)), params),
        "projection_prng_key": config.projection_prng_key,
        "save_projection": True,
        "vera_dropout": config.dropout,
        "d_initial": config.d_initial,
        "bias": "vera_only" if config.bias == "lora_only" else config.bias,
        "modules_to_save": saved_modules(config, params),
        "fan_in_fan_out": any(is_conv1d(target.path) for target in found.targets),
        "init_weights": True,
    }


def from_peft_config(content: Mapping[str, Any], params: Mapping) -> AdapterConfig:
    """Return the config of the same adapters on the model of `params`.

    Raises:
        UserError: fields that are missing, of the wrong type, or active and not supported; what
            `find_trainable` refuses.
    """
    key, start = content.get("projection_prng_key", 0), content.get("d_initial", 0.1)
    dropout = content.get("vera_dropout") or 0.0
    wrong = []
    if type(key) is not int:
        wrong.append(f"projection_prng_key={key!r} is not an integer")
    wrong += [
        f"{name}={value!r} is not a number"
        for name, value in (("vera_dropout", dropout), ("d_initial", start))
        if type(value) not in (int, float)
    ]
    raise_all(wrong)
    settings = {name: value for name, value in content.items() if name not in _OWN}
    settings |= {
        "lora_dropout": dropout,
        "lora_alpha": AdapterConfig().alpha,  # VeRA has none
        "bias": "lora_only" if content.get("bias") == "vera_only" else content.get("bias"),
    }
    config = read_settings(settings, params, method="vera")
    # A finished adapter may have started anywhere.
    start = float(start) if start > 0 else AdapterConfig().d_initial
    return dataclasses.replace(config, d_initial=start, projection_prng_key=key)


def with_projections(tensors: dict[str, np.ndarray], found: Trainable) -> dict[str, np.ndarray]:
    """Add the projections to the tensors of a file that was written without them."""
    if any(key in tensors for key in _PROJECTIONS.values()):
        return tensors
    drawn = projections(found.config.projection_prng_key, found.shared)
    return tensors | {_PROJECTIONS[name]: matrix.T for name, matrix in drawn.items()}
