"""The user's cache directory, and files that appear in it complete or not at all."""

import os
import secrets
from pathlib import Path

import platformdirs

from lora_jax.config import expand


def cache_directory() -> Path:
    """`LORA_JAX_CACHE` if set, else the user's cache directory of this package."""
    chosen = os.environ.get("LORA_JAX_CACHE")
    return expand(chosen, "LORA_JAX_CACHE") if chosen else platformdirs.user_cache_path("lora_jax")


def write_entry(file: Path, *parts: bytes) -> None:
    """Write a file, and the directory that it is in, so that nobody ever reads half of it.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as opened:
            opened.writelines(parts)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
