"""Generator of docs/configuration.md from `settings.py` and `adapter.py`, which define the type,
default, rule and comment of every setting.

    python -m lora_jax.config.reference > docs/configuration.md
"""

import ast
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from lora_jax.config import Config, options_of

Setting = tuple[str, str, str, str]  # key, type, default as in YAML, comment

_HEAD = """# Configuration

Every setting, from `settings.py`, `adapter.py` and `objective.py` of `lora_jax/config`. Write it in
the YAML file of a run, or give it on the command line, as in `train.steps=10`; `null` is nothing
set. An unknown key is an error.

This page is generated: `python -m lora_jax.config.reference > docs/configuration.md`"""
_COLUMNS = ("key", "type", "default", "values", "meaning")


def describe_config() -> list[Setting]:
    """Return every setting in the order of the dataclasses. The comment is that above the field,
    empty if there is none.
    """
    return list(_describe(Config, ""))


def _describe(kind: type, prefix: str) -> Iterator[Setting]:
    sources, default = _fields_as_written(kind), kind()
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            yield from _describe(type(value), f"{prefix}{field.name}.")
        else:
            written, comment = sources[field.name]
            yield prefix + field.name, written, _as_yaml(value), comment


def _fields_as_written(kind: type) -> dict[str, tuple[str, str]]:
    """Return name -> (annotation, comment on the lines above the field)."""
    source = inspect.getsource(kind)
    lines = source.splitlines()
    fields = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.AnnAssign)]
    return {
        ast.unparse(node.target): (
            ast.unparse(node.annotation),
            _comment_above(lines[: node.lineno - 1]),
        )
        for node in fields
    }


def _comment_above(lines: Sequence[str]) -> str:
    """Return the comment that ends with the last of these lines, in one line."""
    found: list[str] = []
    for line in reversed(lines):
        if not line.strip().startswith("#"):
            break
        found.insert(0, line.strip("# "))
    return " ".join(found)


def _as_yaml(value: Any) -> str:
    """Return a default as the command line takes it: null, true, 1e-08, [exact_match]."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def to_markdown(settings: list[Setting]) -> str:
    """Return the page: one table per section; top-level keys come first."""
    lines, section, rules = [_HEAD], None, options_of(Config)
    for key, kind, default, comment in settings:
        here = key.rpartition(".")[0] or "Top level"
        if here != section:
            section = here
            lines += [f"\n## {here}\n", _row(_COLUMNS), f"|{'---|' * len(_COLUMNS)}"]
        values = rules[key].values()
        lines.append(_row((f"`{key}`", f"`{kind}`", f"`{default}`", values, comment)))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |".replace("|  |", "| |")


if __name__ == "__main__":
    print(to_markdown(describe_config()))
