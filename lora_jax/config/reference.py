"""docs/configuration.md, written from lora_jax/config/settings.py: keys, types, defaults and
comments stand there only.

    python -m lora_jax.config.reference > docs/configuration.md
"""

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import yaml

from lora_jax.config import Config

Setting = tuple[str, str, str, str]  # key, type, default as in YAML, comment

_HEAD = """# Configuration

Every setting, from `lora_jax/config/settings.py`. Write it in the YAML file of a run, or give it
on the command line, as in `train.steps=10`; `null` is nothing set. An unknown key is an error.

This page is generated: `python -m lora_jax.config.reference > docs/configuration.md`"""


def describe_config() -> list[Setting]:
    """Every setting in the order of the dataclasses. The comment is the one behind the field, empty
    if there is none.
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
    """Name -> (annotation, comment on the line where the field ends)."""
    source = inspect.getsource(kind)
    lines = source.encode().splitlines()  # ast counts columns in bytes
    fields = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.AnnAssign)]
    return {
        ast.unparse(node.target): (
            ast.unparse(node.annotation),
            lines[(node.end_lineno or 0) - 1][node.end_col_offset :].decode().strip("# "),
        )
        for node in fields
    }


def _as_yaml(value: Any) -> str:
    """As the command line takes it: null, true, 1e-08, [exact_match]."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def to_markdown(settings: list[Setting]) -> str:
    """The page: one table per section; top-level keys come first."""
    lines, section = [_HEAD], None
    for key, kind, default, comment in settings:
        here = key.rpartition(".")[0] or "Top level"
        if here != section:
            section = here
            lines += [f"\n## {here}\n", "| key | type | default | |", "|---|---|---|---|"]
        cells = (f"`{key}`", f"`{kind}`", f"`{default}`", comment)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(to_markdown(describe_config()))
