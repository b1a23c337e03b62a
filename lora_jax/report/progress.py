"""Progress of a run: a bar per phase on a terminal, plain lines elsewhere.

    display = Display(console)
    with display.about("base"), display.phase("losses", 3, "batches") as phase:
        for batch in batches:
            ...
            phase.advance()

    terminal:   base: losses 2/3 batches ━━━━━━━━──── 0:14  ETA 0:07
    elsewhere:  base: losses 2/3 batches, 0:32, ETA 0:16        (every 30 seconds)

Without a terminal, no control characters are written. A phase of less than two seconds prints no
line.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
FIRST = 2.0  # seconds until a phase has its first line
EVERY = 30.0  # seconds between its lines
_RATE = 4  # refreshes a second
_WIDTH = 8  # characters of a bar


def format_seconds(seconds: float) -> str:
    """Format as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Phase:
    """A slow part of a run.

    total: units of work, if they are known
    done: those that an earlier session has done
    status: text in place of the elapsed time, such as a loss
    every: seconds between its lines, where there are no bars
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        done: int = 0,
        status: Callable[[], str] | None = None,
        every: float = EVERY,
    ) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.every = every
        self.began = self._moved = time.monotonic()
        self.next_line = self.began + FIRST
        self.said = False  # a line of it was printed
        self.tokens = 0  # generated ones; a bar shows how many per second
        self._status = status

    @property
    def seconds(self) -> float:
        """Elapsed seconds."""
        return time.monotonic() - self.began

    def advance(self, count: int = 1) -> None:
        """Count finished units of work."""
        self.done, self._moved = self.done + count, time.monotonic()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, each of which is one unit of work."""
        for item in items:
            yield item
            self.advance()

    @property
    def title(self) -> str:
        """Name of the phase with the work that is done."""
        if self.total is None:
            return self.what
        return f"{self.what} {self.done}/{self.total}{self.unit and ' '}{self.unit}"

    @property
    def status(self) -> str:
        """Elapsed time, an estimate of the rest and the speed, or the text in their place."""
        if self._status is not None:
            return self._status()
        speed = [f"{self.tokens / self.seconds:,.0f} tokens/s"] if self.tokens else []
        return "  ".join([*self._times(), *speed])

    @property
    def line(self) -> str:
        """Title and status as one line of plain text."""
        if self._status is not None:
            return f"{self.title}  {self._status()}"
        return ", ".join([self.title, *self._times()])

    def _times(self) -> list[str]:
        times, now = [format_seconds(self.seconds)], time.monotonic()
        if self.total and 0 < self.done < self.total:
            each = (self._moved - self.began) / self.done
            left = each * (self.total - self.done) - (now - self._moved)
            if left >= 1:  # later than expected: no estimate
                times.append(f"ETA {format_seconds(left)}")
        return times


class Display:
    """Shows the phases of a run on a console: a bar per running phase on a terminal, lines about
    the innermost phase elsewhere. A quiet console shows nothing.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        # FORCE_COLOR makes rich treat a file as a terminal: use colours, but no moving bars.
        self._moves = console.is_interactive and console.file.isatty()
        self._phases: list[Phase] = []
        self._prefix = ""

    @contextlib.contextmanager
    def about(self, subject: str) -> Iterator[None]:
        """Name phases `subject: ...` until the block ends."""
        before, self._prefix = self._prefix, f"{subject}: "
        try:
            yield
        finally:
            self._prefix = before

    @contextlib.contextmanager
    def phase(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        done: int = 0,
        status: Callable[[], str] | None = None,
        every: float = EVERY,
    ) -> Iterator[Phase]:
        """Show a `Phase` while the block runs, and a line about it after a long one."""
        phase = Phase(self._prefix + what, total, unit, done, status, every)
        outermost = not self._phases
        self._phases.append(phase)
        try:
            with (
                self._shown() if outermost and not self.console.quiet else contextlib.nullcontext()
            ):
                yield phase
        finally:
            self._phases.remove(phase)
        if status is not None and self._moves:
            self.console.print(phase.line)  # the bar has gone
        elif status is None and (phase.said or phase.seconds >= FIRST):
            self.console.print(f"{phase.title} in {format_seconds(phase.seconds)}")

    def say_line(self, phase: Phase, grace: float = 0.0) -> None:
        """Print the line of a phase if no bars are shown and it is `grace` seconds overdue."""
        now = time.monotonic()
        if not self._moves and now >= phase.next_line + grace:
            phase.next_line, phase.said = now + phase.every, True
            self.console.print(phase.line)

    def __rich__(self) -> Group:
        return Group(*map(_to_row, [*self._phases]))

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        if self._moves:
            with Live(self, console=self.console, refresh_per_second=_RATE, transient=True):
                yield
            return
        over = threading.Event()
        thread = threading.Thread(target=self._follow, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _follow(self, over: threading.Event) -> None:
        """Print lines about the innermost phase, which may be busy in one long call."""
        while not over.wait(1 / _RATE):
            for phase in self._phases[-1:]:
                # A phase that prints at the end of a step also prints during a long step.
                self.say_line(phase, EVERY - phase.every)


def _to_row(phase: Phase) -> Table:
    """Return title, bar and status as a table of one row: shared columns would cut long lines."""
    table = Table.grid(padding=(0, 1))
    for _ in range(3):
        table.add_column(no_wrap=True)
    bar = ProgressBar(phase.total, phase.done, _WIDTH, pulse=phase.total is None)
    table.add_row(Text(phase.title), bar, Text(phase.status))
    return table


SILENT = Display(Console(quiet=True))
