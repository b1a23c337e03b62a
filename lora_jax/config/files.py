"""Settings from YAML and the command line, and back."""

import dataclasses
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_jax.config.checks import check
from lora_jax.config.settings import Config, UserError, all_keys, nearest, raise_all
from lora_jax.config.text import exists, read_text, shown

# Settings whose values are mappings: an override of one takes the place of all of it.
_MAPPINGS = (
    *("data.train", "data.chat_template_kwargs"),
    *("adapter.rank_pattern", "adapter.alpha_pattern"),
)


class _UniqueKeys(yaml.SafeLoader):
    """A loader for which a key that stands twice is an error; PyYAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# An unquoted date is text here, as any setting is that could hold one.
_UniqueKeys.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


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
    try:
        content = yaml.load(text, _UniqueKeys) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of settings, not {type(content).__name__}")
    return parse(content, overrides, source=str(path))


def parse(content: dict, overrides: Sequence[str] = (), source: str = "config") -> Config:
    """A checked `Config` from a mapping and `key.sub=value` overrides (later ones win)."""
    layers: list[tuple[str, Any]] = [(source, content)]
    replaced: dict[str, str] = {}  # by the name of the layer, the mapping that it replaces whole
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(
                f"override {override!r} is not of the form key.sub=value, as in train.steps=10"
            )
        try:
            layer = (
                _nest(key.split("."), _plain_text(text))
                if _holds_text(key, text)
                else OmegaConf.to_container(OmegaConf.from_dotlist([override]))
            )
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(
                f"override {override!r} cannot be read: {_first_line(error)}"
            ) from error
        layers.append((f"override {override!r}", layer))
        if key in _MAPPINGS:
            replaced[f"override {override!r}"] = key
    merged = OmegaConf.structured(Config)
    _unlock(merged)
    problems = []
    for origin, layer in layers:
        unknown = list(_unknown_keys(layer, Config, ""))
        problems += [f"{origin}: {problem}" for problem in unknown]
        if not unknown:
            try:
                if origin in replaced:
                    key = replaced[origin]
                    OmegaConf.update(merged, key, None if key == "data.train" else {}, merge=False)
                merged = OmegaConf.merge(merged, _without_interpolation(layer))
            except (OmegaConfBaseException, ValueError) as error:
                problems.append(f"{origin}: {_type_problem(error)}")
    raise_all(problems)
    try:
        config = typing.cast(Config, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{source}: {_type_problem(error)}") from error
    check(config)
    return config


def dump(config: Config) -> str:
    """The resolved config as YAML, readable by `load`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def _unlock(node: DictConfig) -> None:
    """OmegaConf locks what it reads from frozen dataclasses; the merge happens before they
    exist.
    """
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _unlock(child)


def _holds_text(key: str, text: str) -> bool:
    """Whether the setting is a string, whose override is no YAML: `data.system_prompt=Parse: {x} #
    y`.
    """
    if key == "data.train":
        return not text.lstrip().startswith("{")  # a mapping of sources to weights is YAML
    kind: Any = Config
    for part in key.split("."):
        fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        kind = {f.name: f.type for f in fields}.get(part)
    return kind in (str, str | None)


def _plain_text(text: str) -> str | None:
    """The value as it stands; null or nothing is None, and quotes around the whole are taken
    off.
    """
    if text in ("", "null", "~"):
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            inner = yaml.safe_load(text)
        except yaml.YAMLError:
            return text
        return inner if isinstance(inner, str) else text
    return text


def _nest(path: Sequence[str], value: Any) -> Any:
    return {path[0]: _nest(path[1:], value)} if path else value


def _without_interpolation(value: Any) -> Any:
    """`${` is text here: escaped, OmegaConf gives it back as it was written."""
    if isinstance(value, dict):
        return {key: _without_interpolation(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_interpolation(inner) for inner in value]
    if value == "???":  # OmegaConf's mark for nothing given: the default would stand in silence
        raise ValueError("the value '???' is reserved; write what you mean")
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return value


def _unknown_keys(content: Any, kind: type, prefix: str) -> Iterable[str]:
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    if not isinstance(content, dict):
        return
    for key, inner in content.items():
        if key not in fields:
            everywhere = [
                *fields,
                *(path for path in all_keys(Config, "") if path.endswith(f".{key}")),
            ]
            moved = [path for path in everywhere if path.endswith(f".{key}")]
            hint = f" Did you mean {moved[0]!r}?" if moved else nearest(str(key), fields)
            yield (
                f"unknown key {prefix + str(key)!r}; {prefix.rstrip('.') or 'the config'} has: "
                f"{', '.join(fields)}.{hint}"
            )
        elif dataclasses.is_dataclass(fields[key]) and not isinstance(inner, dict):
            yield f"{prefix}{key}={inner!r} must be a mapping of settings"
        elif dataclasses.is_dataclass(fields[key]):
            yield from _unknown_keys(inner, typing.cast(type, fields[key]), f"{prefix}{key}.")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _type_problem(error: Exception) -> str:
    """`train.steps: Value 'ten' of type 'str' could not be converted to Integer`, from OmegaConf's
    three lines.
    """
    key = getattr(error, "full_key", None)
    return f"{key}: {_first_line(error)}" if key else _first_line(error)
