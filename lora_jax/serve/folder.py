"""Directories of adapters below one root, found by name.

    ROOT/NAME/adapter_config.json            a PEFT directory
    ROOT/NAME/adapter/adapter_config.json    the output directory of a run

A directory may be a link; where links lead, it must be one level below the root. Nothing outside of
the root is read.
"""

import os
import re
from pathlib import Path

from lora_jax.config import expand, quoted
from lora_jax.errors import UserError, nearest
from lora_jax.formats.peft_digest import WEIGHTS

CONFIG = "adapter_config.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Missing(UserError):
    """An adapter or a directory that does not exist."""


def check_name(name: str) -> None:
    """Check the form of an adapter's name.

    Raises:
        UserError: other characters, or too many of them.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{quoted(name)} cannot be the name of an adapter: a name has 1 to 128 letters, digits "
            "and ., _, -, and begins with a letter or a digit"
        )


class Folder:
    """The adapters below a root; without a root, there are none.

    Raises:
        UserError: a root that is not a directory.
    """

    def __init__(self, root: str | Path | None):
        self.root = None if root is None else expand(root).resolve()
        if self.root is not None and not self.root.is_dir():
            raise UserError(f"--adapter-root {root}: there is no such directory")

    def names(self) -> list[str]:
        """Return the names of the directories that hold an adapter, sorted."""
        if self.root is None:
            return []
        with os.scandir(self.root) as entries:
            found = [entry.name for entry in entries if _NAME.fullmatch(entry.name)]
        return sorted(name for name in found if self._adapter_in(self.root / name) is not None)

    def find(self, name: str) -> Path:
        """Return the directory of the adapter with a name.

        Raises:
            Missing: there is none. UserError: not a name.
        """
        check_name(name)
        found = None if self.root is None else self._adapter_in(self.root / name)
        if found is None:
            raise Missing(f"there is no adapter {quoted(name)}")
        return found

    def at(self, path: str) -> Path:
        """Return the directory of the adapter at a path, relative to the root or absolute.

        Raises:
            Missing: there is none below the root.
        """
        if self.root is not None and "\0" not in path:
            found = self._adapter_in(self.root / path)
            if found is not None:
                return found
        hint = "" if self.root is None else nearest(path, self.names())
        raise Missing(
            f"there is no adapter at {quoted(path)}: the server reads directories one level below "
            f"its --adapter-root only.{hint}"
        )

    def _adapter_in(self, path: Path) -> Path | None:
        """Return the adapter's directory at a path; None if there is none inside of the root."""
        try:
            home = path.resolve()
            if home.name == "adapter" and home.parent.parent == self.root:
                home = home.parent
            if home.parent != self.root:
                return None
            for directory in (home, home / "adapter"):
                inside = directory.resolve().is_relative_to(home)
                if inside and (directory / CONFIG).is_file():
                    return directory
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name that is too long
            pass
        return None

    def check_links(self, directory: Path) -> None:
        """Check that no file of a directory is a link out of the root.

        Raises:
            UserError: one is.
        """
        assert self.root is not None
        for file in directory.iterdir():
            if not file.resolve().is_relative_to(self.root):
                raise UserError(f"{file} is a link to a place outside of the adapter root")


def state_of(directory: Path) -> tuple:
    """Return sizes, times and inodes of an adapter's files, which change when they are replaced."""
    found = []
    for name in (CONFIG, WEIGHTS, "lora_jax.json"):
        try:
            stat = (directory / name).stat()
            found.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ino))
        except FileNotFoundError:
            found.append((name,))
    return tuple(found)
