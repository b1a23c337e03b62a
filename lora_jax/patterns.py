"""Regexes given by users or files, matched with a time limit.

`re` decides which patterns are valid. `regex` reads the same syntax and has a timeout, so that a
pattern with endless backtracking ends in an error.
"""

import functools
import re
import time

import regex

from lora_jax.errors import UserError

LONGEST = 20_000  # characters of a pattern
_NESTED = 6  # most nested counted repeats; `regex` compiles more very slowly
_SECONDS = 2.0  # CPU time of all matches of a pattern
_SLOW = 1e-3  # seconds of CPU; faster matches are not counted

# A brace that starts no repeat is literal in `re`, but may start a fuzzy match in `regex`.
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
                raise UserError(f"has more than {_NESTED} nested counted repeats")
            self._compiled = regex.compile(_BRACE.sub(lambda found: found[1] or r"\{", text))
        except re.error as error:
            raise UserError(f"is not a valid regex: {error}") from error
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise UserError(f"is not a regex that can be compiled: {error}") from error
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
    """Return the depth of nested groups with a counted repeat, such as (a){2,9}."""
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
    """Return the pattern of a text, with one time limit for all its uses.

    Raises:
        UserError: as `Pattern`.
    """
    return Pattern(text)
