"""Compiled programs in the cache directory, so that a second start of a config compiles nothing.

    programs.keep()     # at the start of a process, best before jax is imported

This is JAX's persistent compilation cache. Its own variables take precedence:

    JAX_COMPILATION_CACHE_DIR            another directory, used by JAX alone
    JAX_COMPILATION_CACHE_MAX_SIZE       bytes; above it, the least recently used programs are
                                         removed (-1: never)
    JAX_ENABLE_COMPILATION_CACHE=false   no cache

If the directory or an entry is damaged, programs are compiled as without a cache.
"""

import builtins
import contextlib
import hashlib
import os
import platform
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import filelock

from lora_jax.cache import cache_directory
from lora_jax.errors import UserError

LIMIT = 1_000_000_000  # bytes of programs, per user and kind of processor
_OFF = ("0", "false", "f", "no", "n", "off")
_PROBLEM = r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (\w+)(.*)"

kept_in: Path | None = None  # the directory in use, if `keep` chose it


def keep() -> None:
    """Let JAX cache the programs that this process compiles, unless the environment or an earlier
    setting chose another directory or no cache.
    """
    global kept_in
    jax = sys.modules.get("jax")
    named = "JAX_COMPILATION_CACHE_DIR" in os.environ
    if named or os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "1").lower() in _OFF:
        return
    if jax is not None and jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        directory = cache_directory() / "compiled" / _owner()
    except UserError:  # raised again by other code that needs the directory
        return
    try:
        _prepare(directory)
    except (OSError, filelock.Timeout) as error:
        return _note(directory, str(error))
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": str(directory),
        "jax_compilation_cache_max_size": LIMIT,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in settings.items():
        if name.upper() in os.environ:
            continue
        if jax is None:
            os.environ[name.upper()] = str(value)
        else:
            jax.config.update(name, value)
    kept_in = directory
    _hear_problems(directory)


def stop() -> None:
    """Stop using the cache in this process, if `keep` chose its directory."""
    global kept_in
    if kept_in is None:
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    kept_in = None
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def _owner() -> str:
    """Return a name for this user and kind of processor: programs for a CPU use all instructions of
    the CPU that compiled them, and nobody should run programs of another user.
    """
    facts = [platform.machine(), platform.processor(), str(getattr(os, "getuid", int)())]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        facts += sorted({x for x in lines if re.match("(model name|flags|Features|CPU part)", x)})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _prepare(directory: Path) -> None:
    """Make the directory, for this user only, and remove unfinished entries of killed processes.

    Raises:
        OSError: the directory cannot be used, or other users can write to it.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid"):
        status = directory.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError("other users can write to it")
    if _unfinished(directory):
        with filelock.FileLock(directory / ".lockfile", timeout=10):  # the lock of JAX
            for file in _unfinished(directory):
                file.unlink(missing_ok=True)


def _unfinished(directory: Path) -> list[Path]:
    """Return entries without the time of their last use, which JAX writes after the entry. Some
    versions of JAX add no more entries if there is one.
    """
    names = {file.name for file in directory.iterdir()}
    return [
        directory / name
        for name in names
        if name.endswith("-cache") and f"{name.removesuffix('-cache')}-atime" not in names
    ]


def _hear_problems(directory: Path) -> None:
    """Act on JAX's warnings about the cache instead of showing them: remove damaged entries, to be
    written again, and stop using a directory that fails.
    """
    show = warnings.showwarning

    def showwarning(message: Any, *rest: Any, **more: Any) -> None:
        problem = re.match(_PROBLEM, str(message), re.S)
        if problem is None or kept_in is None:
            return show(message, *rest, **more)
        action, program, kind, reason = problem.groups()
        known = getattr(builtins, kind, None)
        failed = isinstance(known, type) and issubclass(known, OSError)
        if action == "writing" or failed or kind == "Timeout":
            stop()
            return _note(directory, f"{kind}{reason}")
        for file in directory.glob(f"{program}-*-cache"):
            file.unlink(missing_ok=True)

    warnings.showwarning = showwarning
    warnings.filterwarnings("always", "Error (reading|writing) persistent compilation cache")
    warnings.filterwarnings("ignore", "Cache value for key .* exceeds the maximum cache size")


def _note(directory: Path, reason: str) -> None:
    text = f"note: compiled programs are not kept in {directory}: {reason}"
    print(text, file=sys.stderr, flush=True)
