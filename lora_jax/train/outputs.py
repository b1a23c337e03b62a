"""Outputs of a run: files that it writes to its directories, and may remove there.

    run.begin()                             # run.json, with the ID that every checkpoint repeats
    with run.exporting("adapter", config) as target:
        ...                                 # written next to its place, moved there when complete
    run.digests()                           # of the exported files, for summary.json

Nothing is removed that run.json does not name, and nothing through links.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_jax import hosts
from lora_jax.config import Config
from lora_jax.errors import UserError, raise_all
from lora_jax.report.journal import LOGS, write_whole
from lora_jax.train import checkpoint, lock
from lora_jax.train.run_file import EXPORTS, MARKER, dump, write_place

_SHOWN = 3  # names in a message


@dataclass
class Run:
    """A run in its directories. With several hosts, only the main one writes and removes.

    content: the content of run.json
    begun: whether an earlier session of the run has written to `output`
    """

    output: Path
    place: checkpoint.Place
    content: dict[str, Any]
    begun: bool
    locks: list[lock.Lock]

    @property
    def id(self) -> str:
        return self.content["run"]

    @property
    def _work(self) -> Path:
        """Directory in which exports are made, with the ID of the run in its name."""
        return self.output / f".export-{self.id}"

    def check(self) -> None:
        """Raise if another run has taken over a directory."""
        for held in self.locks:
            held.check()

    def begin(self) -> None:
        """Mark the directories as this run's, before anything else is written there."""
        self.check()
        self._write()
        if self.content["checkpoint_dir"] is not None and hosts.is_main():
            self.place.mkdir(parents=True, exist_ok=True)
            shared = {key: self.content[key] for key in ("run", "lora_jax", "started", "host")}
            write_place(self.place, shared | {"output_dir": str(self.output.absolute())})

    def committed(self) -> None:
        """Record that a checkpoint exists: `resume=auto` must not start anew if it is lost."""
        if not self.content["saved"]:
            self.content["saved"] = True
            self._write()

    def clear_logs(self) -> None:
        """Remove the logs of an earlier session that was killed before its first checkpoint."""
        if self.begun and hosts.is_main():
            for name in LOGS:
                (self.output / name).unlink(missing_ok=True)

    def check_exports(self, names: Iterable[str]) -> None:
        """Raise if exports would go where there are files that this run did not write."""
        raise_all(
            [
                f"{self.output / name} has files that this run did not write, as far as run.json "
                "says; move it away"
                for name in names
                if name not in self.content["exports"] and _holds(self.output / name)
            ]
        )

    def remove_exports(self) -> None:
        """Remove earlier exports of this run, and the remains of a killed export."""
        if not hosts.is_main():
            return
        self.check()
        shutil.rmtree(self._work, ignore_errors=True)  # not through a link
        for name, export in self.content["exports"].items():
            _remove(self.output / name, export["files"])

    @contextlib.contextmanager
    def exporting(self, name: str, config: Config) -> Iterator[Path]:
        """Yield a directory for the export `name`, which replaces an earlier export when the block
        ends without an error. Other files in that directory stay.

        Raises:
            UserError: files or links that this run did not write are in its place.
        """
        if not hosts.is_main():
            yield self._work / name
            return
        self.check()
        shutil.rmtree(self._work, ignore_errors=True)
        try:
            yield self._work / name
            try:
                self._install(name, _settings(config, name))
            except OSError as error:
                raise UserError(f"cannot write {self.output / name}: {error}") from error
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def _install(self, name: str, settings: dict[str, Any]) -> None:
        new, target, exports = self._work / name, self.output / name, self.content["exports"]
        files = sorted(
            file.relative_to(new).as_posix() for file in new.rglob("*") if file.is_file()
        )
        before = exports.get(name, {}).get("files", [])
        if target.is_symlink() or (not before and _holds(target)):
            raise UserError(
                f"{target} was written by another program during the run; move it away, and go on "
                "with resume=true"
            )
        # Before the move: after a kill, run.json must name every file.
        exports[name] = {"files": sorted({*files, *before}), "settings": settings}
        self._write()
        if target.exists() and any(target.iterdir()):
            for file in files:
                _check_parents(target, file)
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (new / file).replace(target / file)
            _remove(target, set(before) - set(files))
        else:
            new.replace(target)
        exports[name]["files"] = files
        self._write()

    def digests(self) -> dict[str, dict[str, Any]]:
        """Return size and SHA-256 of every exported file, by its path in `output`."""
        return {
            f"{name}/{file}": _digest(self.output / name / file)
            for name, export in self.content["exports"].items()
            for file in export["files"]
            if (self.output / name / file).is_file()
        }

    def find_wrong(self, config: Config, summary: Mapping[str, Any]) -> dict[str, str]:
        """Return the exports of `config` that differ from the summary of the finished run, each
        with the reason.
        """
        wrong, known = {}, summary.get("outputs")
        for name in wanted(config):
            target = self.output / name
            prefix = f"{name}/"
            files = {
                file.removeprefix(prefix): digest
                for file, digest in (known or {}).items()
                if file.startswith(prefix)
            }
            problems = [
                f"{file} {problem}"
                for file, digest in files.items()
                if (problem := _differs(target / file, digest))
            ]
            if not _holds(target):
                wrong[name] = "is missing"
            elif problems:
                wrong[name] = f"is not what the run wrote ({some(problems)})"
            elif files and self.content["exports"].get(name, {}).get("settings") != _settings(
                config, name
            ):
                wrong[name] = "was made with other settings"
            elif not files and known is not None:
                wrong[name] = (
                    "was not written by this run"  # and refused, when it is to be replaced
                )
        return wrong

    def _write(self) -> None:
        if hosts.is_main():
            write_whole(self.output / MARKER, dump(self.content))


def wanted(config: Config) -> list[str]:
    """Return the exports at the end of a run of `config`; full fine-tuning exports only a model."""
    full = config.adapter.trains_everything
    chosen = {"adapter": config.export.peft and not full, "merged": config.export.merged or full}
    return [name for name in EXPORTS if chosen[name]]


def _settings(config: Config, name: str) -> dict[str, Any]:
    """Return the settings that change the content of an export."""
    if name == "adapter":
        return {}
    switches = ("peft", "merged")
    return {key: value for key, value in asdict(config.export).items() if key not in switches}


def _holds(path: Path) -> bool:
    """Return True for anything but an empty directory."""
    if path.is_symlink() or not path.is_dir():
        return path.is_symlink() or path.exists()
    return any(path.iterdir())


def _check_parents(target: Path, file: str) -> None:
    for parent in (*(target / file).relative_to(target).parents, Path(".")):
        if (target / parent).is_symlink():
            raise UserError(f"{target / parent} is a link; move it away")


def _remove(target: Path, files: Iterable[str]) -> None:
    """Remove files below `target`, and directories that become empty; nothing through links."""
    if target.is_symlink():
        return
    parents = {target}
    for file in files:
        path = target / file
        below = [parent for parent in path.parents if target in parent.parents]
        if any(parent.is_symlink() for parent in below):
            continue
        with contextlib.suppress(OSError):
            path.unlink()
        parents.update(below)
    for parent in sorted(parents, reverse=True):
        remove_empty(parent)


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {
            "bytes": os.fstat(opened.fileno()).st_size,
            "sha256": hashlib.file_digest(opened, "sha256").hexdigest(),
        }


def _differs(file: Path, digest: Any) -> str | None:
    try:
        return None if _digest(file) == digest else "differs"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
