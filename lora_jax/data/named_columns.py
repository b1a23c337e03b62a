"""Format strings with {column} in them, such as data.prompt and data.completion.

    fill({"a": 1, "b": [2]}, "prompt", "{a} of {b}")  # "1 of [2]"

{{ and }} are literal braces. Values other than strings are written as JSON: 3, true, null,
["a", "b"]; dates in ISO 8601.
"""

import functools
import json
import re
from typing import Any

from lora_jax.data.rows import BadRow, kind, listed, printable
from lora_jax.errors import UserError, nearest

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def columns(template: str, setting: str) -> tuple[str, ...]:
    """Return the columns named by `template`, the value of `setting`.

    Raises:
        UserError: `template` has braces that are not {column}, {{ or }}.
    """
    return tuple(column for _, column in _pieces(template, setting) if column is not None)


def fill(record: dict, key: str, template: str | None, setting: str | None = None) -> str:
    """Return `template` with the columns of a record put in; None is the string column `key`.

    setting: the name of the template in errors; data.KEY by default

    Raises:
        BadRow: columns that the record does not have, or that cannot be written as text.
        UserError: see `columns`.
    """
    names = listed([*map(repr, record)])
    setting = setting or f"data.{key}"
    if template is None:
        if key not in record:
            raise BadRow(f"no column {key!r}, and {setting} is not set; the columns are: {names}")
        if not isinstance(record[key], str):
            raise BadRow(f"{key!r} is {kind(record[key])}, not a string; set {setting}")
        return record[key]
    if template in record:  # otherwise the text of every row would be the column's name
        raise BadRow(f"{setting}={template!r} is a column's name: write {{{template}}}")
    filled = ""
    for text, column in _pieces(template, setting):
        if column is not None and column not in record:
            hint = nearest(column[:100], map(str, record))
            raise BadRow(
                f"{setting} names {{{printable(column)}}}; the columns are: {names}.{hint}"
            )
        if column is not None and key == "completion" and record[column] is None:
            raise BadRow(f"column {column!r} of {setting} is null: nothing to learn from")
        filled += text if column is None else text + _rendered(record[column], column)
    return filled


@functools.lru_cache(maxsize=16)
def _pieces(template: str, setting: str) -> tuple[tuple[str, str | None], ...]:
    """Return (text before, column) for every column, and (text at the end, None)."""
    pieces, text, end = [], "", 0
    for found in _BRACES.finditer(template):
        text += template[end : found.start()]
        end, column = found.end(), found[1]
        if found[0] in ("{{", "}}"):
            text += found[0][0]
        elif column and not re.search(r"[.\[\]!:]", column):
            pieces.append((text, column))
            text = ""
        else:
            raise UserError(
                f"{setting}={printable(repr(template))} has {printable(found[0])!r}, which is "
                "not a {column}: put only the name of a column in braces, without . [ ] ! or :, "
                "and write a literal brace as {{ or }}"
            )
    return (*pieces, (text + template[end:], None))


def _rendered(value: Any, column: str) -> str:
    if isinstance(value, str):
        return value
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_outside_json)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"column {column!r} cannot be written as JSON: {error}") from error
    return text.strip('"') if hasattr(value, "isoformat") else text


def _outside_json(value: Any) -> Any:
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "tolist"):  # arrays and scalars of numpy
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON type")
