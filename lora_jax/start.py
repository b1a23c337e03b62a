"""Start of the `lora-jax` command: what must happen before the imports that take time.

Ctrl-C ends it with one line, however often and however early it is pressed.
"""

import io
import os
import signal
import sys
import time
from typing import Any, NoReturn

DELIBERATE = 1.0  # seconds after which Ctrl-C is no repetition of the first one


def console_script() -> NoReturn:
    """The `lora-jax` command."""
    run("main")


def run(name: str) -> NoReturn:
    """End the process with the status of a function of `lora_jax.cli`."""
    use_huge_pages()
    ctrl_c = _CtrlC()
    try:
        _open_streams()
        from lora_jax import programs

        programs.keep()
        from lora_jax import cli
        from lora_jax.train import interrupt

        interrupt.leave = os._exit
        ctrl_c.started = True
        status = getattr(cli, name)()
    except KeyboardInterrupt:
        status = None
    except Exception:
        if not ctrl_c.pressed:  # inside an import it can become an error of another kind
            raise
        status = None
    if status is None:
        print("interrupted", file=sys.stderr)
        status = 130
    ctrl_c.leave()
    sys.exit(status)


class _CtrlC:
    """Ctrl-C as one KeyboardInterrupt. Repetitions within a second do not disturb what it ends; a
    later one ends the process at once, and so does any before the command starts, when there is
    nothing to clean up.
    Where SIGINT is ignored, as in background jobs, it stays so.
    """

    def __init__(self) -> None:
        self.pressed: float | None = None
        self.started = False
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._receive)
            sys.unraisablehook = self._swallowed
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

    def _receive(self, number: int, frame: Any) -> None:
        if not self.started or (self.pressed and time.monotonic() - self.pressed >= DELIBERATE):
            os.write(2, b"interrupted\n")
            os._exit(130)
        if self.pressed is None:
            self.pressed = time.monotonic()
            raise KeyboardInterrupt

    def _swallowed(self, unraisable: Any) -> None:
        """A KeyboardInterrupt raised where none can pass, as in a callback of the garbage
        collector, is as if the key had not been pressed: the next one is taken.
        """
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            self.pressed = None
        else:
            sys.__unraisablehook__(unraisable)

    def leave(self) -> None:
        """From here on the interpreter ends, which no exception can interrupt."""
        if signal.getsignal(signal.SIGINT) == self._receive:
            signal.signal(signal.SIGINT, signal.SIG_IGN if self.pressed else signal.SIG_DFL)


def use_huge_pages() -> None:
    """Restart this process, once, with glibc backing its memory by transparent huge pages.

    XLA on a CPU takes its buffers anew at every step, and touching gigabytes of fresh 4 KiB pages
    costs a good part of the step. glibc reads the setting at the start of a process only. Without
    effect outside Linux, or where it is set.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        # Ctrl-C waits until the new process can take it.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _open_streams() -> None:
    """Make stdin, stdout and stderr safe to use: a closed one is /dev/null, as the next file that
    is opened would take its place, and what an encoding cannot print is printed as \\x or \\u.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
