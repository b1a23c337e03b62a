"""`AdapterConfig` -> PEFT's adapter_config.json.

PEFT names modules by suffix or regex as here, but for modules_to_save, whose entries are the end of
any path: there `norm` is `input_layernorm` too. Written are full paths, which both read alike.
Routers and stacks of experts are modules here and parameters there, in `target_parameters`. PEFT
warns that patterns for them match no module, and applies them.
"""

import re
from collections.abc import Mapping

from lora_jax import tree
from lora_jax.config import AdapterConfig
from lora_jax.formats.peft_forms import adapted_modules, is_parameter, parameter_name
from lora_jax.formats.peft_modules import (
    is_inside,
    module_names,
    outermost,
    parameters,
    tied_embedding_name,
    weight_names,
)
from lora_jax.targets import HEAD, Trainable
from lora_jax.targets.match import matcher


def to_peft_config(
    found: Trainable, params: Mapping, base_model: str, task_type: str = "CAUSAL_LM"
) -> dict:
    """Return the fields of adapter_config.json, for adapters of whole matrices. Patterns are
    written out per module: PEFT takes the first pattern that matches, and sorting would reorder
    them.

    With parameters among the targets dropout is written as zero: PEFT has none for them, and loads
    no file that asks for it.
    """
    config, adapted = found.config, adapted_modules(found)
    as_parameters = {
        name: parameter_name(name, target)
        for target in found.targets
        if is_parameter(target)
        for name in target.names
        if name in adapted
    }
    named = {as_parameters.get(name, name): value for name, value in adapted.items()}
    embedding = tied_embedding_name(params)
    if config.ensure_weight_tying and embedding in adapted:
        named[HEAD[0]] = adapted[embedding]  # PEFT looks rank and alpha of the head up by its name
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _integral(config.alpha),
        "lora_dropout": 0.0 if as_parameters else config.dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "target_modules": shortest_target_list(set(adapted) - set(as_parameters), params),
        "target_parameters": _shortest_parameter_list(set(as_parameters.values()), params),
        "rank_pattern": {name: rank for name, (rank, _) in named.items() if rank != config.rank},
        "alpha_pattern": {
            name: _integral(alpha) for name, (_, alpha) in named.items() if alpha != config.alpha
        },
        "bias": config.bias,
        "lora_bias": False,
        "modules_to_save": saved_modules(config, params),
        "trainable_token_indices": list(found.rows[0].indices) if found.rows else None,
        "ensure_weight_tying": bool(config.ensure_weight_tying),
        "fan_in_fan_out": any(tree.is_conv1d(target.path) for target in found.targets),
        "init_lora_weights": True,
    }


def shortest_target_list(adapted: set[str], params: Mapping) -> list[str]:
    """Return module names such as q_proj when they select exactly the adapted modules, full paths
    otherwise and in the tower of a model that reads images, where other modules have these names.
    """
    short = sorted({name.rpartition(".")[2] for name in adapted})
    if any(tree.in_tower(name) for name in adapted):
        return sorted(adapted)
    same = {*filter(matcher(short), weight_names(params))} == adapted
    return short if same else sorted(adapted)


def _shortest_parameter_list(adapted: set[str], params: Mapping) -> list[str] | None:
    """Return paths from the layer on, such as mlp.experts.down_proj, when they select exactly the
    adapted parameters, full paths otherwise.
    """
    short = sorted({re.sub(r".*?\.\d+\.", "", name, count=1) for name in adapted})
    same = {*filter(matcher(short), parameters(params))} == adapted
    return (short if same else sorted(adapted)) or None


def saved_modules(config: AdapterConfig, params: Mapping) -> list[str] | None:
    entries = config.modules_to_save
    if not entries:
        return None
    names = {*filter(matcher(entries), module_names(params))}
    embedding = tied_embedding_name(params)
    if config.ensure_weight_tying and embedding is not None:
        names = {embedding if name == HEAD[0] else name for name in names}
    return outermost(names)


def saved_problems(config: AdapterConfig, params: Mapping) -> list[str]:
    """List the modules that PEFT would train in full next to those of modules_to_save."""
    saved = saved_modules(config, params) or []
    more = {name for name in module_names(params) if name.endswith(tuple(saved))}
    return [
        f"modules_to_save={config.modules_to_save!r}: PEFT takes a name for the end of any other, "
        f"and saves {name} too; name both, or export with --format hf (export.peft=false, "
        "export.merged=true)"
        for name in outermost({name for name in more if not is_inside(name, saved)})
    ]


def _integral(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
