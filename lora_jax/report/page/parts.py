"""Parts of a report page, and the texts of its figures.

A page is a list of sections, and a section a list of parts. The template page.html has a block for
each kind of part; everything in a part is text or a number, never HTML.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from lora_jax.report.progress import format_seconds

_LONGEST = 4000  # characters of a sample


@dataclass(frozen=True)
class Note:
    """A paragraph. `level` is `plain`, `warning` or `error`."""

    text: str
    level: str = "plain"
    kind: str = "note"


@dataclass(frozen=True)
class Facts:
    """Names with their values; `None` and empty values are left out."""

    pairs: Mapping[str, Any]
    kind: str = "facts"

    @property
    def shown(self) -> list[tuple[str, str]]:
        return [(name, str(x)) for name, x in self.pairs.items() if x not in (None, "", [], {})]


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite specification with a sentence on how to read it. Two small charts go side by
    side.
    """

    spec: Mapping[str, Any]
    caption: str
    small: bool = False
    kind: str = "chart"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and the value that sorts its column."""

    text: str
    value: float | str | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table that a click on a heading sorts.

    numeric: columns of numbers, aligned to the right
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: frozenset[int] = frozenset()
    caption: str = ""
    sorts: bool = True
    kind: str = "table"


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt, with the name of the model that gave it.

    right: None if it is not known
    """

    name: str
    text: str
    right: bool | None = None
    thought: str = ""


@dataclass(frozen=True)
class Sample:
    """A prompt with its references and the answers to it."""

    prompt: str
    references: Sequence[str]
    answers: Sequence[Answer]
    label: str = ""


@dataclass(frozen=True)
class Samples:
    """Answers side by side."""

    samples: Sequence[Sample]
    caption: str = ""
    kind: str = "samples"


@dataclass(frozen=True)
class Code:
    """A command or a file. With a `title` it is folded below it."""

    text: str
    title: str = ""
    kind: str = "code"


Part = Note | Facts | Chart | Table | Samples | Code


@dataclass(frozen=True)
class Section:
    """A heading with its parts."""

    title: str
    parts: Sequence[Part]

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass(frozen=True)
class Page:
    """A whole page. `lead` is the line below its title."""

    title: str
    lead: str
    sections: Sequence[Section] = field(default_factory=list)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return True for a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def number(value: Any, digits: int = 4) -> str:
    """Return a number with `digits` significant digits, an integer with all of them, and other
    values as text.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def cell(value: Any, digits: int = 4, best: bool = False) -> Cell:
    """Return the cell of a value; one that is no number sorts as text."""
    if is_number(value):
        return Cell(number(value, digits), value, best)
    text = number(value, digits)
    return Cell(text, None if value is None or isinstance(value, float) else text, best)


def size(value: Any) -> str | None:
    """Return bytes in the unit that suits them, powers of 1,000; None stays None."""
    if not is_number(value):
        return None
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:,.2f} {unit}"
    return f"{value:,.0f} bytes"


def duration(value: Any) -> str | None:
    """Return seconds as text; None stays None."""
    return format_seconds(value) if is_number(value) else None


def counted_text(value: Any) -> str | None:
    """Return a whole number with separators; None stays None."""
    return f"{value:,.0f}" if is_number(value) else None


def clip(text: Any) -> str:
    """Return text without its end if it is very long."""
    text = str(text)
    more = len(text) - _LONGEST
    return text if more <= 0 else f"{text[:_LONGEST]} … ({more:,} more characters)"
