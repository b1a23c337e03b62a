"""Start of the `lora-jax` command: setup that must come before slow imports.

Ctrl-C ends the command with one line, however often and however early it is pressed.
"""

import io
import os
import signal
import sys
import time
from typing import Any, NoReturn

DELIBERATE = 1.0  # seconds after which another Ctrl-C is not a repetition of the first


def console_script() -> NoReturn:
    """Run the `lora-jax` command."""
    run("main")


def run(name: str) -> NoReturn:
    """Run a function of `lora_jax.cli`, and end the process with its status."""
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
        if not ctrl_c.pressed:  # inside an import it can turn into another error
            raise
        status = None
    ctrl_c.leave()
    if status is None:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


class _CtrlC:
    """Handler that turns Ctrl-C into one KeyboardInterrupt.

    Repetitions within a second are ignored, so that they do not disturb the cleanup. A later one
    ends the process at once; so does any before the command starts, when there is nothing to clean
    up, and any within an import: in that of an extension, the exception can abort the process, or
    be printed and replaced by another one. If SIGINT is ignored, as in background jobs, it stays
    ignored.
    """

    def __init__(self) -> None:
        self.pressed: float | None = None
        self.started = False
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._receive)
            sys.unraisablehook = self._swallowed
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

    def _receive(self, number: int, frame: Any) -> None:
        again = self.pressed and time.monotonic() - self.pressed >= DELIBERATE
        if not self.started or again or (self.pressed is None and _imports(frame)):
            os.write(2, b"interrupted\n")
            os._exit(130)
        if self.pressed is None:
            self.pressed = time.monotonic()
            raise KeyboardInterrupt

    def _swallowed(self, unraisable: Any) -> None:
        """Accept the next Ctrl-C if this one was raised where no exception can propagate, as in a
        callback of the garbage collector.
        """
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            self.pressed = None
        else:
            sys.__unraisablehook__(unraisable)

    def leave(self) -> None:
        """Restore the signal before the interpreter exits, which no exception can interrupt."""
        if signal.getsignal(signal.SIGINT) == self._receive:
            signal.signal(signal.SIGINT, signal.SIG_IGN if self.pressed else signal.SIG_DFL)


def _imports(frame: Any) -> bool:
    """Return True if the frame is within an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def use_huge_pages() -> None:
    """Restart this process, once, with glibc backing its memory by transparent huge pages.

    XLA on a CPU allocates its buffers again at each step, and touching gigabytes of new 4 KiB pages
    takes a large part of the step. glibc reads the setting only when a process starts. No effect
    outside Linux, or if GLIBC_TUNABLES is set.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        # Block Ctrl-C until the new process can handle it.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _open_streams() -> None:
    """Make stdin, stdout and stderr safe to use. A closed one becomes /dev/null, as the next opened
    file would get its descriptor; characters outside of the encoding are printed as \\x or \\u.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
