"""Rendering of chat templates within limits of time and memory.

    render(source, [{"role": "user", "content": "2+2?"}], tools=None, add_generation_prompt=True)

A template is a program written by others. transformers runs it in Jinja's sandbox, which denies
access to files and code, but lets it loop for hours or build gigabytes. Here, the same program is
compiled with counters for every iteration of a loop, every call, and the size of every text and
list that it makes. A template that a limit has stopped is not run again.
"""

import functools
import itertools
import math
import re
import time
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from lora_jax.data.counters import COMPARED, COUNTED, WRITTEN, with_counters
from lora_jax.errors import UserError

LONGEST = 200_000  # characters of a template; known ones have up to 60,000
_SECONDS = 2.0  # of CPU time for one conversation
_SECONDS_IN_ALL = 6.0  # of CPU time for all conversations of a template that take over _SLOW
_SLOW = 0.2
_LARGEST = 32_000_000  # bytes of one text or list
_MADE = 800_000_000  # bytes of all texts and lists of one conversation
_WIDEST = 100_000  # a width or count passed to a method or filter
_BITS = 100_000  # of an integer
_SLOW_TEXT = 200_000  # characters for filters whose time grows superlinearly
_SLOW_FILTERS = ("striptags", "urlize", "wordwrap", "pprint", "xmlattr", "title", "truncate")
_HEADER = "".__sizeof__()  # bytes of a text beyond its characters
_ITEM = 32  # bytes counted for an item of a list, in addition to its own size
_DIGITS = re.compile(r"\d{6,}")


class TemplateLimit(UserError):
    """Refusal of a chat template that exceeds its limit of time or memory."""


class _Budget:
    """Time and memory used by one conversation, checked against the limits."""

    def __init__(self) -> None:
        self.start = time.thread_time()
        self.steps = 0
        self.made = 0

    @property
    def taken(self) -> float:
        return time.thread_time() - self.start

    def step(self, size: int = 0) -> None:
        """Count one step that made `size` bytes."""
        self.steps += 1
        self.made += size
        if size > _LARGEST:
            raise TemplateLimit(f"it makes a text or list of {size:,} bytes at once")
        if self.made > _MADE:
            raise TemplateLimit(f"it makes texts and lists of {self.made:,} bytes")
        if self.steps & 63 == 0 or size > 50_000:
            self.check_time()

    def check_time(self) -> None:
        if self.taken > _SECONDS:
            raise TemplateLimit(f"it takes more than {_SECONDS:g} seconds for one conversation")


_BUDGET: ContextVar[_Budget] = ContextVar("lora_jax_template_budget")
_FAILED: dict[str, str] = {}  # reasons of templates that were stopped, by source
_SPENT: dict[str, float] = {}  # seconds of slow conversations, by source


def _count(value: Any) -> Any:
    """Count a value that a template made, and return it."""
    budget = _BUDGET.get(None)
    if budget is not None:
        budget.step(_size(value))
    return value


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return max(0, value.__sizeof__() - _HEADER)
    if isinstance(value, list | tuple | dict | set | frozenset):
        return 64 * len(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value.bit_length() // 8
    return 0


def _refuse_size(size: float) -> None:
    if size > _LARGEST:
        raise TemplateLimit(f"it makes a text or list of {size:.1e} bytes at once")


def _before_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too large."""
    if operator == "*":
        for one, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(one, str | bytes | list | tuple):
                _refuse_size(_size(one) * max(times, 0))
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else 0
        if bits > _BITS or left.bit_length() > _BITS or right.bit_length() > _BITS:
            raise TemplateLimit(f"it makes a number of more than {_BITS:,} bits")
    if operator == "%" and isinstance(left, str | bytes):
        _before_format(left, right if isinstance(right, tuple) else (right,))


def _before_format(text: Any, values: Iterable[Any]) -> None:
    """Refuse a format whose result would be too large."""
    found = text.decode("latin-1") if isinstance(text, bytes) else text
    values = list(values)
    numbers = [v for v in values if isinstance(v, int) and abs(v) > _WIDEST]
    nested = found.count("{") > 1  # {:{}} takes its width from a value
    if _DIGITS.search(found) or (numbers and ("*" in found or nested)):
        raise TemplateLimit("it formats to a width of more than 100,000")
    fields = found.count("%") + found.count("{")
    _refuse_size(fields * sum(_deep_size(value) for value in values))


def _refuse_deep(*values: Any) -> None:
    """Refuse values that are too large to be compared or hashed.

    A list that contains one list twice, and so on for sixty levels, is small but takes forever.
    """
    for value in values:
        if isinstance(value, _CONTAINERS):
            size = _deep_size(value)
            _refuse_size(size)
            if size > 50_000 and (budget := _BUDGET.get(None)) is not None:
                budget.check_time()


def _deep_size(value: Any, indent: int = 0) -> int:
    """Return the bytes of a value as text with `indent` per level; stop soon after `_LARGEST`."""
    size, waiting = 0, [(value, 1)]
    while waiting and size <= _LARGEST:
        one, depth = waiting.pop()
        if isinstance(one, Mapping):
            size += sum(_size(key) for key in one)
            one = list(one.values())
        if isinstance(one, list | tuple | set | frozenset):
            size += len(one) * (_ITEM + depth * indent)
            waiting += [(item, depth + 1) for item in one] if size <= _LARGEST else []
        else:
            size += _size(one)
    return size


def _before_call(name: str, subject: Any, arguments: Sequence[Any]) -> None:
    """Refuse a call of a method or filter whose result would be too large."""
    for value in arguments if name in _WIDTHS else ():
        if isinstance(value, int) and abs(value) > _WIDEST:
            raise TemplateLimit(f"it calls {name} with {_brief(value)}")
    if name in _SLOW_FILTERS and isinstance(subject, str) and len(subject) > _SLOW_TEXT:
        raise TemplateLimit(f"it calls {name} with a text of {len(subject):,} characters")
    if name == "join":
        _refuse_join(subject, arguments)
    elif name == "replace" and isinstance(subject, str) and len(arguments) > 1:
        old, new = str(arguments[0]), str(arguments[1])
        _refuse_size(_size(subject) + (subject.count(old) if old else len(subject)) * _size(new))
    elif name == "translate" and isinstance(subject, str):
        _refuse_size(len(subject) * max([1, *map(_size, _values(arguments))]))
    elif name in ("indent", "tojson", "expandtabs", "batch", "slice") and arguments:
        widths = [v if isinstance(v, int) else _size(v) for v in arguments]
        lines = subject.count("\n") + subject.count("\t") + 1 if isinstance(subject, str) else 1
        _refuse_size(lines * max([0, *widths]))
        _refuse_size(_deep_size(subject, max([0, *widths])) if name == "tojson" else 0)
    elif name == "wordwrap" and isinstance(subject, str):
        _refuse_size(len(subject) * max([1, *(_size(v) for v in arguments)]))
    elif name == "format":
        _before_format(str(subject), arguments)


_COMPARING = ("sort", "unique", "max", "min", "groupby", "dictsort")
_CONTAINERS = (list, tuple, set, frozenset, Mapping)
_STRUCTURAL = frozenset(  # filters that do not convert a list to text
    """
    attr batch count d default dictsort first groupby items join last length list map max min
    random reject rejectattr reverse select selectattr slice sort sum unique
    """.split()
)
_WIDTHS = frozenset(
    """
    center ljust rjust zfill expandtabs indent batch slice tojson to_bytes wordwrap truncate round
    lipsum format
    """.split()
)


def _refuse_join(one: Any, others: Sequence[Any]) -> None:
    """Refuse to join texts whose result is too large; either argument may be the separator."""
    given = (one, *others)
    lists = [list(v) for v in given if isinstance(v, Collection) and not isinstance(v, str | bytes)]
    separators = [value for value in given if isinstance(value, str)]
    for first, second in itertools.pairwise(separators):  # second.join(first) joins characters
        _refuse_size(len(first) * _size(second))
    for items in lists:
        size = sum(map(_deep_size, items)) + len(items) * sum(map(_size, separators))
        _refuse_size(size)


def _values(tables: Iterable[Any]) -> Iterable[Any]:
    """Yield the items of lists and the values of mappings."""
    for table in tables:
        yield from table.values() if isinstance(table, Mapping) else table


def _brief(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, int) and abs(value) < 10**300 else "a huge number"


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with counters; see the docstring of the module."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _before_operator(operator, left, right)
        return _count(self.binop_table[operator](left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        subject = getattr(__obj, "__self__", None)
        name = getattr(__obj, "__name__", "")
        _count(None)
        if not isinstance(__obj, jinja2.runtime.Macro):
            _refuse_deep(*args, *kwargs.values())
        if isinstance(subject, str | bytes | int | float | list | tuple | dict):
            if name == "join":
                args = tuple(list(v) if isinstance(v, Iterator) else v for v in args)  # read once
            if name in ("index", "count"):
                _refuse_deep(subject)
            _before_call(name, subject, [*args, *kwargs.values()])
        return _count(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        made = super().wrap_str_format(value)
        if made is None:
            return None

        @functools.wraps(made)
        def limited(*args: Any, **kwargs: Any) -> str:
            _before_format(value.__self__, [*args, *kwargs.values()])
            return made(*args, **kwargs)

        return limited

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return with_counters(super()._parse(source, name, filename))


@jinja2.pass_context
def _counted_filter(context: Any, value: Any) -> Any:  # the context prevents constant folding
    return _count(value)


@jinja2.pass_context
def _compared_filter(context: Any, value: Any) -> Any:
    _refuse_deep(value)
    return value


@jinja2.pass_context
def _written_filter(context: Any, value: Any) -> Any:
    if isinstance(value, _CONTAINERS):
        _refuse_size(_deep_size(value))
    return _count(value)


def _limited(name: str, function: Callable) -> Callable:
    """Return a filter of Jinja that checks its arguments and counts its result."""
    given = getattr(function, "jinja_pass_arg", None)
    skipped = 0 if given is None else 1

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        own = args[skipped:]
        subject = own[0] if own else None
        if name == "join" and not isinstance(subject, str | list | tuple | Mapping):
            subject = list(subject or ())  # a generator, read once
            args = (*args[:skipped], subject, *own[1:])
        if name in _COMPARING:
            if not isinstance(subject, str | list | tuple | Mapping):
                subject = list(subject or ())
                args = (*args[:skipped], subject, *own[1:])
            _refuse_deep(subject)
        if name == "sum" and not _is_numeric(args[skipped + 2 :], kwargs):
            raise TemplateLimit("it adds lists or texts up with sum")
        if isinstance(subject, _CONTAINERS) and name not in _STRUCTURAL:
            _refuse_size(_deep_size(subject))  # it is converted to text
        _before_call(name, subject, [*own[1:], *kwargs.values()])
        return _count(function(*args, **kwargs))

    return limited


def _limited_test(function: Callable) -> Callable:
    """Return a test of Jinja that refuses to compare large values."""

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _refuse_deep(*args, *kwargs.values())
        return function(*args, **kwargs)

    return limited


def _is_numeric(positional: Sequence[Any], named: Mapping[str, Any]) -> bool:
    start = named.get("start", positional[0] if positional else 0)
    return isinstance(start, int | float)


def _lipsum(*args: Any, **kwargs: Any) -> str:
    raise TemplateLimit("it writes random text with lipsum")


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    """Return the Jinja environment of transformers with limits on its filters and functions."""
    made: Any = chat_template_utils._compile_jinja_template("").environment.overlay()
    made.__class__ = _Environment
    made.filters = {name: _limited(name, function) for name, function in made.filters.items()}
    made.filters |= {
        COUNTED: _counted_filter,
        WRITTEN: _written_filter,
        COMPARED: _compared_filter,
    }
    made.tests = {
        name: _limited_test(test) if name == "in" or test.__module__ == "_operator" else test
        for name, test in made.tests.items()
    }
    made.globals = {**made.globals, "lipsum": _lipsum}
    return made


@functools.lru_cache(maxsize=128)
def _compile(source: str) -> jinja2.Template:
    if len(source) > LONGEST:
        raise TemplateLimit(f"it has {len(source):,} characters, more than {LONGEST:,}")
    return _environment().from_string(source)


def _with_limits(renderer: Callable) -> Callable:
    """Return the renderer of transformers with the compiler replaced by that of this module."""
    if "_compile_jinja_template" not in renderer.__code__.co_names:
        raise ImportError("this version of transformers renders chat templates in another way")
    names = {**renderer.__globals__, "_compile_jinja_template": _compile}
    made = types.FunctionType(renderer.__code__, names, renderer.__name__, renderer.__defaults__)
    made.__kwdefaults__ = renderer.__kwdefaults__
    return made


_render = _with_limits(chat_template_utils.render_jinja_template)


def render(source: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """Return the result of transformers' `render_jinja_template` for one conversation.

    Raises:
        TemplateLimit: the template needs too much time or memory, now or in an earlier call.
        Exception: any exception that the template raises.
    """
    if source in _FAILED:
        raise TemplateLimit(_FAILED[source])
    budget = _Budget()
    token = _BUDGET.set(budget)
    try:
        return _render([list(messages)], chat_template=source, **options)
    except TemplateLimit as error:
        raise _stop(source, str(error)) from error
    except MemoryError as error:
        raise _stop(source, "it needs more memory than there is") from error
    finally:
        _BUDGET.reset(token)
        if (taken := budget.taken) > _SLOW:
            _SPENT[source] = _SPENT.get(source, 0.0) + taken
            if _SPENT[source] > _SECONDS_IN_ALL + _allowed(messages):
                _stop(source, f"it takes {taken:.1f} seconds for one conversation")


def _allowed(messages: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds in all that are granted to long conversations beyond `_SECONDS_IN_ALL`."""
    size = sum(_deep_size(message) for message in messages)
    return math.inf if size > 1_000_000 else 0.0


def _stop(source: str, reason: str) -> TemplateLimit:
    _FAILED[source] = f"the chat template was stopped: {reason}; use another data.chat_template"
    return TemplateLimit(_FAILED[source])
