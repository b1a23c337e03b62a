"""PEFT's adapter_config.json <-> `AdapterConfig`.

PEFT names modules by suffix or regex as here, but for modules_to_save, whose entries are the end of
any path: there `norm` is `input_layernorm` too. Written are full paths, which both read alike.

Routers and stacks of experts are modules here and parameters there, in `target_parameters`: ends of
paths, to which exclude_modules and layers_to_transform do not apply. PEFT warns that patterns for
them match no module, and applies them.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_jax import tree
from lora_jax.config import AdapterConfig, quoted
from lora_jax.errors import UserError, raise_all
from lora_jax.formats.peft_tensors import adapted_modules, is_parameter, parameter_name
from lora_jax.targets import HEAD, Trainable, find_trainable
from lora_jax.targets.match import endings, matcher, matches, pattern_values

# Fields that are read, and those that say nothing about the numbers.
_READ = frozenset(
    """
    peft_type r lora_alpha lora_dropout use_rslora use_dora target_modules target_parameters
    exclude_modules layers_to_transform rank_pattern alpha_pattern bias modules_to_save
    trainable_token_indices ensure_weight_tying
    """.split()
)
_INERT = frozenset(  # PEFT looks by itself where fan_in_fan_out holds
    """
    base_model_name_or_path revision task_type inference_mode auto_mapping peft_version
    megatron_core qalora_group_size layers_pattern runtime_config fan_in_fan_out
    """.split()
)
# Inits after which PEFT adapts the base as it stands; the others change it again at every load.
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica", "lora_ga")
_CONVERTIBLE_INITS = ("pissa", "olora", "corda")
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "r": ((int,), "an integer"),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), ((int, float), "a number")),
    **dict.fromkeys(("use_rslora", "use_dora", "ensure_weight_tying"), ((bool,), "true or false")),
    **dict.fromkeys(("target_modules", "exclude_modules"), ((str, list), "a string or a list")),
    **dict.fromkeys(("target_parameters", "modules_to_save"), ((list,), "a list")),
    "layers_to_transform": ((int, list), "an integer or a list"),
    "layers_pattern": ((str, list), "a string or a list"),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ((dict,), "an object")),
    "trainable_token_indices": ((list, dict), "a list or an object"),
    "bias": ((str,), "a string"),
}
_OF_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
_HARMLESS_VALUES = (None, False, [], {}, 0, "", "none")


def to_peft_config(
    found: Trainable, params: Mapping, base_model: str, task_type: str = "CAUSAL_LM"
) -> dict:
    """The fields of adapter_config.json, of whole matrices only. Patterns are written out per
    module: PEFT takes the first pattern that matches, and sorting would reorder them.

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
    embedding = _embedding_name(params)
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
        "target_modules": _shortest_target_list(set(adapted) - set(as_parameters), params),
        "target_parameters": _shortest_parameter_list(set(as_parameters.values()), params),
        "rank_pattern": {name: rank for name, (rank, _) in named.items() if rank != config.rank},
        "alpha_pattern": {
            name: _integral(alpha) for name, (_, alpha) in named.items() if alpha != config.alpha
        },
        "bias": config.bias,
        "lora_bias": False,
        "modules_to_save": _saved_modules(config, params),
        "trainable_token_indices": list(found.rows[0].indices) if found.rows else None,
        "ensure_weight_tying": bool(config.ensure_weight_tying),
        "fan_in_fan_out": any(tree.is_conv1d(target.path) for target in found.targets),
        "init_lora_weights": True,
    }


def _shortest_target_list(adapted: set[str], params: Mapping) -> list[str]:
    """Module names such as q_proj when they select exactly the adapted modules, full paths
    otherwise.
    """
    short = sorted({name.rpartition(".")[2] for name in adapted})
    same = {*filter(matcher(short), _weight_names(params))} == adapted
    return short if same else sorted(adapted)


def _shortest_parameter_list(adapted: set[str], params: Mapping) -> list[str] | None:
    """Paths from the layer on, such as mlp.experts.down_proj, when they select exactly the adapted
    parameters, full paths otherwise.
    """
    short = sorted({re.sub(r".*?\.\d+\.", "", name, count=1) for name in adapted})
    same = {*filter(matcher(short), _parameters(params))} == adapted
    return (short if same else sorted(adapted)) or None


def _saved_modules(config: AdapterConfig, params: Mapping) -> list[str] | None:
    entries = config.modules_to_save
    if not entries:
        return None
    names = {*filter(matcher(entries), _module_names(params))}
    embedding = _embedding_name(params)
    if config.ensure_weight_tying and embedding is not None:
        names = {embedding if name == HEAD[0] else name for name in names}
    return _outermost(names)


def _outermost(names: Collection[str]) -> list[str]:
    """Sorted, without those that lie inside another one."""
    return sorted(name for name in names if not _lies_in(name, set(names) - {name}))


def _lies_in(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _parameters(params: Mapping) -> dict[str, tuple[str, tree.Path]]:
    """Module path and leaf of every parameter, by what it is called in transformers."""
    found = {}
    for path, leaf in tree.flatten(params).items():
        ending = ".bias" if path[-1] == "bias" else "" if tree.has_experts(path) else ".weight"
        for name in tree.slice_names(path[:-1], leaf.shape):
            found[name + ending] = (name, path)
    return found


def _weight_names(params: Mapping) -> set[str]:
    """Paths of the modules that hold a weight; of a tied head too."""
    names = {
        name
        for path, leaf in tree.flatten(params).items()
        for name in tree.slice_names(path[:-1], leaf.shape)
    }
    return names if tree.tied_embedding(params) is None else names | {HEAD[0]}


def _module_names(params: Mapping) -> set[str]:
    """Paths of all modules, containers included; stacks of experts are no modules there."""
    stacks = {name for name, path in _parameters(params).values() if tree.has_experts(path)}
    homes = {name.rpartition(".")[0] for name in stacks}
    split = [name.split(".") for name in (_weight_names(params) - stacks) | homes]
    return {".".join(parts[:end]) for parts in split for end in range(1, len(parts) + 1)}


def _embedding_name(params: Mapping) -> str | None:
    """Module path of a tied embedding."""
    path = tree.tied_embedding(params)
    return None if path is None else tree.dotted(path[:-1])


def _integral(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def from_peft_config(content: Mapping[str, Any], params: Mapping) -> AdapterConfig:
    """The config of the same adapters on the model of `params`. Entries of target_modules and
    modules_to_save that match nothing have no effect in PEFT and are left out, and so is `bias`
    where there is none.

    Raises:
        UserError: fields that are missing, of the wrong type, or active and not supported; what
            `find_trainable` refuses.
    """
    raise_all([*_mistyped(content)])
    problems = [f"not supported: {text}" for text in _unsupported(content)]
    given = {name for name, value in content.items() if value is not None}
    if "target_parameters" in given:  # PEFT needs one of the two
        given.add("target_modules")
    problems += [f"missing: {name}" for name in ("r", "target_modules") if name not in given]
    raise_all(problems)
    try:
        config = _with_parameters(_adapters(content, params), content, params)
        rows = _rows(content.get("trainable_token_indices"), params)
        saved = _saved(content.get("modules_to_save"), params)
        adapted = adapted_modules(find_trainable(params, config))
        outside = sorted(name for name in adapted if not _lies_in(name, saved))
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"it has a value of the wrong type: {error}") from error
    if len(outside) < len(adapted):  # PEFT gives no adapter to what it saves whole
        config = dataclasses.replace(
            config, target_modules=outside, exclude_modules=None, layers_to_transform=None
        )
    one_weight = (HEAD[0], _embedding_name(params))
    named = any(name in outside or _lies_in(name, saved) for name in one_weight if name)
    tied = tree.tied_embedding(params) is not None
    return dataclasses.replace(
        config,
        bias=_bias(content.get("bias") or "none", outside, params),
        modules_to_save=saved or None,
        trainable_token_indices=rows,
        ensure_weight_tying=bool(content.get("ensure_weight_tying")) if tied and named else None,
    )


def _mistyped(content: Mapping[str, Any]) -> Iterable[str]:
    """Fields whose values have a type that PEFT never writes; null is as if absent."""
    for name, (kinds, words) in _TYPES.items():
        value = content.get(name)
        if value is not None and not _is_one_of(value, kinds):
            yield f"{name}={quoted(value)} is not {words}"
        elif name in _OF_PATTERNS:
            kinds, words = _TYPES[_OF_PATTERNS[name]]
            for pattern, one in (value or {}).items():
                if not _is_one_of(one, kinds):
                    yield f"{name}[{quoted(pattern)}]={quoted(one)} is not {words}"
        elif isinstance(value, list) and name.endswith(("modules", "parameters", "save")):
            if wrong := [entry for entry in value if not isinstance(entry, str)]:
                yield f"{name} has an entry that is not a string: {quoted(wrong[0])}"


def _is_one_of(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def _unsupported(content: Mapping[str, Any]) -> Iterable[str]:
    for name, value in content.items():
        harmless = _PLAIN_INITS if name == "init_lora_weights" else _HARMLESS_VALUES
        if name in _READ | _INERT or value in harmless:
            continue
        hint = ""
        if name == "init_lora_weights" and str(value).lower().startswith(_CONVERTIBLE_INITS):
            hint = (
                ", after which an adapter stands on a base without its first part; convert it in "
                "PEFT by save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        yield f"{name}={quoted(value)}{hint}"
    if content.get("layers_pattern"):
        yield f"layers_pattern={quoted(content['layers_pattern'])}"


def _adapters(content: Mapping[str, Any], params: Mapping) -> AdapterConfig:
    """The fields of the adapters alone."""
    names = _weight_names(params)
    given = {name: value for name, value in content.items() if value is not None}
    config = AdapterConfig(
        rank=content["r"],
        alpha=float(given.get("lora_alpha", 8)),
        dropout=float(given.get("lora_dropout", 0.0)),
        use_rslora=bool(content.get("use_rslora", False)),
        use_dora=bool(content.get("use_dora", False)),
        target_modules=_effective(content.get("target_modules") or [], names),
        exclude_modules=_effective(content.get("exclude_modules"), names) or None,
        layers_to_transform=content.get("layers_to_transform"),
        rank_pattern=dict(given.get("rank_pattern", {})),
        alpha_pattern={k: float(v) for k, v in given.get("alpha_pattern", {}).items()},
        ensure_weight_tying=False if tree.tied_embedding(params) else None,
    )
    embedding = _embedding_name(params)
    if embedding is None or not content.get("ensure_weight_tying"):
        return config
    if not any(map(matcher(config.target_modules), (HEAD[0], embedding))):
        return config
    return _through_embedding(config, embedding, names - {HEAD[0]})


def _with_parameters(
    config: AdapterConfig, content: Mapping[str, Any], params: Mapping
) -> AdapterConfig:
    """With the modules of target_parameters, all of them by their full paths."""
    entries = content.get("target_parameters") or []
    if not isinstance(entries, list):
        raise TypeError(f"target_parameters={entries!r} is no list")
    if not entries:
        return config
    known = _parameters(params)
    chosen = {full: known[full] for full in filter(matcher(entries), known)}
    usual = {f: path for f, (_, path) in chosen.items() if path[-1] == "kernel"}
    odd = sorted(f for f in chosen if f not in usual or tree.is_conv1d(usual[f][:-1]))
    if odd or not chosen:
        what = f"{odd[0]} is no linear weight" if odd else "the model has no such parameter"
        raise UserError(f"not supported: target_parameters={entries!r}: {what}")
    names = {name: full for full, (name, _) in chosen.items()}
    if config.target_modules:
        alone = dataclasses.replace(config, rank_pattern={}, alpha_pattern={})
        names |= {name: name for name in adapted_modules(find_trainable(params, alone))}
    rank_of = pattern_values(config.rank_pattern, "rank_pattern")
    alpha_of = pattern_values(config.alpha_pattern, "alpha_pattern")
    adapted = {
        name: (rank_of(looked_up, config.rank), alpha_of(looked_up, config.alpha))
        for name, looked_up in sorted(names.items())
    }
    return dataclasses.replace(
        config,
        target_modules=list(adapted),
        exclude_modules=None,
        layers_to_transform=None,
        rank_pattern={n: rank for n, (rank, _) in adapted.items() if rank != config.rank},
        alpha_pattern={n: alpha for n, (_, alpha) in adapted.items() if alpha != config.alpha},
    )


def _effective(spec: Any, names: Iterable[str]) -> Any:
    if not isinstance(spec, list):
        return spec
    known = {ending for name in names for ending in endings(name)}
    return [entry for entry in spec if entry in known] or spec


def _through_embedding(
    config: AdapterConfig, embedding: str, others: Collection[str]
) -> AdapterConfig:
    """As PEFT: of a head and an embedding that stay tied, the embedding has the adapter. The head
    has its transpose, but a rank, an alpha and, with DoRA, sizes of its own.
    """
    problems = []
    if config.use_dora:
        problems.append(
            "not supported: use_dora=True with ensure_weight_tying=True, by which PEFT gives "
            f"{embedding} and {HEAD[0]} sizes of their own, and they part"
        )
    for field, default in (("rank_pattern", config.rank), ("alpha_pattern", config.alpha)):
        patterns = getattr(config, field)
        value_of = pattern_values(patterns, field)
        head, own = (value_of(name, default) for name in (HEAD[0], embedding))
        if head != own:
            problems.append(
                f"not supported: {field}={patterns!r} with ensure_weight_tying=True: {embedding} "
                f"has {own} and {HEAD[0]} {head}, so that they part"
            )
    raise_all(problems)
    targets = config.target_modules
    if isinstance(targets, str):
        return dataclasses.replace(config, target_modules=f"(?:{targets})|{re.escape(embedding)}")
    return dataclasses.replace(
        config,
        target_modules=[*(e for e in targets if not matches(HEAD[0], [e])), embedding],
        rank_pattern=_of_others(config.rank_pattern, others),
        alpha_pattern=_of_others(config.alpha_pattern, others),
    )


def _of_others(patterns: Mapping[str, Any], others: Collection[str]) -> dict[str, Any]:
    """Without the patterns that only the head has a use for."""
    kept = {}
    for pattern, value in patterns.items():
        applies = pattern_values({pattern: True})
        if any(applies(name, False) for name in others) or not applies(HEAD[0], False):
            kept[pattern] = value
    return kept


def _saved(entries: Any, params: Mapping) -> list[str]:
    """modules_to_save as full paths, by PEFT's rule: an entry is the end of any path."""
    if not isinstance(entries, list | None):
        raise TypeError(f"modules_to_save={entries!r} is no list")
    ends = tuple(entries or ())
    return _outermost({name for name in _module_names(params) if name.endswith(ends)})


def _bias(bias: str, adapted: Collection[str], params: Mapping) -> str:
    """`none` where no bias would train."""
    names = {
        name
        for path, leaf in tree.flatten(params).items()
        if path[-1] == "bias"
        for name in tree.slice_names(path[:-1], leaf.shape)
    }
    trains = {"all": names, "lora_only": names & set(adapted)}
    return bias if trains.get(bias, True) else "none"


def _rows(value: Any, params: Mapping) -> list[int] | None:
    """trainable_token_indices, also in the form of a mapping from layers to indices."""
    if not value:
        return None
    tied = [HEAD[0]] if tree.tied_embedding(params) else []
    names = [tree.dotted(path[:-1]) for path in tree.flatten(params) if path[-1] == "embedding"]
    if isinstance(value, dict):
        layers = {next((n for n in names + tied if n.endswith(key)), None) for key in value}
        lists = list(value.values())
        if not set(names) <= layers <= {*names, *tied} or any(one != lists[0] for one in lists):
            raise UserError(
                f"not supported: trainable_token_indices={value!r}; tokens train in "
                f"{' and '.join(names + tied)}, the same in each"
            )
        value = lists[0]
    if not isinstance(value, list) or any(type(index) is not int for index in value):
        raise TypeError(f"trainable_token_indices={value!r} is no list of tokens")
    return value
