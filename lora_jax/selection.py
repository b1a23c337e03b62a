"""Which modules the settings of an adapter name, by PEFT's rules, and what is wrong with them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax.config import AdapterConfig, nearest
from lora_jax.tree import layer_index


def matches(name: str, spec: str | Sequence[str]) -> bool:
    """PEFT's rule: a string must match the whole module path as a regex, a list entry is the path
    or a suffix of it.
    """
    if isinstance(spec, str):
        return re.fullmatch(spec, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in spec)


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that ends the module path (PEFT's rank_pattern and
    alpha_pattern).
    """
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def _layers_to_transform(config: AdapterConfig) -> list[int] | None:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else layers


def is_selected(name: str, config: AdapterConfig) -> bool:
    """Whether a module that `all-linear` would take is adapted."""
    wanted = config.target_modules == "all-linear" or matches(name, config.target_modules)
    layers = _layers_to_transform(config)
    if layers is not None:
        whole = not isinstance(config.target_modules, str) and name in config.target_modules
        wanted = wanted and (
            whole or layer_index(name) in layers
        )  # PEFT: a whole path holds in any layer
    return wanted and not (config.exclude_modules and matches(name, config.exclude_modules))


def _entry_problems(
    field: str, spec: Any, names: Sequence[str], linears: Sequence[str]
) -> Iterable[str]:
    """`linears` are those of `names` that errors list; the others are named on purpose only."""
    short = sorted({name.rpartition(".")[2] for name in names})
    listed = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
    if isinstance(spec, str):
        try:
            if not any(matches(name, spec) for name in names):
                hint = nearest(spec, short).replace("'", "['", 1).replace("'?", "']?")
                yield (
                    f"{field}={spec!r} matches no weight. A string is a regex for the whole "
                    "module path, such as "
                    f"{max(names, key=len)!r}; a list holds names; the model has: "
                    f"{listed}.{hint}"
                )
        except re.error as error:
            yield f"{field}={spec!r} is not a valid regex: {error}"
        return
    if (
        not isinstance(spec, Sequence)
        or not spec
        or not all(isinstance(entry, str) for entry in spec)
    ):
        yield (
            f"{field}={spec!r} must be a string or a non-empty list of strings; the model has: "
            f"{listed}."
        )
        return
    for entry in spec:
        if not any(matches(name, [entry]) for name in names):
            candidates = short if "." not in entry else names
            yield (
                f"{field}=[{entry!r}] matches no weight; the model has: {listed}."
                f"{nearest(entry, candidates)}"
            )


def selection_problems(
    config: AdapterConfig, names: Sequence[str], linears: Sequence[str]
) -> Iterable[str]:
    """What is wrong with target_modules, exclude_modules and layers_to_transform, where `names` are
    the modules that can take an adapter.
    """
    if not linears:
        yield "the model has no linear weight that could take an adapter"
        return
    if config.target_modules != "all-linear":
        yield from _entry_problems("target_modules", config.target_modules, names, linears)
    if config.exclude_modules:
        excluded = config.exclude_modules
        yield from _entry_problems("exclude_modules", excluded, names, linears)
    layers = _layers_to_transform(config)
    if layers is not None:
        known = sorted({index for index in map(layer_index, names) if index is not None})
        if (
            not isinstance(layers, Sequence)
            or not layers
            or any(type(i) is not int for i in layers)
        ):
            yield (
                f"layers_to_transform={layers!r} must be a layer index or a non-empty list of them"
            )
        elif missing := sorted(set(layers) - set(known)):
            has = f"layers {known[0]} to {known[-1]}" if known else "no numbered layers"
            yield f"layers_to_transform={missing} does not exist; the model has {has}"


def pattern_problems(config: AdapterConfig, selected: set[str]) -> Iterable[str]:
    """What is wrong with rank_pattern and alpha_pattern, `selected` being the adapted modules."""
    if not selected:
        yield (
            f"target_modules={config.target_modules!r} with "
            f"exclude_modules={config.exclude_modules!r} and "
            f"layers_to_transform={config.layers_to_transform!r} leaves no weight to adapt"
        )
    short = sorted({name.rpartition(".")[2] for name in selected})
    for field, patterns in (
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        for pattern in patterns:
            try:
                if not any(pattern_value({pattern: True}, name, False) for name in selected):
                    yield (
                        f"{field}[{pattern!r}] matches no adapted module; they are: "
                        f"{', '.join(short)}."
                        f"{nearest(pattern, short)}"
                    )
            except re.error as error:
                yield f"{field}[{pattern!r}] is not a valid regex: {error}"
