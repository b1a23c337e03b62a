"""YAML text to a tree of mappings, lists and scalars as written, within limits.

    read("train: {steps: 10}", "run.yaml")     # {"train": {"steps": Written("10")}}

The scalars keep their text and line: `types.convert` gives them the types of their settings. Tags,
other than those of plain values, are refused; aliases are counted where they are used.
"""

from typing import Any

import yaml

from lora_jax.config.types import Written
from lora_jax.errors import UserError

_LONGEST = 2_000_000  # characters
_DEEPEST = 32
_MOST = 50_000  # values, those that aliases repeat counted each time
_MERGE = "tag:yaml.org,2002:merge"
_PLAIN = ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")
_TAGS = {f"tag:yaml.org,2002:{name}" for name in (*_PLAIN, "map", "seq")}


def read(text: str, name: str) -> Any:
    """Return the one document in a text; None if it is empty.

    Raises:
        UserError: text that is not YAML, or several documents; a key that is not text or is there
            twice; tags; too long, deep or many values. The message begins with `name` and the line.
    """
    if len(text) > _LONGEST:
        raise UserError(f"{name}: {len(text):,} characters are too many for settings")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.build(node, 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = ", ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{name} is not valid YAML: {place}{reason}") from error
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} is not valid YAML: {reason}") from error


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str):
        self.depth = self.composed = self.built = 0
        super().__init__(text)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node as PyYAML does, within limits."""
        mark = self.peek_event().start_mark
        self.depth, self.composed = self.depth + 1, self.composed + 1
        self._check(mark, self.depth, self.composed)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _check(self, mark: Any, depth: int, count: int) -> None:
        if depth > _DEEPEST:
            raise _error(mark, f"nested deeper than {_DEEPEST}")
        if count > _MOST:
            raise _error(mark, f"more than {_MOST:,} values")

    def build(self, node: yaml.Node, depth: int) -> Any:
        """Return the tree of a node."""
        self.built += 1
        self._check(node.start_mark, depth, self.built)
        if node.tag not in _TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise _error(node.start_mark, f"the tag {tag} is not supported; write a plain value")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(one, depth + 1) for one in node.value]
        return self._mapping(node, depth)

    def _mapping(self, node: Any, depth: int) -> dict:
        found: dict[Written, Any] = {}
        merged: dict[Written, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _error(key_node.start_mark, "a key must be a name, not a list or a mapping")
            value = self.build(value_node, depth + 1)
            if key_node.tag == _MERGE:
                parts = value if isinstance(value, list) else [value]
                if not all(isinstance(part, dict) for part in parts):
                    raise _error(value_node.start_mark, "<< takes a mapping or a list of them")
                for part in parts:
                    merged = part | merged
                continue
            if key_node.tag not in _TAGS:
                raise _error(key_node.start_mark, f"the tag {key_node.tag} is not supported")
            key = _scalar(key_node)
            if key in found:
                raise _error(key_node.start_mark, f"the key {str(key)!r} appears twice")
            found[key] = value
        return {**merged, **found}


def _scalar(node: yaml.ScalarNode) -> Written:
    text = node.value
    if "\0" in text:
        raise _error(node.start_mark, "text with a null character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _error(node.start_mark, "text with half of a surrogate pair") from None
    return Written(text, node.style is None, node.start_mark.line + 1)


def _error(mark: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
