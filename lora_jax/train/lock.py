"""Locks that allow one run at a time in a directory, among all processes and hosts.

    with hold(Path("runs/a"), "output_dir") as lock:
        ...
        lock.check()        # raises if another run has taken the directory over

`.lora_jax.lock` names the holder: host, process and start time. The holder is dead, and its
directory free, as soon as one of these shows it:

- on the same machine, its `flock` on that file, which the kernel releases however a process ends;
- on a file system without `flock`, the process: its ID and its start time;
- from another machine, the file's modification time: a live holder renews it every `BEAT` seconds,
  so one older than `DEAD` seconds is dead.

The file is made by `link`, which is atomic over NFS too. At most one process replaces a dead lock:
contenders link `.lora_jax.lock-after-TOKEN`, where TOKEN is the dead lock's, and only the one that
succeeds may replace the file. If it dies half-way, it leaves a chain that the next contender
follows.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.config.text import parse_json, shown
from lora_jax.errors import UserError

NAME = ".lora_jax.lock"
BEAT = 10.0  # seconds after which the holder renews its file
DEAD = 120.0  # seconds without renewal after which other machines consider it dead
_BUSY = 10.0  # seconds to compete with others that start at the same time
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Holder:
    """A process that a lock file names."""

    token: str
    host: str
    pid: int
    since: float
    age: float  # seconds since it renewed the file
    alive: bool
    certain: bool  # known otherwise than by its age

    def describe(self, file: Path, name: str) -> str:
        """Return why the setting `name` cannot be used, with advice."""
        since = datetime.datetime.fromtimestamp(self.since).astimezone()
        text = (
            f"{name}={str(file.parent)!r} is in use by process {self.pid} on host {self.host} "
            f"since {since.isoformat(sep=' ', timespec='seconds')} ({file.name}). Wait for that "
            f"run to end, stop it, or choose another {name}"
        )
        if not self.certain:
            text += (
                f". It was last seen {max(0, self.age):.0f} s ago: if that process is gone, wait "
                f"{DEAD - max(0, self.age):.0f} s, or remove {file}"
            )
        return text


class Lock:
    """Lock of this process on a directory, made by `hold`."""

    def __init__(self, directory: Path, name: str) -> None:
        self._file, self._name, self._pid = directory / NAME, name, os.getpid()
        self._over, self._swap = threading.Event(), threading.Lock()
        self._fd = self._acquire()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check that the directory is still held, and lock it again if its file is gone.

        Raises:
            UserError: another run holds it.
        """
        try:
            if os.path.samestat(os.lstat(self._file), os.fstat(self._fd)):
                return
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"{self._file} cannot be read: {error.strerror}") from error
        found = self._acquire()
        with self._swap:
            before, self._fd = self._fd, found
            _close(before)

    def release(self) -> None:
        """Release the directory. A fork of the process does not hold it and does not release it."""
        if os.getpid() != self._pid:
            return
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self._file), os.fstat(self._fd)):
                self._file.unlink()
        _close(self._fd)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError), self._swap:
                os.utime(self._fd)

    def _acquire(self) -> int:
        """Create the lock file. Return its descriptor.

        Raises:
            UserError: another process holds the directory; it cannot be written.
        """
        token = secrets.token_hex(8)
        own = self._file.with_name(f"{NAME}-{token}")
        try:
            fd, record = _candidate(own, token)
        except OSError as error:
            raise UserError(
                f"{self._name}={str(self._file.parent)!r} is not writable: {error.strerror}"
            ) from error
        try:
            self._compete(own, token, record, os.fstat(fd).st_mtime)
        except BaseException as error:
            own.unlink(missing_ok=True)
            _close(fd)
            if isinstance(error, OSError):
                raise UserError(f"{self._file} cannot be made: {error.strerror}") from error
            raise
        self._clean()
        return fd

    def _compete(self, own: Path, token: str, record: dict[str, Any], now: float) -> None:
        until = time.monotonic() + _BUSY
        while time.monotonic() < until:
            last, free, heirs = _last(self._file, now)
            if last is None or last.token != token:
                if last is not None and last.alive:
                    raise UserError(last.describe(self._file, self._name))
                if not _claim(own, free, record):
                    time.sleep(0.01)
                    continue
                heirs.append(free)
                last = _last(self._file, now)[0]
                if last is None or last.token != token:  # heir of a lock that is no more
                    free.unlink(missing_ok=True)
                    continue
            own.replace(self._file)  # without effect if both are one file
            own.unlink(missing_ok=True)
            for heir in heirs:
                if heir != self._file:
                    heir.unlink(missing_ok=True)
            return
        raise UserError(
            f"{self._name}={str(self._file.parent)!r}: other processes keep locking it; run this "
            "again"
        )

    def _clean(self) -> None:
        """Remove the files of processes that died while they competed for the lock."""
        now = os.stat(self._file).st_mtime
        for file in self._file.parent.glob(f"{NAME}-*"):
            with contextlib.suppress(OSError):
                try:
                    found = _read(file, now)
                    dead = found is not None and not found.alive
                except UserError:  # killed before it was written
                    status = os.lstat(file)
                    dead = stat.S_ISREG(status.st_mode) and now - status.st_mtime > DEAD
                if dead:
                    file.unlink()


@contextlib.contextmanager
def hold(directory: Path, name: str) -> Iterator[Lock]:
    """Lock an existing directory until the block ends. `name` is its setting.

    Raises:
        UserError: another process holds it; it is named, with host, time and what to do.
    """
    lock = Lock(directory, name)
    try:
        yield lock
    finally:
        lock.release()


def look(directory: Path, name: str) -> None:
    """Raise as `hold` does if a live process holds the directory, and change nothing."""
    last = _last(directory / NAME, time.time())[0]
    if last is not None and last.alive:
        raise UserError(last.describe(directory / NAME, name))


def _candidate(own: Path, token: str) -> tuple[int, dict[str, Any]]:
    """Write a file of this process, which becomes the lock when linked to its name. Return it with
    its content.
    """
    fd = os.open(own, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
    _open.add(fd)
    try:
        locked = True
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without
        locked = False
    record = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.time(),
        "machine": _machine(),
        "namespace": _namespace(),
        "started": _start_time(os.getpid()),
        "locked": locked,
    }
    try:
        os.write(fd, json.dumps(record).encode())
        os.fsync(fd)
    except OSError:
        own.unlink(missing_ok=True)
        _close(fd)
        raise
    return fd, record


def _claim(own: Path, free: Path, record: dict[str, Any]) -> bool:
    """Create `free`, which only one process can do. Return True if it was this one."""
    try:
        os.link(own, free)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            fd = os.open(free, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        os.write(fd, json.dumps({**record, "locked": False}).encode())
        os.close(fd)
    return True


def _last(file: Path, now: float) -> tuple[Holder | None, Path, list[Path]]:
    """Return the holder, the name that its successor must create, and files of earlier holders."""
    last, free, heirs = None, file, []
    while (found := _read(free, now)) is not None:
        last, free = found, file.with_name(f"{NAME}-after-{found.token}")
        if free in heirs:
            raise _unreadable(file, "its chain has no end")
        heirs.append(free)
    return last, free, heirs[:-1]


def _read(file: Path, now: float) -> Holder | None:
    """Return the holder that a lock file names; None if there is no such file."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(file, str(error.strerror)) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _unreadable(file, "it is not a regular file")
        record = parse_json(os.read(fd, 4096).decode())
        if not re.fullmatch("[0-9a-f]{16}", record["token"]):
            raise _unreadable(file, "it names no process")
        datetime.datetime.fromtimestamp(record["since"]).astimezone()  # within its years
        alive, certain = _is_alive(fd, record)
        age = now - os.fstat(fd).st_mtime
        return Holder(
            token=record["token"],
            host=shown(str(record["host"])),
            pid=int(record["pid"]),
            since=float(record["since"]),
            age=age,
            alive=alive if certain else abs(age) < DEAD,
            certain=certain,
        )
    except (ValueError, KeyError, TypeError, OverflowError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise _unreadable(file, "it names no process") from error
    finally:
        os.close(fd)


def _is_alive(fd: int, record: dict[str, Any]) -> tuple[bool, bool]:
    """Return True if a holder is alive, and True if that is certain."""
    free = True
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
    except BlockingIOError:
        return True, True
    except OSError:
        free = False
    if record["machine"] != _machine():
        return True, False
    if free and record["locked"]:
        return False, True
    if record["namespace"] != _namespace():
        return True, False
    return _start_time(int(record["pid"])) == record["started"], True


def _machine() -> str:
    """Return the ID of the running kernel, which containers with other host names share."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _namespace() -> str:
    """Return the namespace of process IDs."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Return the start time as text, which distinguishes processes with one ID; None without a
    process.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "running"


def _unreadable(file: Path, reason: str) -> UserError:
    return UserError(
        f"{file}, which names the process that uses the directory, cannot be read ({reason}). If "
        "no process does, remove it"
    )


# A fork inherits descriptors and so the flock, and may outlive its parent.


_open: set[int] = set()


def _close(fd: int) -> None:
    _open.discard(fd)
    os.close(fd)


def _close_in_fork() -> None:
    while _open:
        os.close(_open.pop())


os.register_at_fork(after_in_child=_close_in_fork)
