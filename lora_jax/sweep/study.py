"""Trials from Optuna, which samples, prunes and stores them: `sampler: tpe`, and `--storage`.

Several processes may share a storage. Each asks for trials and tells their end. A trial belongs to
the process that asked for it, as long as a thread there renews its mark every `BEAT` seconds; one
that was not renewed for `DEAD` seconds has failed, and its point is given out again. A process that
was only asleep finds that out and drops the trial.
"""

import contextlib
import random
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_jax import config as configs
from lora_jax.config import Config
from lora_jax.errors import UserError
from lora_jax.sweep import results
from lora_jax.sweep.space import (
    Choices,
    Range,
    Settings,
    Space,
    Trial,
    draws,
    grid,
    make_trial,
)

BEAT = 10.0  # seconds after which a process renews the marks of its trials
DEAD = 120.0  # seconds without renewal after which a trial counts as abandoned
_JOURNAL = "optuna.journal"
_TRIES = 3
_MOST = 256  # combinations of choices that the programs are made for


def open_study(config: Config, space: Space, storage: str | None, name: str) -> "Study":
    """Open the study of a sweep, or make it. Without `storage` it is a file in `output_dir`.

    Raises:
        UserError: Optuna is not installed; the storage cannot be reached.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "sampler=tpe and --storage need Optuna: pip install 'lora_jax[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    halving = space.halving
    pruner = optuna.pruners.NopPruner()
    if halving is not None:
        pruner = optuna.pruners.SuccessiveHalvingPruner(halving.first_step, halving.factor, 0)
    seed = config.seed % 2**32 if storage is None else None
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    where = storage or str(configs.expand(config.output_dir, "output_dir") / _JOURNAL)
    with _reaching(where):
        found = optuna.create_study(
            storage=_open_storage(where, _TRIES),
            study_name=f"sweep-{name[:16]}",
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
    points = None if space.sampler == "tpe" else list(_points(config, space))
    return Study(config, space, where, found, points)


def _points(config: Config, space: Space) -> Iterator[Settings]:
    return grid(space) if space.sampler == "grid" else draws(space, config.seed)


@contextlib.contextmanager
def _reaching(where: str) -> Iterator[None]:
    """Raise errors of a storage as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of SQLAlchemy, drivers and file systems
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the storage {where} cannot be reached: {reason}; give a URL as sqlite:///sweep.db or "
            "mysql://user@host/name, or a file"
        ) from error


def _open_storage(where: str, tries: int) -> Any:
    """Return the storage at a URL, or in a journal file. Processes that begin together may make the
    tables of a database at once, of which one succeeds: the others try again.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    if "://" not in where:
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(where))
    try:
        return optuna.storages.get_storage(where)
    except Exception:  # of SQLAlchemy and drivers
        if tries <= 1:
            raise
        time.sleep(random.uniform(0.0, 0.5))
        return _open_storage(where, tries - 1)


@dataclass
class Study:
    """A source of trials (`schedule.Source`) over a study of Optuna.

    points: settings of a grid or of random draws; None if Optuna samples
    owner: name of this process in the storage
    """

    config: Config
    space: Space
    where: str
    study: Any
    points: list[Settings] | None
    owner: str = field(default_factory=lambda: secrets.token_hex(8))
    running: dict[int, Any] = field(default_factory=dict)
    _lost: set[int] = field(default_factory=set)

    @property
    def wanted(self) -> int:
        """Number of trials that are to end."""
        return len(self.points) if self.points is not None else self.space.trials or 0

    def skeleton(self) -> list[Trial]:
        """Return trials whose programs have room for any of the space: every choice, and both ends
        of the ranges.
        """
        if self.points is not None:
            return [make_trial(self.config, i, point) for i, point in enumerate(self.points)]
        found: list[Settings] = [{}]
        for axis in self.space.axes:
            if isinstance(axis, Range):
                ends = [round(x) if axis.whole else x for x in (axis.low, axis.high)]
                own: list[Settings] = [{axis.field: end} for end in ends]
            else:
                own = list(axis.entries)
            if len(found) * len(own) > _MOST:
                raise UserError(
                    f"{self.space.source}: the choices have more than {_MOST} combinations; "
                    "use ranges, or fewer values"
                )
            found = [{**one, **more} for one in found for more in own]
        return [make_trial(self.config, i, settings) for i, settings in enumerate(found)]

    def ask(self, most: int) -> list[Trial]:
        """Return up to `most` new trials."""
        found: list[Trial] = []
        with _reaching(self.where):
            self._fail_abandoned()
            while len(found) < most and (asked := self._ask()) is not None:
                own, settings = asked
                self.running[own.number] = own
                found.append(make_trial(self.config, own.number, settings))
        return found

    def _ask(self) -> tuple[Any, Settings] | None:
        """Return a trial of Optuna and its settings; None if all are taken."""
        from optuna.trial import TrialState

        if len(self._kept()) >= self.wanted:
            return None
        own = self.study.ask()
        self._mark(own)
        earlier = [one for one in self._kept() if one.number < own.number]
        settings = None
        if len(earlier) < self.wanted:
            settings = self._claim(own) if self.points is not None else self._suggest(own)
        if settings is None:
            self.study.tell(own, state=TrialState.FAIL)
            return None
        return own, settings

    def _kept(self) -> list[Any]:
        """Return the trials that have not failed."""
        from optuna.trial import TrialState

        return [one for one in self.study.get_trials(False) if one.state != TrialState.FAIL]

    def _mark(self, own: Any) -> None:
        own.set_user_attr("owner", self.owner)
        own.set_user_attr("beat", time.time())

    def _suggest(self, own: Any) -> Settings:
        """Return the settings that Optuna draws."""
        found: Settings = {}
        for axis in self.space.axes:
            if isinstance(axis, Choices):
                number = own.suggest_categorical(axis.name, list(range(len(axis.entries))))
                found |= axis.entries[number]
            elif axis.whole:
                low, high = round(axis.low), round(axis.high)
                found[axis.field] = own.suggest_int(axis.field, low, high, log=axis.log)
            else:
                ends = axis.low, axis.high
                found[axis.field] = own.suggest_float(axis.field, *ends, log=axis.log)
        return found

    def _claim(self, own: Any) -> Settings | None:
        """Return the settings of a point that no other trial has; None if there is none.

        A claim holds if no other is seen after it is written; of two at once, both try again.
        """
        assert self.points is not None
        while True:
            taken = self._claims(own)
            free = [number for number in range(len(self.points)) if number not in taken]
            if not free:
                return None
            own.set_user_attr("point", free[0])
            if free[0] not in self._claims(own):
                return self.points[free[0]]
            own.set_user_attr("point", None)
            time.sleep(random.uniform(0.0, 0.2))

    def _claims(self, own: Any) -> set[int]:
        """Return the points of all other trials that have not failed."""
        others = (one for one in self._kept() if one.number != own.number)
        return {
            one.user_attrs["point"] for one in others if one.user_attrs.get("point") is not None
        }

    def _fail_abandoned(self) -> None:
        """Mark trials whose process is gone as failed, so that others take their points."""
        from optuna.trial import TrialState

        now = time.time()
        for one in self.study.get_trials(False, states=(TrialState.RUNNING,)):
            age = now - one.user_attrs.get("beat", now if one.user_attrs else 0.0)
            if one.number not in self.running and age > DEAD:
                with contextlib.suppress(ValueError, RuntimeError):  # another process was first
                    self.study.tell(one.number, state=TrialState.FAIL)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Renew the marks of the trials of this process while the block runs."""
        over = threading.Event()
        thread = threading.Thread(target=self._beat, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _beat(self, over: threading.Event) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        while not over.wait(BEAT):
            for number, own in list(self.running.items()):
                try:
                    own.set_user_attr("beat", time.time())
                except UpdateFinishedTrialError:
                    self._lost.add(number)
                except Exception:  # of a storage that is away: the next question to it says so
                    break

    def lost(self) -> set[int]:
        """Return the trials of this process that others have taken over, each once."""
        found = self._lost & self.running.keys()
        for number in found:
            del self.running[number]
        self._lost.clear()
        return found

    def waits(self) -> bool:
        """Return True while other processes have trials, which may be abandoned."""
        from optuna.trial import TrialState

        with _reaching(self.where):
            found = self.study.get_trials(False, states=(TrialState.RUNNING,))
        return any(one.number not in self.running for one in found)

    def adopt(self, number: int, owner: str) -> bool:
        """Take up a trial that an earlier process of this sweep had. Return False if it has ended,
        or belongs to another process by now.
        """
        import optuna
        from optuna.trial import TrialState

        with _reaching(self.where):
            found = next(
                (one for one in self.study.get_trials(False) if one.number == number), None
            )
            if found is None or found.state != TrialState.RUNNING:
                return False
            if found.user_attrs.get("owner") != owner:
                return False
            own = optuna.trial.Trial(self.study, found._trial_id)
            self._mark(own)
        self.running[number] = own
        return True

    def others(self) -> Iterator[results.Result]:
        """Yield the trials that other processes have ended."""
        from optuna.trial import TrialState

        for one in self.study.get_trials(False):
            if one.state in (TrialState.COMPLETE, TrialState.PRUNED):
                done = one.state == TrialState.COMPLETE
                status = results.COMPLETE if done else results.STOPPED
                settings = self._settings_of(one)
                yield results.Result(one.number, settings, status, one.value if done else None)

    def _settings_of(self, one: Any) -> Settings:
        point = one.user_attrs.get("point")
        if self.points is not None:
            return dict(self.points[point]) if point is not None else {}
        found: Settings = {}
        for axis in self.space.axes:
            if isinstance(axis, Choices):
                found |= axis.entries[one.params[axis.name]]
            else:
                found[axis.field] = one.params[axis.field]
        return found

    def stops(self, trials: Sequence[Trial], step: int, values: Sequence[float]) -> list[bool]:
        """Report the losses of trials after a step. Return which of them Optuna prunes."""
        from optuna.exceptions import UpdateFinishedTrialError

        with _reaching(self.where):
            owns = [self.running[trial.number] for trial in trials]
            for own, value in zip(owns, values, strict=True):
                try:
                    own.report(value, step)
                except UpdateFinishedTrialError:
                    self._lost.add(own.number)
            return [own.number not in self._lost and own.should_prune() for own in owns]

    def tell(self, trial: Trial, status: str, value: float | None) -> None:
        """Store the end of a trial; one that diverged or was stopped is pruned."""
        from optuna.trial import TrialState

        own = self.running.pop(trial.number)
        with _reaching(self.where):
            if status == results.COMPLETE and value is not None:
                self.study.tell(own, value, skip_if_finished=True)
            else:
                self.study.tell(own, state=TrialState.PRUNED, skip_if_finished=True)
