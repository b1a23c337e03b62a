"""User errors: what was given, what exists, what to do."""

import difflib
from collections.abc import Iterable, Sequence

_LONGEST = 2000  # characters of a line


class UserError(ValueError):
    """A mistake in the input (config, data, files), not in the program: what was given, what
    exists, what to do. A long line keeps its start and its end.
    """

    def __init__(self, message: str = ""):
        super().__init__("\n".join(map(_cut, str(message).split("\n"))))


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 400]} ... {line[-300:]}"


class UnknownArgument(UserError, TypeError):
    """An argument that a function does not have; also a `TypeError`, as in Python."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the candidate closest to `name`, or the empty string."""
    close = difflib.get_close_matches(name[:200], list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def counted(number: int, noun: str) -> str:
    """Return `1 row`, `2 rows`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def raise_all(problems: Sequence[str]) -> None:
    """Raise all problems in one `UserError`; do nothing if there are none."""
    if problems:
        raise UserError("\n".join(problems))
