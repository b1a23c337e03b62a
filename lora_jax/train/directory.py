"""The directories of a run: who may use them, and what in them the run may remove.

    run, record = open_run(config, held)    # locked until `held` ends; nothing else is changed yet
    run.begin()                             # run.json, with the ID that every checkpoint repeats
    with run.exporting("adapter", config) as target:
        ...                                 # written next to its place, and put there when whole
    run.digests()                           # of the exported files, for summary.json

`run.json` makes a directory that of a run. It holds its ID, where its checkpoints are and which
files it exported; a `checkpoint_dir` of its own has one too. Nothing is removed that these do not
name, and nothing through links. A directory of before there was a `run.json` is that of a run if it
holds checkpoints and its config.yaml is that of their record.
"""

import contextlib
import datetime
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_jax import hosts
from lora_jax.config import Config, UserError, load, raise_all, read_json
from lora_jax.train import checkpoint, lock, resume
from lora_jax.train.metrics import LOGS, write_whole

MARKER = "run.json"
EXPORTS = ("adapter", "merged")
_FILES = (MARKER, "config.yaml", "summary.json", "run_id.txt", *LOGS)
_DIRECTORIES = (*EXPORTS, "plots", "tensorboard")
_SHOWN = 3  # names in a message


@dataclass
class Run:
    """A run in its directories. Of several hosts the main one alone writes and removes.

    content: what run.json says
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
        """Where exports are made; the ID in its name says whose it is."""
        return self.output / f".export-{self.id}"

    def check(self) -> None:
        """Raise if another run has taken a directory over."""
        for held in self.locks:
            held.check()

    def begin(self) -> None:
        """Write that the directories are this run's, before anything else is written there."""
        self.check()
        self._write()
        if self.content["checkpoint_dir"] is not None and hosts.is_main():
            self.place.mkdir(parents=True, exist_ok=True)
            shared = {key: self.content[key] for key in ("run", "lora_jax", "started", "host")}
            _write_place(self.place, shared | {"output_dir": str(self.output.absolute())})

    def committed(self) -> None:
        """Take note of a first checkpoint: without it, `resume=auto` must not start anew."""
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
                f"{self.output / name} holds files, and no record says that this run wrote them; "
                "move it away"
                for name in names
                if name not in self.content["exports"] and _holds(self.output / name)
            ]
        )

    def remove_exports(self) -> None:
        """Remove what this run exported before, and what a kill left of an export."""
        if not hosts.is_main():
            return
        self.check()
        shutil.rmtree(self._work, ignore_errors=True)  # not through a link
        for name, export in self.content["exports"].items():
            _remove(self.output / name, export["files"])

    @contextlib.contextmanager
    def exporting(self, name: str, config: Config) -> Iterator[Path]:
        """A place to write the export `name`, which takes the place of an earlier one when the
        block ends well. Other files in that directory stay.

        Raises:
            UserError: files or links of somebody else are in its place.
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
                f"{target} was made by somebody else meanwhile; move it away, and go on with "
                "resume=true"
            )
        # Before it is done: a kill must not leave files that nothing names.
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
        """Size and SHA-256 of every exported file, by its path in `output`."""
        return {
            f"{name}/{file}": _digest(self.output / name / file)
            for name, export in self.content["exports"].items()
            for file in export["files"]
            if (self.output / name / file).is_file()
        }

    def find_wrong(self, config: Config, summary: Mapping[str, Any]) -> dict[str, str]:
        """Exports that `config` asks for and that are not what the summary of the finished run
        says, with the reason.
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
                wrong[name] = f"is not what the run wrote ({_some(problems)})"
            elif files and self.content["exports"].get(name, {}).get("settings") != _settings(
                config, name
            ):
                wrong[name] = "was made with other settings"
            elif not files and known is not None:
                wrong[name] = "is not of this run"  # and refused, when it is to be replaced
        return wrong

    def _write(self) -> None:
        if hosts.is_main():
            write_whole(self.output / MARKER, _dump(self.content))


def wanted(config: Config) -> list[str]:
    """The exports that a run of `config` ends with; full fine-tuning has a model alone."""
    full = config.adapter.method == "full"
    chosen = {"adapter": config.export.peft and not full, "merged": config.export.merged or full}
    return [name for name in EXPORTS if chosen[name]]


def _settings(config: Config, name: str) -> dict[str, Any]:
    """The settings that change what an export holds."""
    if name == "adapter":
        return {}
    switches = ("peft", "merged")
    return {key: value for key, value in asdict(config.export).items() if key not in switches}


def open_run(config: Config, held: contextlib.ExitStack) -> tuple[Run, dict[str, Any] | None]:
    """Lock the directories of a run until `held` ends. Returns the run and the record of the
    checkpoint that it goes on from; None: it starts anew.

    Raises:
        UserError: a live run uses one of the directories; they hold files that are no run's, or
            another run's; `resume=true` without a checkpoint; `resume=auto` without the checkpoints
            that the run had; a damaged checkpoint; links or files in the place of outputs.
    """
    output, locks = Path(config.output_dir).expanduser(), []
    place = checkpoint.find_place(config, output)
    found = hosts.from_main(lambda: _open(config, output, place, held, locks))
    return Run(output, place, found["content"], found["begun"], locks), found["record"]


def preview(config: Config) -> str | None:
    """Look at the directories of a run and change nothing. Return why a run would be refused that
    found them as they are, or None.

    Raises:
        UserError: a file in place of a directory; one that cannot be made or written.
    """
    output = Path(config.output_dir).expanduser()
    place = checkpoint.find_place(config, output)
    named = _name(output, place)
    with _usable(config):
        for name, directory in named.items():
            there = directory
            while not there.exists() and there != there.parent:
                there = there.parent
            if not there.is_dir():
                raise UserError(f"{name}={str(directory)!r}: {str(there)!r} is a file")
            if not os.access(there, os.W_OK | os.X_OK):
                raise UserError(f"{name}={str(directory)!r}: {str(there)!r} is not writable")
    try:
        with _usable(config):
            _look(config, output, place, named)
    except UserError as error:
        return str(error)
    return None


def _name(output: Path, place: checkpoint.Place) -> dict[str, Path]:
    """The directories that take a lock, by their setting; a bucket has no locks."""
    return {"output_dir": output} | ({"checkpoint_dir": place} if isinstance(place, Path) else {})


def _look(config: Config, output: Path, place: checkpoint.Place, named: Mapping[str, Path]) -> None:
    """Raise what speaks against a run before anything is locked."""
    _check_place(config, output, place)
    for name, directory in named.items():
        if directory.is_dir():
            lock.look(directory, name)
    _inspect(config, output, place)


def _open(
    config: Config,
    output: Path,
    place: checkpoint.Place,
    held: contextlib.ExitStack,
    locks: list[lock.Lock],
) -> dict[str, Any]:
    named = _name(output, place)
    with _usable(config):
        _look(config, output, place, named)
        for name, directory in named.items():
            _make(name, directory)
            if name == "checkpoint_dir":
                held.callback(_remove_empty, directory)
            locks.append(held.enter_context(lock.hold(directory, name)))
        content, begun, goes_on = _inspect(config, output, place)
        record = checkpoint.read_record(place) if goes_on else None
        if record is not None and not begun:
            _check_old(output, place, record)
        _check_kinds(output, content["run"])
        return {"content": content, "begun": begun, "record": record}


@contextlib.contextmanager
def _usable(config: Config) -> Iterator[None]:
    """Names that no file can have, and directories that cannot be read, as one kind of error."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte
        where = "" if config.checkpoint_dir is None else " or checkpoint_dir"
        raise UserError(
            f"output_dir={config.output_dir!r}{where} cannot be used: {error}"
        ) from error


def _make(name: str, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name}={str(directory)!r} cannot be made: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"{name}={str(directory)!r} is not writable")


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _check_place(config: Config, output: Path, place: checkpoint.Place) -> None:
    """Raise if checkpoints would be where logs or exports are."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir={str(output)!r} is a file; choose a directory")
    checkpoint.check_place(config)
    if config.checkpoint_dir is None or not isinstance(place, Path):
        return
    if place.exists() and not place.is_dir():
        raise UserError(f"checkpoint_dir={config.checkpoint_dir!r} is a file; choose a directory")
    inside = Path(os.path.relpath(place.resolve(), output.resolve())).parts
    if not inside or inside[0] in _DIRECTORIES:
        what = "is output_dir itself" if not inside else f"is in {output / inside[0]}"
        raise UserError(
            f"checkpoint_dir={config.checkpoint_dir!r} {what}, which has other files; leave it out "
            "for checkpoints in OUTPUT_DIR/checkpoints, or choose a directory of its own"
        )


def _inspect(
    config: Config, output: Path, place: checkpoint.Place
) -> tuple[dict[str, Any], bool, bool]:
    """The content of run.json, as it is or for a new run, whether it is there already, and whether
    the run goes on from a checkpoint.
    """
    mine = _read_marker(output)
    external = config.checkpoint_dir is not None
    theirs = _read_place(place) if external else mine
    steps = checkpoint.list_steps(place)
    _check_strangers(place, steps, theirs, external)
    ids = _find_ids(place, steps)
    place_id: str | None = theirs["run"] if theirs else None
    if mine is not None and (other := ({*ids, place_id} - {mine["run"], None})):
        raise UserError(
            f"output_dir={str(output)!r} is that of run {mine['run']}, and {place} has checkpoints "
            f"of run {', '.join(sorted(other))}; {_advice(mine, output)}"
        )
    if len(several := {*ids, place_id} - {None}) > 1:
        found = [f"{run} (steps {ids.get(run, 'none')})" for run in sorted(several)]
        raise UserError(
            f"{place} has checkpoints of several runs: {', '.join(found)}; keep those of one"
        )
    goes_on = config.resume is not False and bool(steps)
    if not goes_on:
        taken = bool(steps) or (external and theirs is not None and config.resume is False)
        _check_start(config, output, place, mine, steps, taken)
    content = dict(mine or _new_content(place_id or next(iter(ids), None)))
    content["checkpoint_dir"] = str(_absolute(place)) if external else None
    content["saved"] = content["saved"] or bool(steps)
    return content, mine is not None, goes_on


def _check_start(
    config: Config,
    output: Path,
    place: checkpoint.Place,
    mine: Mapping[str, Any] | None,
    steps: list[int],
    taken: bool,
) -> None:
    """Raise if a run must not start in `output`; `taken`: nor one in `place`."""
    named = f"output_dir={str(output)!r}"
    if config.checkpoint_dir is not None:
        named += f" or checkpoint_dir={config.checkpoint_dir!r}"
    lost = mine is not None and mine["saved"] and not steps
    if config.resume is True:
        rest = (
            f". {_advice(mine, output)}"
            if lost
            else "; resume=auto starts anew where there is none"
        )
        raise UserError(f"resume=true, but {named} has no checkpoint to go on from{rest}")
    if config.resume == "auto" and lost:
        raise UserError(
            f"{named} has no checkpoint, and the run in it had some: {_advice(mine, output)}. To "
            "start anew, choose another output_dir or remove this one"
        )
    found = [name for name in _entries(output) if not _leads_to(output / name, place)]
    if taken or (found and not (config.resume == "auto" and mine is not None)):
        advice = "; resume=true goes on from its last checkpoint" if steps else ""
        if config.resume == "auto" and mine is None:
            advice = f"; without {MARKER}, which every run writes, it is no run's to start anew"
        raise UserError(
            f"{named} already holds a run or other files ({_some(found or _entries(place))}); "
            f"choose another or remove it{advice}"
        )


def _advice(mine: Mapping[str, Any] | None, output: Path) -> str:
    place = (mine or {}).get("checkpoint_dir")
    if place is None:
        return f"they were in {output / 'checkpoints'}; leave checkpoint_dir out"
    return f"they were in {place}; set checkpoint_dir={place}"


def _check_strangers(
    place: checkpoint.Place, steps: list[int], marker: Mapping | None, external: bool
) -> None:
    """Raise if a directory of checkpoints holds something that Orbax might remove."""
    if not place.is_dir():
        return
    if misleading := checkpoint.misleading(place):
        raise UserError(
            f"{place} holds what is no checkpoint of a run, but looks like one: "
            f"{_some(misleading)}; move it away"
        )
    strange = _entries(place)
    if marker is None and not steps and strange:
        name = "checkpoint_dir" if external else "output_dir"
        raise UserError(
            f"{name}: {str(place)!r} holds other files ({_some(strange)}), and no run.json that "
            "makes it a run's; choose another, or an empty one"
        )


def _find_ids(place: checkpoint.Place, steps: list[int]) -> dict[str, list[int]]:
    """Steps by the run that their records name; those of before runs had IDs are left out."""
    found: dict[str, list[int]] = {}
    for step in steps:
        run = (checkpoint.load_record(place, step) or {}).get("run")
        if isinstance(run, str):
            found.setdefault(run, []).append(step)
    return found


def _check_old(output: Path, place: checkpoint.Place, record: Mapping[str, Any]) -> None:
    """Raise if `output`, which has no run.json, holds files that are not of the run of `record`."""
    names = [name for name in _entries(output) if not _leads_to(output / name, place)]
    ours = sorted({*names} & {*_FILES, *_DIRECTORIES}) if place.parent == output else names
    if not ours:
        return
    try:
        same = not resume.differences(record, load(output / "config.yaml", []))
    except ValueError:  # a file that is damaged, or is none
        same = False
    if not same:
        raise UserError(
            f"output_dir={str(output)!r} holds {_some(ours)}, and neither a run.json nor a "
            "config.yaml that says they are of the run of the checkpoints; choose another "
            "output_dir, or move them away"
        )


def _check_kinds(output: Path, run: str) -> None:
    """Raise if a link, or a file of another kind, is in the place of an output."""
    problems = []
    work = (f".export-{run}",)
    for name in (*_FILES, *(f".{name}" for name in _FILES), *_DIRECTORIES, *work, "checkpoints"):
        path, kind = output / name, "directory"
        if name in _FILES or name.removeprefix(".") in _FILES:
            kind, fits = "file", path.is_file()
        else:
            fits = path.is_dir()
        if name == "checkpoints" and fits:
            continue  # on another disk, perhaps
        if path.is_symlink():
            problems.append(f"{path} is a link, where the run writes a {kind}; move it away")
        elif path.exists() and not fits:
            problems.append(f"{path} is no {kind}, as the run writes there; move it away")
    raise_all(problems)


# run.json


def _new_content(run: str | None) -> dict[str, Any]:
    return {
        "run": run or secrets.token_hex(8),
        "lora_jax": version("lora_jax"),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "checkpoint_dir": None,  # OUTPUT_DIR/checkpoints
        "saved": False,  # a checkpoint
        "exports": {},
    }


def _read_marker(output: Path) -> dict[str, Any] | None:
    """The content of the run.json of an output directory; None if it has none of a run."""
    content = _read(output / MARKER) if (output / MARKER).is_file() else None
    if content is None or not isinstance(content.get("exports"), dict):
        return None
    for name, export in content["exports"].items():
        files = export.get("files") if isinstance(export, dict) else None
        if name not in EXPORTS or not isinstance(files, list) or not all(map(_is_plain, files)):
            raise UserError(f"{output / MARKER} is damaged: exports.{name}; remove it")
    place = content.get("checkpoint_dir")
    if not isinstance(content.get("saved"), bool) or not (place is None or isinstance(place, str)):
        return None
    return content


def _read_place(place: checkpoint.Place) -> dict[str, Any] | None:
    """The same for a directory of checkpoints."""
    file = place / MARKER
    if isinstance(file, Path):
        return _read(file) if file.is_file() else None
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return content if isinstance(content, dict) and _is_id(content.get("run")) else None


def _read(file: Path) -> dict[str, Any] | None:
    content = read_json(file)
    return content if _is_id(content.get("run")) else None


def _write_place(place: checkpoint.Place, content: Mapping[str, Any]) -> None:
    if isinstance(place, Path):
        write_whole(place / MARKER, _dump(content))
    else:
        (place / MARKER).write_text(_dump(content), encoding="utf-8")


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _is_id(text: Any) -> bool:
    return isinstance(text, str) and text.isascii() and text.isalnum() and len(text) <= 64


def _is_plain(file: Any) -> bool:
    """Return True for a relative path that stays below its directory."""
    if not isinstance(file, str) or "\0" in file:
        return False
    parts = file.split("/")
    return all(part not in ("", ".", "..") for part in parts)


# Files


def _entries(directory: checkpoint.Place) -> list[str]:
    """Names in a directory, which need not exist, without those of locks."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(path.name for path in found if not path.name.startswith(lock.NAME))


def _leads_to(path: Path, place: checkpoint.Place) -> bool:
    """Return True for directories that hold nothing but the one for checkpoints, which is empty."""
    while isinstance(place, Path) and path.is_dir() and not path.is_symlink():
        inside = _entries(path)
        if path.resolve() == place.resolve():
            return not inside
        if len(inside) != 1:
            return False
        path /= inside[0]
    return False


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
    """Remove files below `target`, and directories that are empty then; nothing through links."""
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
        _remove_empty(parent)


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


def _absolute(place: checkpoint.Place) -> checkpoint.Place:
    return place.absolute() if isinstance(place, Path) else place


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
