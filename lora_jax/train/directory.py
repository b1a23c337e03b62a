"""Directories of a run, and the rules for using them.

    run, record = open_run(config, held)    # locked until `held` ends; nothing else is changed yet

A directory belongs to the run that its run.json names. Without a run.json, as in older runs, it
belongs to the run of its checkpoints if its config.yaml equals the one in their record.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_jax import hosts
from lora_jax.config import Config, expand, load
from lora_jax.errors import UserError, raise_all
from lora_jax.report.journal import LOGS
from lora_jax.train import checkpoint, lock, resume
from lora_jax.train.outputs import Run, remove_empty, some
from lora_jax.train.run_file import EXPORTS, MARKER, new_content, read_marker, read_place

_FILES = (MARKER, "config.yaml", "summary.json", "run_id.txt", *LOGS)
_DIRECTORIES = (*EXPORTS, "plots", "tensorboard")


def open_run(config: Config, held: contextlib.ExitStack) -> tuple[Run, dict[str, Any] | None]:
    """Lock the directories of a run until `held` ends. Return the run, and the record of the
    checkpoint that it goes on from, or None for a new run.

    Raises:
        UserError: a live run uses one of the directories; they hold files of another run or of no
            run; `resume=true` without a checkpoint; `resume=auto` without the checkpoints that the
            run had; a damaged checkpoint; links or files in the place of outputs.
    """
    output, locks = expand(config.output_dir, "output_dir"), []
    place = checkpoint.find_place(config, output)
    found = hosts.from_main(lambda: _open(config, output, place, held, locks))
    return Run(output, place, found["content"], found["begun"], locks), found["record"]


def find_refusal(config: Config) -> str | None:
    """Return the reason why a run would be refused because of its directories, or None. Nothing is
    changed.

    Raises:
        UserError: a file in place of a directory; one that cannot be made or written.
    """
    output = expand(config.output_dir, "output_dir")
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
    """Return the directories to lock, by setting; a bucket has no locks."""
    return {"output_dir": output} | ({"checkpoint_dir": place} if isinstance(place, Path) else {})


def _look(config: Config, output: Path, place: checkpoint.Place, named: Mapping[str, Path]) -> None:
    """Check the directories of a run before anything is locked."""
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
                held.callback(remove_empty, directory)
            locks.append(held.enter_context(lock.hold(directory, name)))
        content, begun, goes_on = _inspect(config, output, place)
        record = checkpoint.read_record(place) if goes_on else None
        if record is not None and not begun:
            _check_old(output, place, record)
        _check_kinds(output, content["run"])
        return {"content": content, "begun": begun, "record": record}


@contextlib.contextmanager
def _usable(config: Config) -> Iterator[None]:
    """Raise impossible file names and unreadable directories as a UserError."""
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
    """Return the content of run.json (a new run's if there is none), whether the file exists, and
    whether the run resumes from a checkpoint.
    """
    mine = read_marker(output)
    external = config.checkpoint_dir is not None
    theirs = read_place(place) if external else mine
    steps = checkpoint.list_steps(place)
    _check_strangers(place, steps, theirs, external)
    ids = _find_ids(place, steps)
    place_id: str | None = theirs["run"] if theirs else None
    if mine is not None and (other := ({*ids, place_id} - {mine["run"], None})):
        raise UserError(
            f"output_dir={str(output)!r} belongs to run {mine['run']}, and {place} has checkpoints "
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
    content = dict(mine or new_content(place_id or next(iter(ids), None)))
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
    """Raise if a run must not start in `output`, or with `taken`, not in `place`."""
    named = f"output_dir={str(output)!r}"
    if config.checkpoint_dir is not None:
        named += f" or checkpoint_dir={config.checkpoint_dir!r}"
    lost = mine if mine is not None and mine["saved"] and not steps else None
    if config.resume is True:
        rest = (
            f"; {_advice(lost, output)}"
            if lost is not None
            else "; resume=auto starts anew where there is none"
        )
        raise UserError(f"resume=true, but {named} has no checkpoint to go on from{rest}")
    if config.resume == "auto" and lost is not None:
        raise UserError(
            f"{named} has no checkpoint, and its run had some: {_advice(lost, output)}. To start "
            "anew, choose another output_dir or remove this one"
        )
    found = [name for name in _entries(output) if not _leads_to(output / name, place)]
    if taken or (found and not (config.resume == "auto" and mine is not None)):
        advice = "; resume=true goes on from its last checkpoint" if steps else ""
        if config.resume == "auto" and mine is None:
            advice = f"; it has no {MARKER}, which every run writes, so no run starts anew there"
        raise UserError(
            f"{named} already has a run or other files ({some(found or _entries(place))}); "
            f"choose another or remove it{advice}"
        )


def _advice(mine: Mapping[str, Any], output: Path) -> str:
    place, those = mine.get("checkpoint_dir"), f"those of run {mine['run']} were in"
    if place is None:
        return f"{those} {output / 'checkpoints'}; leave checkpoint_dir out"
    return f"{those} {place}; set checkpoint_dir={place}"


def _check_strangers(
    place: checkpoint.Place, steps: list[int], marker: Mapping | None, external: bool
) -> None:
    """Raise if a directory of checkpoints holds something that Orbax might remove."""
    if not place.is_dir():
        return
    if misleading := checkpoint.misleading(place):
        raise UserError(
            f"{place} has something that is not a checkpoint of a run and looks like one: "
            f"{some(misleading)}; move it away"
        )
    strange = _entries(place)
    if marker is None and not steps and strange:
        name = "checkpoint_dir" if external else "output_dir"
        raise UserError(
            f"{name}: {str(place)!r} has other files ({some(strange)}), and no run.json of a "
            "run; choose another, or an empty one"
        )


def _find_ids(place: checkpoint.Place, steps: list[int]) -> dict[str, list[int]]:
    """Return steps by the run ID in their records; older records without an ID are left out."""
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
    except ValueError:  # not a file, or damaged
        same = False
    if not same:
        raise UserError(
            f"output_dir={str(output)!r} has {some(ours)}, and no run.json or config.yaml "
            "that says they belong to the run of the checkpoints; choose another output_dir, or "
            "move them away"
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
            problems.append(f"{path} is not a {kind}, which the run writes there; move it away")
    raise_all(problems)


def _entries(directory: checkpoint.Place) -> list[str]:
    """Return the names in a directory, without locks; none if it does not exist."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(path.name for path in found if not path.name.startswith(lock.NAME))


def _leads_to(path: Path, place: checkpoint.Place) -> bool:
    """Return True for directories that hold only the empty directory for checkpoints."""
    while isinstance(place, Path) and path.is_dir() and not path.is_symlink():
        inside = _entries(path)
        if path.resolve() == place.resolve():
            return not inside
        if len(inside) != 1:
            return False
        path /= inside[0]
    return False


def _absolute(place: checkpoint.Place) -> checkpoint.Place:
    return place.absolute() if isinstance(place, Path) else place
