"""Checkpoints of a run: adapters, optimizer state and a JSON record, one Orbax item each, written
in the background.

    checkpoints/<step>/adapters      the adapter tree
    checkpoints/<step>/optimizer     the optimizer's arrays, by path
    checkpoints/<step>/record        run, step, data position, RNG, config, versions, fingerprint,
                                     leaves
    checkpoints/<step>/sha256.json   a digest of every file above

The base model is not stored. Orbax restores flipped bytes and casts dtypes without an error. So the
record holds dtype, shape and digest of every leaf, `sha256.json` holds the digest of every file,
and reading compares them all. A committed step without a `sha256.json`, after a kill, is still
checked leaf by leaf.
"""

import contextlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lora_jax import hosts, tree
from lora_jax.config import Config, expand
from lora_jax.errors import UserError
from lora_jax.train.checksums import (
    SEAL,
    Place,
    by_name,
    by_path,
    digest_json,
    files_below,
    find_damage,
    leaf_digests,
    seal,
)
from lora_jax.train.checksums import digest_leaves as digest_leaves

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save at INFO and WARNING

ITEMS = ("adapters", "optimizer", "record")
_PARTS = (*ITEMS, SEAL, "_CHECKPOINT_METADATA")  # even a damaged step has one of them
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a step that is not committed


class Checkpoints:
    """Checkpoints of one run. `close` waits for a save that is running."""

    def __init__(
        self,
        directory: Place,
        save_total_limit: int | None = None,
        check: Callable[[], None] = lambda: None,
        committed: Callable[[], None] = lambda: None,
    ):
        # A step without a readable record may be another run's, and is never removed.
        unknown = [step for step in list_steps(directory) if load_record(directory, step) is None]
        self._kept = _Kept(save_total_limit, unknown)
        self._check, self._committed = check, committed
        options = ocp.CheckpointManagerOptions(
            create=True, preservation_policy=self._kept, cleanup_tmp_directories=True
        )
        self._directory = epath.Path(directory).absolute()
        with _as_user_error(f"{directory} cannot be opened"):
            self._manager = ocp.CheckpointManager(
                self._directory, item_names=ITEMS, options=options
            )
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None

    @property
    def steps(self) -> list[int]:
        """Steps with a checkpoint, in order, including one that is being written."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        adapters: Any,
        opt_state: Any,
        record: Mapping[str, Any],
        best_step: int | None = None,
        sound_step: int | None = None,
    ) -> None:
        """Start to write `step`, and return as soon as the arrays are copied. If the step exists,
        its arrays are the same and only its record is replaced.

        After the commit, all steps are removed but the latest, `best_step` and the last one up to
        `sound_step`.

        Raises:
            UserError: this checkpoint or the one before it cannot be written; earlier ones are
                unchanged.
        """
        self.wait()
        self._check()
        self._kept.best_step, self._kept.sound_step = best_step, sound_step
        optimizer = by_name(opt_state)
        leaves = leaf_digests({"adapters": by_path(adapters), "optimizer": optimizer})
        content = {"step": step, **record, "leaves": leaves}
        content["sha256"] = digest_json(content)
        if step in self.steps:
            return self._rewrite(step, content)
        arguments = ocp.args.Composite(
            adapters=ocp.args.StandardSave(adapters),
            optimizer=ocp.args.StandardSave(optimizer),
            record=ocp.args.JsonSave(content),
        )
        with _as_user_error(f"the checkpoint of step {step} cannot be written"):
            self._manager.save(step, args=arguments)
        self._pending = self._worker.submit(self._finish, step)

    def _rewrite(self, step: int, record: Mapping[str, Any]) -> None:
        """Replace the record of a committed step. After a kill one of the two records is complete,
        and a step without `sha256.json` is checked leaf by leaf.
        """
        if hosts.is_main():
            place = self._directory / str(step)
            with _as_user_error(f"the record of step {step} cannot be written"):
                (place / SEAL).unlink(missing_ok=True)
                temporary = self._directory / f".record-{step}"
                temporary.write_text(json.dumps(record), encoding="utf-8")
                temporary.replace(place / "record" / "metadata")
                seal(place)

    def _finish(self, step: int) -> None:
        with _as_user_error(f"the checkpoint of step {step} cannot be written"):
            self._manager.wait_until_finished()
            if hosts.is_main():
                seal(self._directory / str(step))
                self._committed()

    def wait(self) -> None:
        """Wait for a running save.

        Raises:
            UserError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def delete(self, step: int) -> None:
        """Remove a checkpoint."""
        self.wait()
        self._check()
        self._manager.delete(step)

    def close(self) -> None:
        """Wait for a running save, and close the directory."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            with contextlib.suppress(Exception):  # a failed save raises here for a second time
                self._manager.close()


class _Kept:
    """Preservation policy for Orbax: keep the latest steps, the best one, the last sound one, and
    steps of unknown origin.
    """

    def __init__(self, limit: int | None, unknown: Collection[int] = ()):
        self.limit, self.unknown = limit, unknown
        self.best_step: int | None = None
        self.sound_step: int | None = None

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        steps = sorted(info.step for info in checkpoints)
        latest = steps if self.limit is None else steps[-self.limit :]
        sound = [step for step in steps if step <= (self.sound_step or 0)][-1:]
        kept = (*latest, *sound, *self.unknown, self.best_step)
        return [info.step in kept for info in checkpoints]


@contextlib.contextmanager
def open_checkpoints(
    directory: Place,
    save_total_limit: int | None = None,
    check: Callable[[], None] = lambda: None,
    committed: Callable[[], None] = lambda: None,
) -> Iterator[Checkpoints]:
    """Open the checkpoints of `directory`; leaving the block waits for a running save. The main
    host calls `check` before anything is written or removed, and `committed` after each save.
    """
    checkpoints = Checkpoints(directory, save_total_limit, check, committed)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


@contextlib.contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """Raise errors of Orbax and tensorstore, such as a full disk, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise UserError(f"{what}: {reason}") from error


def find_place(config: Config, output: Path) -> Place:
    """Return the directory of the checkpoints of a run in `output`."""
    if config.checkpoint_dir is None:
        return output / "checkpoints"
    bucket = "://" in config.checkpoint_dir
    return (
        epath.Path(config.checkpoint_dir)
        if bucket
        else expand(config.checkpoint_dir, "checkpoint_dir")
    )


def check_place(config: Config) -> None:
    """Raise if `checkpoint_dir` is in a bucket that cannot be opened."""
    if config.checkpoint_dir is None or not config.checkpoint_dir.startswith("gs://"):
        return
    if not any(map(importlib.util.find_spec, ("gcsfs", "tensorflow"))):
        raise UserError(
            f"checkpoint_dir={config.checkpoint_dir!r} needs a package that is not installed; "
            "pip install 'lora_jax[bucket]'"
        )
    try:
        epath.Path(config.checkpoint_dir).exists()
    except Exception as error:  # no login, no network, no such bucket: many exception types
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"checkpoint_dir={config.checkpoint_dir!r} cannot be opened: {reason}"
        ) from error


def list_steps(directory: Place) -> list[int]:
    """Return the committed steps in a directory, in order; none if it does not exist."""
    if not directory.is_dir():
        return []
    found = (path for path in directory.iterdir() if _is_step(path))
    # In a directory, the commit gives a step its name; in a bucket, it writes a marker.
    return sorted(int(path.name) for path in found if ocp.utils.is_checkpoint_finalized(path))


def _is_step(path: Place) -> bool:
    """Return True for a directory that is named by a number and holds parts of a checkpoint."""
    if not re.fullmatch("0|[1-9][0-9]*", path.name) or not path.is_dir():
        return False
    return any((path / part).exists() for part in _PARTS)


def is_temporary(path: Place) -> bool:
    """Return True for the remains of a killed save, which Orbax removes."""
    name = path.name
    return _TEMPORARY in name or re.fullmatch(r"\.record-[0-9]+", name) is not None


def misleading(directory: Place) -> list[str]:
    """Return names that Orbax would treat as steps, but which are links or no steps."""
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if _is_misleading(path))


def _is_misleading(path: Place) -> bool:
    if not path.name.isdigit():
        return False
    if isinstance(path, Path) and path.is_symlink():
        return True
    # A kill while Orbax removes a step may leave an empty directory.
    return not _is_step(path) and not (
        path.name.isascii() and path.is_dir() and not any(path.iterdir())
    )


def load_record(directory: Place, step: int) -> dict[str, Any] | None:
    """Return the record of a step without checking its other files; None if it is damaged."""
    try:
        file = directory / str(step) / "record" / "metadata"
        record = json.loads(file.read_text(encoding="utf-8"))
        digest = record.pop("sha256")
        return record if digest == digest_json(record) else None
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        return None


def size(directory: Place, step: int) -> int:
    """Return the bytes of all files of a step."""
    return sum(file.stat().length for file in files_below(epath.Path(directory / str(step))))


def read_record(directory: Place, step: int | None = None) -> dict[str, Any]:
    """Return the record of a step (by default the latest), after a check of its files.

    Raises:
        UserError: no such checkpoint; a file that is damaged, missing or not from the save; a
            directory whose name is not its step.
    """
    steps = list_steps(directory)
    if not steps:
        raise UserError(f"{directory} has no checkpoint to read")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise UserError(f"{directory} has no checkpoint of step {chosen}; it has: {steps}")
    place = directory / str(chosen)
    if problems := find_damage(place):
        raise _damaged(place, problems)
    record = load_record(directory, chosen)
    if record is None:
        raise _damaged(place, [f"{chosen}/record/metadata is damaged"])
    if record.get("step") != chosen:
        raise UserError(
            f"{place} is the checkpoint of step {record.get('step')}, renamed or copied; "
            "give it its name, or remove it"
        )
    return record


def restore(
    directory: Place, adapters: Any, opt_state: Any = None, step: int | None = None
) -> tuple[Any, Any, dict]:
    """Return adapters, optimizer state (if its structure is given) and record of a step, by default
    the latest.

    `adapters` and `opt_state` give structure, shapes, dtypes and shardings, as arrays or
    `jax.ShapeDtypeStruct`s; the mesh need not be the one of the save.

    Raises:
        UserError: there is no checkpoint; files or leaves are damaged; leaves differ from
            `adapters` or `opt_state`.
    """
    record = read_record(directory, step)
    place = directory / str(record["step"])
    wanted = {"adapters": by_path(adapters)}
    items: dict[str, Any] = {"adapters": ocp.args.StandardRestore(adapters)}
    if opt_state is not None:
        wanted["optimizer"] = by_name(opt_state)
        items["optimizer"] = ocp.args.StandardRestore(wanted["optimizer"])
    _check_leaves(place, record["leaves"], wanted)
    with (
        _as_user_error(f"checkpoint {place} cannot be read"),
        ocp.CheckpointManager(epath.Path(directory).absolute(), item_names=ITEMS) as manager,
    ):
        found = manager.restore(record["step"], args=ocp.args.Composite(**items))
    loaded = {"adapters": by_path(found["adapters"])}
    if opt_state is not None:
        loaded["optimizer"] = found["optimizer"]
        leaves = [found["optimizer"][name] for name in wanted["optimizer"]]
        opt_state = jax.tree.unflatten(jax.tree.structure(opt_state), leaves)
    changed = [
        f"{name} does not hold what was saved"
        for name, described in leaf_digests(loaded).items()
        if described != {**described, **record["leaves"][name]}
    ]
    if changed:
        raise _damaged(place, changed)
    return found["adapters"], opt_state, record


def _damaged(place: Place, problems: list[str]) -> UserError:
    others = [step for step in list_steps(place.parent) if str(step) != place.name]
    advice = (
        f"remove {place} to go on from step {others[-1]}"
        if others
        else "there is no other checkpoint in this run"
    )
    return UserError(f"checkpoint {place} is damaged ({advice}):\n  {tree.summarize(problems)}")


def _check_leaves(place: Place, stored: Mapping[str, Any], wanted: Mapping[str, Mapping]) -> None:
    """Raise if structure, shapes or dtypes differ from the save's. The error names every leaf."""
    expected = {
        f"{item}/{name}": (list(leaf.shape), str(leaf.dtype))
        for item, leaves in wanted.items()
        for name, leaf in leaves.items()
    }
    saved = {
        name: (entry["shape"], entry["dtype"])
        for name, entry in stored.items()
        if name.partition("/")[0] in wanted
    }
    problems = [
        f"{name}: {saved.get(name, 'missing')} in the checkpoint, {expected.get(name, 'none')} here"
        for name in sorted({*saved, *expected})
        if saved.get(name) != expected.get(name)
    ]
    if problems:
        raise UserError(
            f"checkpoint {place} does not fit the model and config:\n  {tree.summarize(problems)}"
        )
