"""SIGTERM, SIGHUP and Ctrl-C as an exception, raised where a run can handle it.

with catch(say=print) as signals:
    ...                     # raises Interrupted at once
    with signals.held():    # a step is in progress: the signal waits
        ...
        signals.check()     # raises here
    ...                     # the end of the run, such as a save: not interrupted again

A scheduler or a terminal often sends a signal twice. Only another Ctrl-C, a second or more after
the first signal, abandons a running save.

Python runs a handler between two bytecode instructions, and one call into XLA may take minutes. In
the meantime a thread prints an answer to the signal, and ends a process that has nothing to save
(`leave`).
"""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DELIBERATE = 1.0  # seconds after which Ctrl-C no longer repeats the first signal
ANSWER = 0.3  # seconds until a thread answers in place of the main thread
STUCK = 3.0  # seconds until a process that should have ended is ended by `leave`
# Ends this process with a status. Set by the command line only: in a notebook it would lose the
# user's state.
leave: Callable[[int], None] | None = None
_AGAIN = "stopping now: what was not saved yet is lost"


class Interrupted(BaseException):
    """Raised when a signal asks the run to end. It is no `Exception`, so `except Exception` does
    not catch it.

    status: the exit status: 0 for SIGTERM and SIGHUP, 130 for Ctrl-C
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 130 if number == signal.SIGINT else 0


class Signals:
    """The first signal since `catch`, and the callbacks that handle it.

    agree: returns the largest signal number over all hosts, which must call it together. Inside
        `held`, a run on several hosts ends only in `check`, which all must call.
    say: takes a line of text for the user
    leave: ends the process with a status if the main thread should end at once but is inside
        XLA; None waits for it
    """

    def __init__(
        self,
        agree: Callable[[int], int] | None = None,
        say: Callable[[str], None] = lambda text: None,
        leave: Callable[[int], None] | None = None,
    ) -> None:
        self._agree, self._say = agree, say
        self._leave = leave if agree is None else None
        self._number: int | None = None
        self._since = 0.0
        self._waits = False
        self._received = 0.0  # when the handler ran last
        self._again = False  # a deliberate Ctrl-C came; the handler may not have run for it
        self._said: set[str] = set()
        self._over = threading.Event()

    def receive(self, number: int, _frame: Any) -> None:
        now = self._received = time.monotonic()
        if self._number is None:
            self._number, self._since = number, now
            if not self._waits:
                raise Interrupted(number)
            self._say_once(_first_answer(number))
            if not self._again:
                return
        elif not (number == signal.SIGINT and now - self._since >= DELIBERATE):
            return
        self._say_once(_AGAIN)
        raise Interrupted(number)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)

    def watch(self, mailbox: socket.socket) -> None:
        """Read signal numbers as they come, and answer those that no handler has taken, until the
        other end of the pipe is closed.
        """
        first = None
        while content := mailbox.recv(1):
            number, sent = content[0], time.monotonic()
            if number not in CAUGHT:
                continue
            if first is None:
                first = sent
                self._start(number, sent, self._waits)
            elif number == signal.SIGINT and sent - first >= DELIBERATE and not self._again:
                self._again = True
                self._start(number, sent, False)

    def _start(self, *arguments: Any) -> None:
        threading.Thread(target=self._answer, args=arguments, daemon=True).start()

    def _answer(self, number: int, sent: float, waits: bool) -> None:
        """Answer for the handler, if it does not run in time."""
        if self._over.wait(ANSWER) or self._received >= sent:
            return
        if waits:
            return self._say_once(_first_answer(number))
        self._say_once(_AGAIN if self._again else f"{signal.Signals(number).name}: stopping now")
        if self._leave is not None and not self._over.wait(STUCK) and self._received < sent:
            self._leave(Interrupted(number).status)

    def end(self) -> None:
        """Stop answering signals."""
        self._over.set()

    def check(self) -> None:
        """Raise `Interrupted` if a signal waits, here or on another host."""
        number = self._number or 0
        if self._agree is not None:
            number = self._agree(number)
        if number:
            raise Interrupted(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let signals wait for `check` until the block ends."""
        before, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = before

    @contextlib.contextmanager
    def free(self) -> Iterator[None]:
        """Inside `held`, let signals raise at once, including one that already waits. With several
        hosts they still wait for `check`, so all hosts stop together.
        """
        before, self._waits = self._waits, self._waits and self._agree is not None
        try:
            self.check()
            yield
        finally:
            self._waits = before


def _first_answer(number: int) -> str:
    again = "; Ctrl-C again gives up what is not saved" * (number == signal.SIGINT)
    return f"{signal.Signals(number).name}: stopping after this step{again}"


@contextlib.contextmanager
def catch(
    agree: Callable[[int], int] | None = None,
    say: Callable[[str], None] = lambda text: None,
    leave: Callable[[int], None] | None = None,
) -> Iterator[Signals]:
    """Receive SIGTERM, SIGHUP and SIGINT until the block ends. A SIGHUP that is ignored, as under
    `nohup`, stays ignored. Python allows this in the main thread only; in other threads (some
    notebooks) signals keep their default action. The arguments are those of `Signals`.
    """
    signals = Signals(agree, say, leave)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {
        number: signal.signal(number, signals.receive)
        for number in CAUGHT
        if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN)
    }
    try:
        with _watched(signals):
            yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _watched(signals: Signals) -> Iterator[None]:
    """Run a thread that reads every signal as soon as it comes, until the block ends."""
    mailbox, sender = socket.socketpair()
    with mailbox, sender:
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=signals.watch, args=(mailbox,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            signals.end()
            sender.shutdown(socket.SHUT_WR)
            thread.join()
