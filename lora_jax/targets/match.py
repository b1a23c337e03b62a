"""Matching of module names by PEFT's rules, and the problems of settings that name modules.

Lists may have hundreds of thousands of entries, so functions that return a test prepare them once.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lora_jax.config import AdapterConfig, quoted
from lora_jax.errors import UserError, nearest
from lora_jax.patterns import compiled
from lora_jax.tree import layer_index

_SHOWN = 8  # problems of one list that are reported
_MOST_PATTERNS = 10_000  # entries of rank_pattern or alpha_pattern
_MOST_REGEX = 50_000  # characters of those that are more than names
_LITERAL = re.compile(r"[\w.]+")  # a pattern whose dots alone stand for something else

Matcher = Callable[[str], bool]


def matcher(spec: str | Sequence[str], field: str = "target_modules") -> Matcher:
    """Return a test of module paths by PEFT's rule: a string is a regex for the full path, a list
    entry is the path or a suffix of it. Errors name the setting `field`.

    Raises:
        UserError: not a valid regex; from the test, one that takes too long.
    """
    if not isinstance(spec, str):
        entries = frozenset(spec)
        return lambda name: any(ending in entries for ending in endings(name))
    return _named(spec, f"{field}={quoted(spec)}")


def _named(pattern: str, setting: str) -> Matcher:
    """Return a test of full module paths by a regex; its errors name the setting."""
    try:
        found = compiled(pattern)
    except UserError as error:
        raise UserError(f"{setting} {error}") from error

    def test(name: str) -> bool:
        try:
            return found.matches(name)
        except UserError as error:
            raise UserError(f"{setting} {error}") from error

    return test


def endings(name: str) -> Iterator[str]:
    """Yield a module path and its suffixes: `a.b.c`, `b.c`, `c`."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def matches(name: str, spec: str | Sequence[str], field: str = "target_modules") -> bool:
    """Return `matcher(spec, field)(name)`."""
    return matcher(spec, field)(name)


def pattern_values(
    patterns: Mapping[str, Any], field: str = "rank_pattern"
) -> Callable[[str, Any], Any]:
    """Return a function of module path and default: the value of the first pattern that matches the
    end of the path (PEFT's rank_pattern and alpha_pattern). Errors name the setting `field`.

    Raises:
        UserError: too many patterns, or one that is not valid; from the function, one that takes
            too long.
    """
    if len(patterns) > _MOST_PATTERNS:
        raise UserError(
            f"{field} has {len(patterns):,} entries; at most {_MOST_PATTERNS:,} are supported"
        )
    size = sum(len(pattern) for pattern in patterns if not _LITERAL.fullmatch(pattern))
    if size > _MOST_REGEX:
        raise UserError(
            f"{field} has regexes of {size:,} characters in all; at most {_MOST_REGEX:,} are "
            "supported"
        )
    tests = [(_ending(pattern, field), value) for pattern, value in patterns.items()]

    def find(name: str, default: Any) -> Any:
        return next((value for test, value in tests if test(name)), default)

    return find


def _ending(pattern: str, field: str) -> Matcher:
    if not _LITERAL.fullmatch(pattern):
        return _named(rf"(.*\.)?({pattern})", f"{field}[{quoted(pattern)}]")
    last = pattern.rpartition(".")[2]

    def test(name: str) -> bool:
        start = len(name) - len(pattern)
        if start < 0 or not name.endswith(last) or (start and name[start - 1] != "."):
            return False
        pairs = zip(pattern, name[start:], strict=True)
        return all(wanted in (".", found) for wanted, found in pairs)

    return test


def _layers_to_transform(config: AdapterConfig) -> list[int] | None:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else layers


def selector(config: AdapterConfig) -> Matcher:
    """Return a test of which modules are adapted, for the modules that `all-linear` would select.

    Raises:
        UserError: as `matcher`.
    """
    spec = config.target_modules
    wanted = (lambda name: True) if spec == "all-linear" else matcher(spec)
    paths = frozenset() if isinstance(spec, str) else frozenset(spec)
    given = _layers_to_transform(config)
    layers = None if given is None else frozenset(given)
    excluded = config.exclude_modules
    left_out = matcher(excluded, "exclude_modules") if excluded else (lambda name: False)

    def test(name: str) -> bool:
        if not wanted(name):
            return False
        # As in PEFT, layers_to_transform does not restrict full paths.
        if layers is not None and name not in paths and layer_index(name) not in layers:
            return False
        return not left_out(name)

    return test


def unmatched(field: str, entries: Iterable[str], names: Iterable[str], listed: str) -> list[str]:
    """List the problems of entries that match no module: the first few, each with the nearest name,
    and a count of the others. `listed` names what the model has.
    """
    names = list(names)
    short = sorted({name.rpartition(".")[2] for name in names if not name[-1].isdigit()})
    known = {ending for name in names for ending in endings(name)}
    missing = [entry for entry in entries if entry not in known]
    problems = [
        f"{field}=[{quoted(entry)}] {listed}{nearest(entry, names if '.' in entry else short)}"
        for entry in missing[:_SHOWN]
    ]
    if len(missing) > _SHOWN:
        problems.append(f"{field}: {len(missing) - _SHOWN:,} more entries match nothing")
    return problems


def _entry_problems(
    field: str, spec: Any, names: Sequence[str], linears: Sequence[str]
) -> Iterable[str]:
    """Yield problems of the entries of a setting. Errors list `linears`, a subset of `names`."""
    listed = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
    if isinstance(spec, str):
        try:
            if not any(map(matcher(spec, field), names)):
                short = sorted({name.rpartition(".")[2] for name in names})
                hint = nearest(spec, short).replace("'", "['", 1).replace("'?", "']?")
                yield (
                    f"{field}={quoted(spec)} matches no weight. A string is a regex for the "
                    "whole module path, such as "
                    f"{max(names, key=len)!r}; a list holds names; the model has: "
                    f"{listed}.{hint}"
                )
        except UserError as error:
            yield str(error)
        return
    if (
        not isinstance(spec, Sequence)
        or not spec
        or not all(isinstance(entry, str) for entry in spec)
    ):
        yield (
            f"{field}={quoted(spec)} must be a string or a non-empty list of strings; the model "
            f"has: {listed}."
        )
        return
    yield from unmatched(field, spec, names, f"matches no weight; the model has: {listed}.")


def selection_problems(
    config: AdapterConfig, names: Sequence[str], linears: Sequence[str]
) -> Iterable[str]:
    """Yield problems of target_modules, exclude_modules and layers_to_transform, where `names` are
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
                f"layers_to_transform={quoted(layers)} must be a layer index or a non-empty list "
                "of them"
            )
        elif missing := sorted(set(layers) - set(known)):
            has = f"layers {known[0]} to {known[-1]}" if known else "no numbered layers"
            yield f"layers_to_transform={quoted(missing)} does not exist; the model has {has}"


def pattern_problems(config: AdapterConfig, selected: set[str]) -> Iterable[str]:
    """Return the problems of rank_pattern and alpha_pattern, `selected` being the adapted modules.

    Raises:
        UserError: as `pattern_values`.
    """
    if not selected:
        yield (
            f"target_modules={quoted(config.target_modules)} with "
            f"exclude_modules={quoted(config.exclude_modules)} and "
            f"layers_to_transform={quoted(config.layers_to_transform)} leaves no weight to adapt"
        )
    short = sorted({name.rpartition(".")[2] for name in selected})
    for field, patterns in (
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        pattern_values(patterns, field)
        missing = [p for p in patterns if not any(map(_ending(p, field), selected))]
        for pattern in missing[:_SHOWN]:
            yield (
                f"{field}[{quoted(pattern)}] matches no adapted module; they are: "
                f"{', '.join(short)}."
                f"{nearest(pattern, short)}"
            )
        if len(missing) > _SHOWN:
            yield f"{field}: {len(missing) - _SHOWN:,} more patterns match nothing"
