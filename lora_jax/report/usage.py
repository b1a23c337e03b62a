"""Speed and memory of a run."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import jax


class Clock:
    """Training time by laps. The first lap, which compiles, and pauses do not count towards the
    speed.
    """

    def __init__(self) -> None:
        self._mark = time.monotonic()
        self._laps, self._seconds, self._tokens = 0, 0.0, 0
        self._first = (0.0, 0)

    def lap(self, tokens: int) -> None:
        """Count a finished step over `tokens` tokens."""
        now = time.monotonic()
        self._laps += 1
        if self._laps == 1:
            self._first = (now - self._mark, tokens)
        else:
            self._seconds += now - self._mark
            self._tokens += tokens
        self._mark = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time until the block ends."""
        spent = time.monotonic() - self._mark
        yield
        self._mark = time.monotonic() - spent

    @property
    def tokens_per_second(self) -> float:
        """Speed of all laps but the first, or of the first if there is no other."""
        seconds, tokens = (self._seconds, self._tokens) if self._laps > 1 else self._first
        return tokens / seconds if seconds else 0.0

    def remaining(self, steps: int) -> float:
        """Estimate the seconds that `steps` more laps take."""
        return steps * (self._seconds / (self._laps - 1) if self._laps > 1 else self._first[0])


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory() -> dict[str, int]:
    """Return `device_bytes`, the peak memory of an accelerator; empty if it is unknown."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {} if peak is None else {"device_bytes": peak}
