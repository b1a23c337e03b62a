"""Tool calls in a canonical form, so that answers with the same calls are equal texts.

    <tool_call>\\n{"name": "add", "arguments": {"b": 2,"a": 1}}\\n</tool_call>
    <tool_call> {"arguments": {"a": 1, "b": 2}, "name": "add"} </tool_call>

Only the formatting of JSON changes. Marks and names around it remain, because a server needs them.
"""

import ast
import json
import re
import warnings
from typing import Any

_DECODER = json.JSONDecoder()
_OPENING = re.compile(r"[{\[]")
# One argument in XML: <parameter=..> of Qwen3-Coder and MiniMax, or <arg_key> of GLM.
_ARGUMENT = re.compile(
    r'<((?:\w+:)?parameter)(?:=|\s+name=")([^">]+)"?[^>]*>(.*?)</\1>'
    r"|<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>",
    re.DOTALL,
)
_ARGUMENTS = re.compile(rf"(?:(?:{_ARGUMENT.pattern})\s*)+", re.DOTALL)
_PYTHON = re.compile(r"\[\s*[\w.]+\(.*\)\s*\]", re.DOTALL)  # [add(a=1, b=2)], the format of LFM2
_TAG = re.compile(r"</?[\w:]+(?:=[^<>\s]+)?>")
_IDS = ("id", "index", "type")  # keys of a call that are left out


def canonical(text: str) -> str:
    """Return text whose JSON is compact with sorted keys, and other whitespace one space.

    Arguments that are a string of JSON are parsed, IDs of calls are left out, and arguments in XML
    or Python are rewritten as JSON. Other text is unchanged.
    """
    text = _PYTHON.sub(lambda found: _from_python(found[0]), text)
    text = _ARGUMENTS.sub(lambda found: _from_xml(found[0]), text)
    parts, after = [], 0
    for opening in _OPENING.finditer(text):
        start = opening.start()
        if start < after:
            continue
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        parts += [*_words(text[after:start]), _write(_call(value))]
        after = end
    return " ".join([*parts, *_words(text[after:])])


def _words(text: str) -> list[str]:
    """Return the words and tags of text without JSON."""
    return _TAG.sub(r" \g<0> ", text).split()


def _write(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _call(value: Any) -> Any:
    """Return a call or list of calls without IDs and with parsed arguments, or other JSON."""
    if isinstance(value, list):
        return [_call(one) for one in value]
    if not isinstance(value, dict) or "name" not in value:
        return value
    key = next((key for key in ("arguments", "parameters") if key in value), None)
    if key is None:
        return value
    kept = {name: part for name, part in value.items() if name not in _IDS}
    return kept | {key: _parsed(value[key])}


def _parsed(value: Any) -> Any:
    """Return the object or list in a JSON string; return any other value unchanged."""
    try:
        found = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict | list) else value


def _from_xml(text: str) -> str:
    found: dict[str, Any] = {}
    for _, name, value, key, other in _ARGUMENT.findall(text):
        found[(name or key).strip()] = _parsed((value if name else other).strip())
    return _write(found)


def _from_python(text: str) -> str:
    """Return a list of Python calls with keywords as JSON; return other text unchanged."""
    try:
        with warnings.catch_warnings(action="ignore"):  # escapes that Python does not know
            listed = ast.parse(text, mode="eval").body
        if isinstance(listed, ast.List):
            return _write([_python_call(call) for call in listed.elts])
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        pass
    return text


def _python_call(node: ast.expr) -> dict[str, Any]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with keywords alone")
    arguments = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    return {"name": ast.unparse(node.func), "arguments": arguments}
