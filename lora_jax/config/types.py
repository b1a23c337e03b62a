"""Conversion of values to the types of their settings, from text in a file and from Python.

    convert(Written("1e-3"), float)          # 0.001
    convert(Written("no"), list[str])        # ["no"]: text is taken as written, one name is a list
    convert(Written("null"), int | None)     # None
    fits(2.5, int)                           # False

A setting has one of these types, or a union of them: bool, int, float, str, list, dict, None. The
type decides how a scalar is read, so a label `no` is text and `packing: no` is false.
"""

import math
import numbers
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from lora_jax.config.text import quoted

_NULLS = ("", "~", "null", "Null", "NULL")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")  # 010 is eight in YAML 1.1: it is none here
_FLOAT = re.compile(
    r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.?(inf|nan)",
    re.IGNORECASE,
)
_LONGEST_NUMBER = 400  # characters; Python takes its time for more
_NAMES = {
    **{bool: "true or false", int: "a whole number", float: "a number", str: "text"},
    **{type(None): "null", list: "a list", dict: "a mapping", Any: "a value"},
}


class Written(str):
    """A scalar as written in YAML. `plain`: without quotes, so that null and true may be meant;
    `line` counts from 1, and is 0 where there are no lines.
    """

    plain: bool
    line: int

    def __new__(cls, text: str, plain: bool = True, line: int = 0) -> "Written":
        made = super().__new__(cls, text)
        made.plain, made.line = plain, line
        return made


def convert(value: Any, kind: Any) -> Any:
    """Return `value`, a tree of text or of Python values, as a value of the type `kind`.

    Raises:
        ValueError: "is not a whole number" and the like, to follow the value.
    """
    kinds = _members(kind)
    if is_null(value):
        if type(None) not in kinds:
            raise ValueError(f"is not {describe(kind)}{'; [] is none' * _is_list(kind)}")
        return None
    for one in kinds:
        try:
            return _convert(value, one)
        except _Other:
            continue
    lists = [one for one in kinds if typing.get_origin(one) is list]
    if lists and not isinstance(value, Mapping | list | tuple):
        return convert([value], lists[0])
    raise ValueError(f"is not {describe(kind)}")


def is_null(value: Any) -> bool:
    return value is None or (isinstance(value, Written) and value.plain and value in _NULLS)


def takes_text(kind: Any) -> bool:
    """Return True if a scalar of this type may be any text."""
    return str in _members(kind)


def takes_structure(kind: Any) -> bool:
    """Return True if a value of this type may be a list or a mapping."""
    return any(one is Any or typing.get_origin(one) in (list, dict) for one in _members(kind))


def item_kind(kind: Any) -> Any:
    """Return the type of the values of a mapping, or None if the type has none."""
    found = [typing.get_args(one)[1] for one in _members(kind) if typing.get_origin(one) is dict]
    return found[0] if found else None


def describe(kind: Any) -> str:
    """Describe a type in words: `a whole number or null`."""
    names = []
    for one in _members(kind):
        origin, inner = typing.get_origin(one), typing.get_args(one)
        name = _NAMES.get(origin or one, str(one))
        if origin is list and inner[0] is not Any:
            name = f"{name} of {_plural(inner[0])}"
        if origin is dict and inner[1] is not Any:
            name = f"{name} of names to {_plural(inner[1])}"
        names.append(name)
    return " or ".join(names)


def as_setting(value: Any) -> str:
    """Return a value as a file of settings has it, for messages: null, true, 'text'."""
    if is_null(value):
        return "null"
    return str(value).lower() if isinstance(value, bool) else quoted(_plain_tree(value))


def fits(value: Any, kind: Any) -> bool:
    """Return True if a Python value is of the type `kind`; tuples are lists, and NumPy's numbers
    are numbers.
    """
    if kind is Any:
        return True
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return any(fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list | tuple) and all(fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            isinstance(key, str) and fits(one, inner[1]) for key, one in value.items()
        )
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)


def is_finite(value: Any) -> bool:
    """Return True for a number that float64 can hold."""
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):  # no number; an integer of hundreds of digits
        return False


class _Other(Exception):
    """The value is of another type."""


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is types.UnionType else (kind,)


def _is_list(kind: Any) -> bool:
    return any(typing.get_origin(one) is list for one in _members(kind))


def _plural(kind: Any) -> str:
    return {int: "whole numbers", float: "numbers", str: "names"}.get(kind, "values")


def _convert(value: Any, kind: Any) -> Any:
    """Convert a value that is not null to a type that is no union.

    Raises:
        _Other: the value is of another type.
        ValueError: it is of this type, and something in it is wrong.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _resolve(value)
    if origin is list and isinstance(value, list | tuple):
        return [_inside(one, inner[0], f"item {i + 1}") for i, one in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _inside(one, inner[1], str(key)) for key, one in value.items()}
    if origin or isinstance(value, Mapping | list | tuple):
        raise _Other
    if kind is str:
        if isinstance(value, bool | float) or not isinstance(value, str | int):
            raise _Other
        return str(value)
    read = {bool: _read_bool, int: _read_integer, float: _read_float}.get(kind)
    if read is None:
        raise _Other
    return read(value)


def _inside(value: Any, kind: Any, place: str) -> Any:
    try:
        return convert(value, kind)
    except ValueError as error:
        raise ValueError(f"has {place}={as_setting(value)}, which {error}") from None


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() not in (*_TRUE, *_FALSE):
        raise _Other
    return value.lower() in _TRUE


def _read_integer(value: Any) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if not isinstance(value, str) or not _INTEGER.fullmatch(value):
        raise _Other
    return _number(value, int)


def _read_float(value: Any) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return _number(value, float)
    if not isinstance(value, str) or not _FLOAT.fullmatch(value):
        raise _Other
    return _number(value.replace(".inf", "inf").replace(".nan", "nan").lower(), float)


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, str) and len(value) > _LONGEST_NUMBER:
        raise ValueError(f"is a number of {len(value)} characters")
    try:
        return kind(value)
    except OverflowError:
        raise ValueError("is too large a number") from None


def _resolve(value: Any) -> Any:
    """Return a value of no declared type, with scalars as YAML reads them."""
    if isinstance(value, Mapping):
        return {str(key): _resolve(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_resolve(one) for one in value]
    if not isinstance(value, Written):
        return value
    if is_null(value):
        return None
    if value.plain:
        for read in (_read_bool, _read_integer, _read_float):
            try:
                if read is not _read_float or value.lower().lstrip("+-") not in ("inf", "nan"):
                    return read(value)
            except _Other:
                continue
    return str(value)


def _plain_tree(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain_tree(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_tree(one) for one in value]
    if not isinstance(value, Written):
        return value
    if len(value) > _LONGEST_NUMBER:
        return str(value)
    resolved = _resolve(value)
    return resolved if repr(resolved).lower() == value.lower() else str(value)
