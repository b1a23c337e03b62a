"""New directories that appear complete or not at all."""

import contextlib
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lora_jax import hosts
from lora_jax.config import expand
from lora_jax.errors import UserError


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory next to `target`, renamed to `target` at the end of the block and
    removed on an error.

    Raises:
        UserError: `target` exists and is not an empty directory (nothing is ever removed), or
            cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"{target} already exists and is not empty; choose another directory or remove it"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}-{secrets.token_hex(4)}"
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        yield temporary
        _set_default_modes(temporary)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:  # safetensors raises its own on a full disk
        raise UserError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_directory_on_main(target: str | Path) -> Iterator[Path | None]:
    """Yield `new_directory(target)` on the main host, and None on the others."""
    with (
        new_directory(expand(target)) if hosts.is_main() else contextlib.nullcontext() as temporary
    ):
        yield temporary


def _set_default_modes(directory: Path) -> None:
    """Give all files the mode of a new file (umask, ACL); those of safetensors are private."""
    probe = directory / ".new"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in directory.rglob("*"):
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) != mode:
            file.chmod(mode)
