"""PEFT's adapter_config.json -> `AdapterConfig`.

`target_parameters` are ends of paths, to which exclude_modules and layers_to_transform do not
apply.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_jax import tree
from lora_jax.config import AdapterConfig, quoted
from lora_jax.errors import UserError, raise_all
from lora_jax.formats.peft_forms import adapted_modules
from lora_jax.formats.peft_modules import (
    is_inside,
    module_names,
    outermost,
    parameters,
    tied_embedding_name,
    weight_names,
)
from lora_jax.targets import HEAD, find_trainable
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
# Inits after which PEFT adapts the base as it is; the others change it again at every load.
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


def from_peft_config(
    content: Mapping[str, Any], params: Mapping, method: str = "lora"
) -> AdapterConfig:
    """Return the config of the same adapters on the model of `params`. Entries of target_modules
    and modules_to_save that match nothing have no effect in PEFT and are left out, and so is `bias`
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
        config = _with_parameters(_adapters(content, params, method), content, params)
        tokens = _tokens(content.get("trainable_token_indices"), params)
        saved = _saved(content.get("modules_to_save"), params)
        adapted = _adapted(config, params)
        outside = sorted(name for name in adapted if not is_inside(name, saved))
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"it has a value of the wrong type: {error}") from error
    if len(outside) < len(adapted):  # PEFT gives no adapter to what it saves whole
        config = dataclasses.replace(
            config, target_modules=outside, exclude_modules=None, layers_to_transform=None
        )
    one_weight = (HEAD[0], tied_embedding_name(params))
    named = any(name in outside or is_inside(name, saved) for name in one_weight if name)
    tied = tree.tied_embedding(params) is not None
    return dataclasses.replace(
        config,
        bias=_bias(content.get("bias") or "none", outside, params),
        modules_to_save=saved or None,
        trainable_token_indices=tokens,
        ensure_weight_tying=bool(content.get("ensure_weight_tying")) if tied and named else None,
    )


def _adapted(config: AdapterConfig, params: Mapping) -> dict[str, tuple[int, float]]:
    return adapted_modules(find_trainable(params, config))


def _mistyped(content: Mapping[str, Any]) -> Iterable[str]:
    """Yield fields whose values have a type that PEFT never writes; null is as if absent."""
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
                ", after which an adapter belongs to a base without its first part; convert it in "
                "PEFT by save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        yield f"{name}={quoted(value)}{hint}"
    if content.get("layers_pattern"):
        yield f"layers_pattern={quoted(content['layers_pattern'])}"


def _adapters(content: Mapping[str, Any], params: Mapping, method: str) -> AdapterConfig:
    """Return the fields of the adapters alone."""
    names = weight_names(params)
    given = {name: value for name, value in content.items() if value is not None}
    config = AdapterConfig(
        method=method,
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
    embedding = tied_embedding_name(params)
    if embedding is None or not content.get("ensure_weight_tying"):
        return config
    if not any(map(matcher(config.target_modules), (HEAD[0], embedding))):
        return config
    return _through_embedding(config, embedding, names - {HEAD[0]})


def _with_parameters(
    config: AdapterConfig, content: Mapping[str, Any], params: Mapping
) -> AdapterConfig:
    """Add the modules of target_parameters, all of them by their full paths."""
    entries = content.get("target_parameters") or []
    if not isinstance(entries, list):
        raise TypeError(f"target_parameters={entries!r} is no list")
    if not entries:
        return config
    known = parameters(params)
    chosen = {full: known[full] for full in filter(matcher(entries), known)}
    usual = {f: path for f, (_, path) in chosen.items() if path[-1] == "kernel"}
    odd = sorted(f for f in chosen if f not in usual or tree.is_conv1d(usual[f][:-1]))
    if odd or not chosen:
        what = f"{odd[0]} is no linear weight" if odd else "the model has no such parameter"
        raise UserError(f"not supported: target_parameters={entries!r}: {what}")
    names = {name: full for full, (name, _) in chosen.items()}
    if config.target_modules:
        alone = dataclasses.replace(config, rank_pattern={}, alpha_pattern={})
        names |= {name: name for name in _adapted(alone, params)}
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
    """Move the adapter of a head that stays tied to an embedding to that embedding, as PEFT does.
    The head has its transpose, but a rank, an alpha and, with DoRA, norms of its own.
    """
    problems = []
    if config.use_dora:
        problems.append(
            "not supported: use_dora=True with ensure_weight_tying=True, by which PEFT gives "
            f"{embedding} and {HEAD[0]} separate magnitudes, which then differ"
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
    """Drop the patterns that only the head has a use for."""
    kept = {}
    for pattern, value in patterns.items():
        applies = pattern_values({pattern: True})
        if any(applies(name, False) for name in others) or not applies(HEAD[0], False):
            kept[pattern] = value
    return kept


def _saved(entries: Any, params: Mapping) -> list[str]:
    """Return modules_to_save as full paths, by PEFT's rule: an entry is the end of any path."""
    if not isinstance(entries, list | None):
        raise TypeError(f"modules_to_save={entries!r} is no list")
    ends = tuple(entries or ())
    return outermost({name for name in module_names(params) if name.endswith(ends)})


def _bias(bias: str, adapted: Collection[str], params: Mapping) -> str:
    """Return `bias`, or `none` where no bias would train."""
    names = {
        name
        for path, leaf in tree.flatten(params).items()
        if path[-1] == "bias"
        for name in tree.slice_names(path[:-1], leaf.shape)
    }
    trains = {"all": names, "lora_only": names & set(adapted)}
    return bias if trains.get(bias, True) else "none"


def _tokens(value: Any, params: Mapping) -> list[int] | None:
    """Read trainable_token_indices, also in the form of a mapping from layers to indices."""
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
