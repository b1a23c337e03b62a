"""The user's cache directory, and files that are written atomically."""

import os
import secrets
from pathlib import Path

import platformdirs

from lora_jax.config import expand


def cache_directory() -> Path:
    """Return `LORA_JAX_CACHE` if set, else the directory of this package in the user's cache."""
    chosen = os.environ.get("LORA_JAX_CACHE")
    return expand(chosen, "LORA_JAX_CACHE") if chosen else platformdirs.user_cache_path("lora_jax")


def write_entry(file: Path, *parts: bytes) -> None:
    """Write a file of the cache atomically, and make its directory. Several processes may write the
    same file at once.

    Raises:
        OSError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, *parts, partial=f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}")


def write_atomic(file: Path, *parts: bytes, partial: str) -> None:
    """Write a file so that a reader finds the old content or all of the new.

    Args:
        file: the file; it is created or replaced.
        parts: the content, in pieces.
        partial: name of the file that is written first, in the same directory, and then renamed.

    Raises:
        OSError: the file cannot be written; the old content is still there.
    """
    temporary = file.with_name(partial)
    try:
        with temporary.open("wb") as opened:
            opened.writelines(parts)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
