"""Regexes that a user or a file gives, matched within a limit of time.

`re` decides which patterns are valid. `regex` reads the same syntax and can be stopped: a pattern
that backtracks for ever ends in an error.
"""

import functools
import re
import time

import regex

from lora_jax.errors import UserError

LONGEST = 20_000  # characters of a pattern
_NESTED = 6  # counted repeats inside of each other, which `regex` takes for ever to compile
_SECONDS = 2.0  # of CPU that one pattern may take in all
_SLOW = 1e-3  # of CPU: only matches that take longer are counted

# A brace that begins no repeat is itself in `re`, and may begin a fuzzy match in `regex`.
_BRACE = re.compile(r"(\\.)|\{(?!\d*,?\d*\})", re.DOTALL)


class Pattern:
    """A regex with a limit on the CPU time of all its matches.

    Raises:
        UserError: not a valid regex, or one that is too long.
    """

    def __init__(self, text: str):
        if len(text) > LONGEST:
            raise UserError(
                f"is a regex of {len(text):,} characters; at most {LONGEST:,} are supported"
            )
        try:
            re.compile(text)
            if _nested_repeats(text) > _NESTED:
                raise UserError(f"has more than {_NESTED} counted repeats inside of each other")
            self._compiled = regex.compile(_BRACE.sub(lambda found: found[1] or r"\{", text))
        except re.error as error:
            raise UserError(f"is not a valid regex: {error}") from error
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise UserError(f"is not a regex that can be matched: {error}") from error
        self._left = _SECONDS

    def matches(self, text: str) -> bool:
        """Return True if the pattern matches the whole text.

        Raises:
            UserError: the matches of this pattern took too long.
        """
        start = time.thread_time()
        try:
            if self._left > 0:
                return self._compiled.fullmatch(text, timeout=self._left) is not None
        except TimeoutError:
            self._left = 0.0
        finally:
            taken = time.thread_time() - start
            self._left -= taken if taken > _SLOW else 0.0
        raise UserError(
            f"is a regex that takes too long to match, for example on {text!r}; write it without "
            "nested repeats such as (a+)+, or list the names"
        )


def _nested_repeats(text: str) -> int:
    """The most groups with a counted repeat, such as (a){2,9}, that are inside of each other."""
    levels, inner = [0], 0
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "", text, flags=re.DOTALL)
    for found in re.finditer(r"\)\{\d*,?\d*\}|[()]", plain):
        if found[0] == "(":
            levels.append(0)
            continue
        inner = levels.pop() + (len(found[0]) > 1) if len(levels) > 1 else 0
        levels[-1] = max(levels[-1], inner)
    return levels[0]


@functools.lru_cache(maxsize=16384)
def compiled(text: str) -> Pattern:
    """Return the pattern of a text, with one limit of time for all its uses.

    Raises:
        UserError: as `Pattern`.
    """
    return Pattern(text)
