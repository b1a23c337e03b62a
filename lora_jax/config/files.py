"""Settings from YAML and the command line, and back."""

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_jax.config import document
from lora_jax.config.checks import find_problems
from lora_jax.config.elsewhere import find_hint
from lora_jax.config.settings import AdapterConfig, Config, all_keys
from lora_jax.config.text import exists, quoted, read_text, shown
from lora_jax.config.types import (
    Written,
    as_setting,
    convert,
    describe,
    is_null,
    item_kind,
    takes_structure,
    takes_text,
)
from lora_jax.errors import UserError, nearest, raise_all

_SHOWN = 10  # unknown keys that are named


@dataclass(frozen=True)
class _Given:
    """The value of a setting and its origin, a line or an override, which messages begin with."""

    value: Any
    origin: str
    line: int = 0


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides, and check everything.

    Raises:
        UserError: the file is missing or is no YAML mapping; unknown keys; values of a wrong type
            or out of range.
    """
    path = Path(path)
    if not exists(path, f"config file {path}"):
        raise UserError(f"config file {shown(path)} does not exist")
    text = read_text(path, f"config file {path}")
    content = document.read(text, str(path))
    if content is None or is_null(content):
        content = {}
    if not isinstance(content, Mapping):
        kind = "a list" if isinstance(content, list) else f"the value {as_setting(content)}"
        raise UserError(f"{path} must be a mapping of settings, not {kind}")
    return parse(content, overrides, source=str(path))


def parse(content: Mapping, overrides: Sequence[str] = (), source: str = "config") -> Config:
    """Return a checked `Config` from a mapping and `key.sub=value` overrides (later ones win).

    Raises:
        UserError: as `load`.

    Example:
        >>> from lora_jax.config import parse
        >>> parse({"model": "org/name", "train": {"steps": 5}}, ["adapter.rank=4"]).adapter.rank
        4
    """
    problems: list[str] = []
    given = dict(_settings(content, Config, "", source, problems))
    for override in overrides:
        _apply(override, given, problems)
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"... and {len(problems) - _SHOWN} more"]
    values = _convert(given, problems)
    raise_all(problems)
    if "train.steps" in values and "train.epochs" in values:
        if None not in (values["train.steps"], values["train.epochs"]):
            steps, epochs = given["train.steps"], given["train.epochs"]
            problems.append(
                f"{epochs.origin}: train.epochs={as_setting(epochs.value)}, and {steps.origin}: "
                f"train.steps={as_setting(steps.value)}; set one of them (the other to null)"
            )
    config = _make(Config, values, "", problems)
    problems += find_problems(config)
    raise_all([_with_origin(problem, given) for problem in problems])
    return config


def dump(config: Config) -> str:
    """Return the config as YAML that `load` reads. With `train.epochs` the steps are null, as they
    follow from the data.
    """
    settings = dataclasses.asdict(config)
    if config.train.epochs is not None:
        settings["train"]["steps"] = None
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _settings(
    content: Mapping, kind: type, prefix: str, source: str, problems: list[str]
) -> Iterable[tuple[str, _Given]]:
    """Yield the settings of a mapping by dotted key; unknown keys are added to `problems`."""
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    for key, value in content.items():
        line = getattr(key, "line", 0)
        origin = f"{source}:{line}" if line else source
        if key not in fields:
            # Looking for the nearest names takes time: not for thousands of keys.
            found = _unknown(prefix, str(key), kind) if len(problems) < _SHOWN else "unknown key"
            problems.append(f"{origin}: {found}")
        elif not dataclasses.is_dataclass(fields[key]):
            yield f"{prefix}{key}", _Given(value, origin, line)
        elif isinstance(value, Mapping):
            inner = typing.cast(type, fields[key])
            yield from _settings(value, inner, f"{prefix}{key}.", source, problems)
        else:
            problems.append(
                f"{origin}: {prefix}{key}={as_setting(value)} must be a mapping of settings"
                f"{'; leave it out' * is_null(value)}"
            )


def _apply(override: str, given: dict[str, _Given], problems: list[str]) -> None:
    """Put the value of `key.sub=value` into `given`."""
    key, separator, text = override.partition("=")
    given_as = quoted(override)
    if not separator or not key:
        raise UserError(
            f"override {given_as} is not of the form key.sub=value, as in train.steps=10"
        )
    try:
        override.encode()
    except UnicodeEncodeError:
        raise UserError(f"override {given_as} is not UTF-8") from None
    if "\0" in override:
        raise UserError(f"override {given_as} has a null character")
    origin = f"override {given_as}"
    kind, rest = _locate(key.split("."))
    name = key if not rest else key.removesuffix("." + ".".join(rest))
    if dataclasses.is_dataclass(kind):
        inner = document.read(text, origin) if not rest else None
        tree = _nest(key.split("."), inner)
        given.update(_settings(tree, Config, "", origin, problems))
        return
    if not rest:
        given[name] = _Given(_read(text, kind, origin), origin)
        return
    inner = item_kind(kind)
    if inner is None:
        problems.append(f"{origin}: {name} is {describe(kind)}, and has no {'.'.join(rest)!r}")
        return
    before = given[name].value if name in given else {}
    item = _read(text, inner, origin)
    # Names of modules have dots; only values of no declared type nest.
    added = _nest(rest, item) if inner is Any else {".".join(rest): item}
    given[name] = _Given(_merge(before, added), origin)


def _locate(path: Sequence[str]) -> tuple[Any, list[str]]:
    """Return the type of the setting or section that a path leads to, and what is left of it."""
    kind: Any = Config
    for i, part in enumerate(path):
        fields = {f.name: f.type for f in dataclasses.fields(kind)}
        if part not in fields:
            return kind, list(path[i:])
        kind = fields[part]
        if not dataclasses.is_dataclass(kind):
            return kind, list(path[i + 1 :])
    return kind, []


def _read(text: str, kind: Any, origin: str) -> Any:
    """Return the value of an override. For a setting that takes any text it is not parsed as YAML,
    as in `data.system_prompt=Parse: {x} # y`, unless the setting also takes lists or mappings and
    it is one.
    """
    structure = takes_structure(kind) and text.lstrip()[:1] in ("[", "{")
    if takes_text(kind) and not structure:
        return _plain_text(text)
    found = document.read(text, origin)
    return Written("") if found is None else found


def _plain_text(text: str) -> Written:
    """Return the value as written, without quotes around all of it."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            inner = document.read(text, "")
        except UserError:
            return Written(text, plain=False)
        return inner if isinstance(inner, Written) else Written(text, plain=False)
    return Written(text)


def _nest(path: Sequence[str], value: Any) -> Any:
    return {path[0]: _nest(path[1:], value)} if path else value


def _merge(before: Any, added: Any) -> Any:
    if not (isinstance(before, Mapping) and isinstance(added, Mapping)):
        return added
    return {**before, **{key: _merge(before.get(key), one) for key, one in added.items()}}


def _convert(given: Mapping[str, _Given], problems: list[str]) -> dict[str, Any]:
    values = {}
    kinds = dict(_kinds(Config, ""))
    for key, one in given.items():
        try:
            values[key] = convert(one.value, kinds[key])
        except ValueError as error:
            problems.append(f"{one.origin}: {key}={as_setting(one.value)} {error}")
    return values


def _kinds(kind: type, prefix: str) -> Iterable[tuple[str, Any]]:
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.type):
            yield from _kinds(typing.cast(type, f.type), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f.type


def _make(kind: Any, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """Build the dataclass of a section. Problems of an adapter are added to `problems`, and the
    default adapter takes its place.
    """
    arguments = {}
    for f in dataclasses.fields(kind):
        key = prefix + f.name
        if dataclasses.is_dataclass(f.type):
            arguments[f.name] = _make(f.type, values, f"{key}.", problems)
        elif key in values:
            arguments[f.name] = values[key]
    try:
        return kind(**arguments)
    except UserError as error:
        problems += [f"{prefix}{line}" for line in str(error).splitlines()]
        return AdapterConfig()


def _with_origin(problem: str, given: Mapping[str, _Given]) -> str:
    """Prefix a problem with the file's line of the setting that it begins with."""
    found = re.match(r"[a-z_]+(\.[a-z_0-9]+)*", problem)
    one = given.get(found[0]) if found else None
    return problem if one is None or not one.line else f"{one.origin}: {problem}"


def _unknown(prefix: str, key: str, kind: type) -> str:
    """Return the problem with a key that `kind` does not have, and what may have been meant."""
    names, section = [f.name for f in dataclasses.fields(kind)], prefix.rstrip(".")
    keys = list(all_keys(Config, ""))
    moved = [path for path in keys if path.rpartition(".")[2] == key]
    hint = find_hint(key)
    if key in keys and not prefix:
        *sections, name = key.split(".")
        hint = f" Write it as {': {'.join(sections)}: {{{name}: ..}}" if sections else ""
    elif moved:
        hint = f" Did you mean {' or '.join(map(repr, moved))}?"
    hint = hint or nearest(key, names)
    if not hint and (close := nearest(key, [path.rpartition(".")[2] for path in keys])):
        name = close.rpartition(" ")[2].strip("'?")
        hint = f" Did you mean {next(path for path in keys if path.endswith(name))!r}?"
    has = f"{section or 'the config'} has: {', '.join(names)}"
    return f"unknown key {quoted(prefix + key)}; {has}.{hint}"
