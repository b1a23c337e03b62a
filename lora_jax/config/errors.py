"""Errors of users: what was given, what exists, what to do."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake in the input (config, data, files), not in the program: what was given, what
    exists, what to do.
    """


class UnknownArgument(UserError, TypeError):
    """An argument that a function does not have; a `TypeError` too, as Python's own is."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the candidate closest to `name`, or the empty string."""
    close = difflib.get_close_matches(name[:200], list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def counted(number: int, noun: str) -> str:
    """Return `1 row`, `2 rows`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def raise_all(problems: Sequence[str]) -> None:
    """Raise every problem of a kind in one `UserError`; nothing happens without any."""
    if problems:
        raise UserError("\n".join(problems))
