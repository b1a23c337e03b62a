"""Virtual tokens in PEFT's files: prompt and prefix tuning.

prompt  prompt_embeddings (p, d)
prefix  prompt_embeddings (p, 2 * layers * k * h), of every layer its keys, then its values
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.adapters import shapes
from lora_jax.config import AdapterConfig
from lora_jax.errors import UserError, raise_all
from lora_jax.targets import Trainable

KINDS = {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
TENSOR = "prompt_embeddings"
# Fields that are read, and those that say nothing about the numbers of a finished adapter.
_KNOWN = frozenset(
    """
    peft_type num_virtual_tokens token_dim num_layers num_attention_heads base_model_name_or_path
    revision task_type inference_mode auto_mapping peft_version runtime_config
    encoder_hidden_size init_weights prompt_tuning_init prompt_tuning_init_text
    tokenizer_name_or_path tokenizer_kwargs
    """.split()
)


def problems(config: AdapterConfig) -> list[str]:
    """List why PEFT has no form for these virtual tokens."""
    if config.prefix_gate:
        return [
            "prefix_gate=true: PEFT's prefixes have no gate, and without it the model is another; "
            "leave it out to train a prefix for PEFT"
        ]
    return []


def to_peft_config(found: Trainable, base_model: str, task_type: str) -> dict[str, Any]:
    """Return the fields of adapter_config.json. Where the fields of heads are null, PEFT reads them
    from the base model's config.
    """
    config = found.config
    shape = next(iter(found.virtual.values()))
    kind = {method: kind for kind, method in KINDS.items()}[config.method]
    content: dict[str, Any] = {
        "peft_type": kind,
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": shape[-2],
        "num_transformer_submodules": 1,
    }
    if kind == "PROMPT_TUNING":  # the start of a trained prompt does not matter
        return content | {"token_dim": shape[-1], "prompt_tuning_init": "RANDOM"}
    return content | {
        "token_dim": None,
        "num_attention_heads": None,
        "num_layers": shape[0],
        "prefix_projection": False,
    }


def pack(adapters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the tensor of an adapter file."""
    if TENSOR in adapters:
        return {TENSOR: np.asarray(adapters[TENSOR], np.float32)}
    pair = np.stack([adapters["prefix_keys"], adapters["prefix_values"]], axis=1)
    layers, _, count, width = pair.shape  # (layers, 2, p, k * h)
    flat = pair.transpose(2, 0, 1, 3).reshape(count, layers * 2 * width)
    return {TENSOR: np.ascontiguousarray(flat, np.float32)}


def from_peft_config(content: Mapping[str, Any], params: Mapping) -> AdapterConfig:
    """Return the config of a PEFT directory, checked against the model.

    Raises:
        UserError: fields that are missing, not supported, or contradict the model.
    """
    method = KINDS[content["peft_type"]]
    count = content.get("num_virtual_tokens")
    if not isinstance(count, int) or isinstance(count, bool):
        raise UserError(f"num_virtual_tokens={count!r} must be a number of tokens")
    wrong = [
        f"{name}={value!r} is not supported"
        for name, value in content.items()
        if name not in _KNOWN and value not in (None, False, {}, [])
        if not (name == "num_transformer_submodules" and value == 1)
    ]
    config = AdapterConfig(method=method, num_virtual_tokens=count, prompt_init="random")
    shape = next(iter(shapes(params, config).values())).shape
    names = ("token_dim",) if method == "prompt" else ("num_layers", "token_dim")
    for name, mine in zip(names, (shape[0], shape[-1])[-len(names) :], strict=True):
        given = content.get(name)
        if given is not None and given != mine:
            wrong.append(f"{name}={given!r}, and the model has {mine}")
    raise_all(wrong)
    return config


def unpack(tensors: Mapping[str, np.ndarray], found: Trainable, where: str) -> dict[str, Any]:
    """Return the adapters in float32.

    Raises:
        UserError: a tensor that is missing, not known, of another shape, or not finite.
    """
    shape = next(iter(found.virtual.values()))
    *layers, count, width = shape
    expected = (count, math.prod(2 * n for n in layers) * width)
    wrong = [f"unexpected {name}" for name in sorted(tensors) if name != TENSOR]
    if TENSOR not in tensors:
        wrong.append(f"missing {TENSOR} {expected}")
    elif tensors[TENSOR].shape != expected:
        wrong.append(f"{TENSOR} has shape {tensors[TENSOR].shape}, expected {expected}")
    elif not np.isfinite(tensors[TENSOR].astype(np.float32)).all():
        wrong.append(f"{TENSOR} holds numbers that are not finite")
    if wrong:
        raise UserError(f"{where}: " + "; ".join(wrong))
    flat = tensors[TENSOR].astype(np.float32)
    if not layers:
        return {TENSOR: flat}
    pair = flat.reshape(count, *layers, 2, width).transpose(2, 1, 0, 3)
    return {"prefix_keys": pair[0], "prefix_values": pair[1]}
