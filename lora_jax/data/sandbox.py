"""Rendering of chat templates within limits of time and memory.

    render(source, [{"role": "user", "content": "2+2?"}], tools=None, add_generation_prompt=True)

A template is somebody else's program. transformers runs it in Jinja's sandbox, which keeps it from
files and code, but not from looping for hours or building gigabytes. Here the same program is
compiled with counters in it: every pass of a loop, every call, and the size of every text and list
that it makes. A template that was stopped by a limit once is not run again.
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

from lora_jax.errors import UserError

LONGEST = 200_000  # characters of a template; those in use have up to 60,000
_SECONDS = 2.0  # of CPU for one conversation
_SECONDS_IN_ALL = 6.0  # of CPU for the conversations of a template that take more than _SLOW
_SLOW = 0.2
_LARGEST = 32_000_000  # bytes of one text or list
_MADE = 800_000_000  # bytes of all texts and lists of one conversation
_WIDEST = 100_000  # a number that a method or filter is called with
_BITS = 100_000  # of an integer
_SLOW_TEXT = 200_000  # characters for filters whose time grows faster than the text
_SLOW_FILTERS = ("striptags", "urlize", "wordwrap", "pprint", "xmlattr", "title", "truncate")
_HEADER = "".__sizeof__()  # bytes of a text beyond its characters
_ITEM = 32  # bytes that an item of a list counts for at least
_DIGITS = re.compile(r"\d{6,}")


class TemplateLimit(UserError):
    """A chat template needs more time or memory than one may."""


class _Budget:
    """Time and memory that is left to one conversation."""

    def __init__(self) -> None:
        self.start = time.thread_time()
        self.steps = 0
        self.made = 0

    @property
    def taken(self) -> float:
        return time.thread_time() - self.start

    def step(self, size: int = 0) -> None:
        """Count one step, which made `size` bytes."""
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
_FAILED: dict[str, str] = {}  # by source: why it was stopped
_SPENT: dict[str, float] = {}  # by source: seconds of slow conversations


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
    """Refuse what an operator would make too large."""
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
    """Refuse widths and repeats of a format that would make it too large."""
    found = text.decode("latin-1") if isinstance(text, bytes) else text
    values = list(values)
    numbers = [v for v in values if isinstance(v, int) and abs(v) > _WIDEST]
    nested = found.count("{") > 1  # {:{}} takes its width from a value
    if _DIGITS.search(found) or (numbers and ("*" in found or nested)):
        raise TemplateLimit("it formats to a width of more than 100,000")
    fields = found.count("%") + found.count("{")
    _refuse_size(fields * sum(_deep_size(value) for value in values))


def _refuse_deep(*values: Any) -> None:
    """Refuse what is too large to be compared or hashed; a list that holds one list twice, and so
    on for sixty levels, is small and takes for ever.
    """
    for value in values:
        if isinstance(value, _CONTAINERS):
            size = _deep_size(value)
            _refuse_size(size)
            if size > 50_000 and (budget := _BUDGET.get(None)) is not None:
                budget.check_time()


def _deep_size(value: Any, indent: int = 0) -> int:
    """Bytes of a value as text, at most a little more than `_LARGEST`; `indent` per level."""
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
    """Refuse what a method or filter would make too large."""
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
_STRUCTURAL = frozenset(  # filters that make no text of a list
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
    """Refuse to join texts that are too large together; either may be the separator."""
    given = (one, *others)
    lists = [list(v) for v in given if isinstance(v, Collection) and not isinstance(v, str | bytes)]
    separators = [value for value in given if isinstance(value, str)]
    for first, second in itertools.pairwise(separators):  # the characters of one, by the other
        _refuse_size(len(first) * _size(second))
    for items in lists:
        size = sum(map(_deep_size, items)) + len(items) * sum(map(_size, separators))
        _refuse_size(size)


def _values(tables: Iterable[Any]) -> Iterable[Any]:
    """The items of lists and the values of mappings."""
    for table in tables:
        yield from table.values() if isinstance(table, Mapping) else table


def _brief(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, int) and abs(value) < 10**300 else "a huge number"


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with counters; see the module."""

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
        return _with_counters(super()._parse(source, name, filename))


def _with_counters(node: Any) -> Any:
    """Put a step into every loop, and a count around every text that is joined or written."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            made = [_with_counters(one) if isinstance(one, nodes.Node) else one for one in value]
            setattr(node, field, made)
        elif isinstance(value, nodes.Node):
            setattr(node, field, _with_counters(value))
    if isinstance(node, nodes.For):
        step = nodes.ExprStmt(_counted(nodes.Const(True)))
        node.body = [step.set_lineno(node.lineno), *node.body]
        if node.test is not None:
            node.test = nodes.And(_counted(nodes.Const(True)), node.test)
        node.set_lineno(node.lineno)
    if isinstance(node, nodes.Output):
        node.nodes = [
            one if isinstance(one, nodes.TemplateData) else _counted(one, "_written")
            for one in node.nodes
        ]
    if isinstance(node, nodes.Compare):
        node.expr = _compared(node.expr)
    if isinstance(node, nodes.Operand):
        node.expr = _compared(node.expr)
    if isinstance(node, nodes.Getitem):
        node.arg = _compared(node.arg)
    if isinstance(node, nodes.Pair):
        node.key = _compared(node.key)
    if isinstance(node, nodes.Concat):
        node.nodes = [_counted(one, "_written") for one in node.nodes]
        return _counted(node)
    return node


def _compared(node: nodes.Expr) -> Any:
    """Check a value before it is compared or hashed, where it is none that the template spells."""
    items = node.items if isinstance(node, nodes.List | nodes.Tuple) else [node]
    if isinstance(node, nodes.Slice) or all(isinstance(one, nodes.Const) for one in items):
        return node
    return _counted(node, "_compared")


def _counted(node: nodes.Expr, name: str = "_counted") -> Any:
    made = nodes.Filter(node, name, [], [], None, None)
    return made.set_lineno(getattr(node, "lineno", None) or 1)


@jinja2.pass_context
def _counted_filter(context: Any, value: Any) -> Any:  # the context keeps it from being folded
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
    """Return a filter of Jinja that checks what it is given and counts what it makes."""
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
            _refuse_size(_deep_size(subject))  # it becomes a text
        _before_call(name, subject, [*own[1:], *kwargs.values()])
        return _count(function(*args, **kwargs))

    return limited


def _limited_test(function: Callable) -> Callable:
    """Return a test of Jinja that compares nothing too large."""

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
    """The environment of transformers, with its filters, functions and tags, under limits."""
    made: Any = chat_template_utils._compile_jinja_template("").environment.overlay()
    made.__class__ = _Environment
    made.filters = {name: _limited(name, function) for name, function in made.filters.items()}
    made.filters |= {
        **{"_counted": _counted_filter, "_written": _written_filter},
        "_compared": _compared_filter,
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
    """Return transformers' renderer with the compiler of this module in place of its own."""
    if "_compile_jinja_template" not in renderer.__code__.co_names:
        raise ImportError("this version of transformers renders chat templates in another way")
    names = {**renderer.__globals__, "_compile_jinja_template": _compile}
    made = types.FunctionType(renderer.__code__, names, renderer.__name__, renderer.__defaults__)
    made.__kwdefaults__ = renderer.__kwdefaults__
    return made


_render = _with_limits(chat_template_utils.render_jinja_template)


def render(source: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """Return what transformers' `render_jinja_template` does for one conversation.

    Raises:
        TemplateLimit: the template needs too much time or memory, now or in an earlier call; and
            whatever else a template raises.
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
    """Seconds that long conversations may take in all, beyond those of any."""
    size = sum(_deep_size(message) for message in messages)
    return math.inf if size > 1_000_000 else 0.0


def _stop(source: str, reason: str) -> TemplateLimit:
    _FAILED[source] = f"the chat template was stopped: {reason}; use another data.chat_template"
    return TemplateLimit(_FAILED[source])
