"""SIGTERM, SIGHUP and Ctrl-C as an exception that is raised when a run can take it.

with catch(say=print) as signals:
    ...                     # raises Interrupted at once
    with signals.held():    # a step is in progress: the signal waits
        ...
        signals.check()     # raises here
    ...                     # what ends the run, such as a save: later signals do not disturb it

A scheduler or a terminal often sends a signal twice. Only Ctrl-C a second time, a second or more
after the first signal, gives up what is still being saved.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DELIBERATE = 1.0  # seconds after which Ctrl-C is no repetition of the first signal


class Interrupted(BaseException):
    """A signal asked the run to end. Not an `Exception`, so that no handler of failures takes it.

    status: the exit status: 0 for SIGTERM and SIGHUP, 130 for Ctrl-C
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 130 if number == signal.SIGINT else 0


class Signals:
    """The signal that came first since `catch`, and who hears of it.

    agree: of a run on several hosts, the largest number that any of them gives; all must call it
        together. Inside `held` such a run ends in `check` alone, which all must call then.
    say: takes a line of text for the user
    """

    def __init__(
        self,
        agree: Callable[[int], int] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._agree, self._say = agree, say
        self._number: int | None = None
        self._since = 0.0
        self._waits = False

    def receive(self, number: int, _frame: Any) -> None:
        if self._number is None:
            self._number, self._since = number, time.monotonic()
            if not self._waits:
                raise Interrupted(number)
            again = "; Ctrl-C again gives up what is not saved" * (number == signal.SIGINT)
            self._say(f"{signal.Signals(number).name}: stopping after this step{again}")
        elif number == signal.SIGINT and time.monotonic() - self._since >= DELIBERATE:
            self._say("stopping now: what was not saved yet is lost")
            raise Interrupted(number)

    def check(self) -> None:
        """Raise `Interrupted` if a signal waits, here or on another host."""
        number = self._number or 0
        if self._agree is not None:
            number = self._agree(number)
        if number:
            raise Interrupted(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, signals wait for `check`."""
        before, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = before

    @contextlib.contextmanager
    def free(self) -> Iterator[None]:
        """Inside `held`, signals raise at once again, one that waits already too. Hosts that work
        together stop together: theirs wait for `check` here as well.
        """
        before, self._waits = self._waits, self._waits and self._agree is not None
        try:
            self.check()
            yield
        finally:
            self._waits = before


@contextlib.contextmanager
def catch(
    agree: Callable[[int], int] | None = None, say: Callable[[str], None] = lambda text: None
) -> Iterator[Signals]:
    """Receive SIGTERM, SIGHUP and SIGINT until the block ends; a SIGHUP that is ignored, as under
    `nohup`, stays ignored. Only the main thread may; elsewhere (some notebooks) the signals keep
    their meaning. `agree` and `say`: as in `Signals`.
    """
    signals = Signals(agree, say)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {
        number: signal.signal(number, signals.receive)
        for number in CAUGHT
        if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN)
    }
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
