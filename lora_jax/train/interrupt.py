"""SIGTERM and Ctrl-C as an exception that comes when a run can take it.

with catch() as signals:
    ...                     # raises Interrupted at once
    with signals.held():    # a step is under way: the signal waits
        ...
        signals.check()     # raises here
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Interrupted(BaseException):
    """A signal asked the run to end. Not an `Exception`: nothing on the way takes it for a failure.

    status: the exit status: 0 for SIGTERM, 130 for Ctrl-C
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 130 if number == signal.SIGINT else 0


class Signals:
    """What has come since `catch`; a second signal never waits.

    agree: of a run on several hosts, the largest number that any of them gives; all must call it
        together. Inside `held` such a run ends in `check` alone, which all must call then.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self._agree = agree
        self._number: int | None = None
        self._waits = False

    def receive(self, number: int, _frame: Any) -> None:
        if not self._waits or self._number is not None:
            raise Interrupted(number)
        self._number = number

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
def catch(agree: Callable[[int], int] | None = None) -> Iterator[Signals]:
    """Receive SIGTERM and SIGINT until the block ends. Only the main thread may; elsewhere (some
    notebooks) the signals keep their meaning. `agree`: as in `Signals`.
    """
    signals = Signals(agree)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    caught = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, signals.receive) for number in caught}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
