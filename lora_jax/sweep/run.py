"""A sweep from top to bottom: trials, base, groups, steps, results."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_jax import config as configs
from lora_jax import sharding
from lora_jax.config import Config
from lora_jax.errors import UserError, counted
from lora_jax.models.common import Model
from lora_jax.report import journal
from lora_jax.report.console import make_console, print_notes
from lora_jax.report.progress import Display
from lora_jax.sweep import groups as grouping
from lora_jax.sweep import prepare, results
from lora_jax.sweep.fit import choose_count
from lora_jax.sweep.groups import Group
from lora_jax.sweep.places import Places
from lora_jax.sweep.prepare import Member, Preparer
from lora_jax.sweep.results import Book, Result
from lora_jax.sweep.schedule import Listed, Rungs, list_trials
from lora_jax.sweep.space import Space, Trial, make_trial
from lora_jax.sweep.training import Training
from lora_jax.train import base, checkpoint, directory, interrupt, setup

_ALL = 10**9  # trials
_PAUSE = 1.0  # seconds between looks at the trials of other processes


@dataclass(frozen=True)
class SweepOptions:
    """Options of `lora-jax sweep`.

    members: trials that train at once; None: as many as fit
    best: adapters that are exported, of each data set that trials train on
    storage: database of Optuna that several processes share
    """

    members: int | None = None
    best: int = 1
    storage: str | None = None


def run_sweep(
    config: Config, space: Space, options: SweepOptions = SweepOptions(), console: Any = None
) -> Book:
    """Train the trials of a space, and write results and adapters to `config.output_dir`.

    Raises:
        UserError: a mistake in config, space, model or data; a group that does not fit; a storage
            that cannot be reached.
        Interrupted: a signal came; a checkpoint holds what was done.
    """
    prepare.check_here()
    console = console or make_console()
    with interrupt.catch(None, console.print) as signals, contextlib.ExitStack() as held:
        mesh = sharding.make_mesh(config.mesh)
        setup.check_settings(config, mesh)
        run, record = directory.open_run(config, held)
        sweep = _Sweep(config, space, options, Display(console), mesh)
        sweep.source = _make_source(config, space, options, sweep.key)
        if record is not None:
            sweep.check_same(record)
            if sweep.finish_again(run.output):
                return sweep.book
        with signals.held(), sweep.source.held():
            sweep.train(run, record, signals)
        return sweep.book


def _make_source(config: Config, space: Space, options: SweepOptions, key: str) -> Any:
    """Return the source of trials; that of Optuna needs its package."""
    if space.sampler != "tpe" and options.storage is None:
        return Listed(list_trials(space, config))
    from lora_jax.sweep.study import open_study  # the extra `sweep`

    return open_study(config, space, options.storage, key)


@dataclass
class _Sweep:
    """A sweep in progress."""

    config: Config
    space: Space
    options: SweepOptions
    display: Display
    mesh: Any
    source: Any = None
    members: dict[int, Member] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    queues: dict[int, list[Member]] = field(default_factory=dict)

    @cached_property
    def preparer(self) -> Preparer:
        return Preparer(self.mesh, self.display)

    @cached_property
    def book(self) -> Book:
        output = configs.expand(self.config.output_dir, "output_dir")
        return Book(output, self.config, self.options.best)

    @cached_property
    def key(self) -> str:
        """Digest of everything that decides what the trials compute."""
        resumable = [name for name, rule in configs.options_of(Config).items() if rule.resumable]
        settings = dataclasses.asdict(self.config)
        for name in resumable:
            *sections, last = name.split(".")
            place = settings
            for section in sections:
                place = place[section]
            place.pop(last)
        axes = [repr(one) for one in (*self.space.axes, self.space.sampler, self.space.halving)]
        content = [settings, axes, self.space.trials]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def check_same(self, record: Mapping[str, Any]) -> None:
        """Raise if a checkpoint is that of another sweep.

        Raises:
            UserError: config or space differ from those of the checkpoint, or it is of a run.
        """
        if record.get("sweep") != self.key:
            what = "a run" if "sweep" not in record else "another config or space"
            raise UserError(
                f"output_dir={self.config.output_dir!r} has checkpoints of {what}; choose another "
                "output_dir, or give the config and space that it began with"
            )

    def finish_again(self, output: Path) -> bool:
        """Repeat the end of a sweep whose sweep.json has the end of every trial. Return False if it
        does not.
        """
        file = output / "sweep.json"
        found = configs.read_json(file) if file.is_file() else {}
        known = [results.read_result(one) for one in found.get("trials", [])]
        statuses = {one.status for one in known}
        if not known or statuses & {results.WAITING, results.RUNNING}:
            return False
        if not isinstance(self.source, Listed):
            return False
        self.book.groups = found["groups"]
        self.display.console.print(f"{output}: all trials are done")
        self._finish({one.number: one for one in known})
        return True

    def train(self, run: Any, record: Mapping[str, Any] | None, signals: Any) -> None:
        """Train all trials, and write the results."""
        listed = isinstance(self.source, Listed)
        trials = self.source.ask(_ALL) if listed else self.source.skeleton()
        with self.display.phase("reading the trials", len(trials), "trials") as phase:
            prepared = [self._prepare(trial, listed=listed) for trial in phase.over(trials)]
        if unused := prepare.find_unused(self.config):
            self.display.console.print(
                f"a sweep exports PEFT adapters; {', '.join(unused)} is for the run of best.yaml"
            )
        self._make_groups(prepared, waits=listed)
        model = self._load(prepared[0])
        run.begin()
        if record is None:
            run.clear_logs()
        journal.write_whole(run.output / "config.yaml", configs.dump(self.config))
        limit, place = self.config.train.save_total_limit, run.place
        with checkpoint.open_checkpoints(place, limit, run.check, run.committed) as kept:
            training = Training(
                run=run,
                sweep=self,
                kept=kept,
                signals=signals,
                rungs=Rungs(self.space.halving),
            )
            current = None
            if record is not None:
                current = training.restore(record, self._open_places(model, record))
            while (places := current or self._next_places(model)) is not None:
                current = None
                training.run_group(places)
            kept.wait()
        others = () if listed else self.source.others()
        self._finish({one.number: one for one in others} | self.book.results)

    def _finish(self, found: Mapping[int, Result]) -> None:
        """Write the results of all trials, those of other processes among them."""
        configs_of = {}
        for number, one in found.items():
            trial = make_trial(self.config, number, one.settings)
            self.book.add(trial)
            self.book.results[number], configs_of[number] = one, trial.config
        self.book.finish(self.display.console, configs_of)

    def _prepare(self, trial: Trial, listed: bool = True) -> Member:
        member = self.preparer.prepare(trial)
        if listed:
            self.members[trial.number] = member
            self.book.add(trial)
        return member

    def _make_groups(self, members: Iterable[Member], waits: bool) -> None:
        self.groups = grouping.make_groups(members, self.space.fields)
        for group in self.groups:
            self.queues[group.number] = list(group.members) if waits else []
            for member in group.members if waits else ():
                self.book.results[member.number].group = group.number
        console = self.display.console
        if len(self.groups) > 1:
            why = grouping.reasons(self.groups)
            console.print(f"{len(self.groups)} programs, as trials differ in {why}:")
        for group in self.groups if waits else ():
            console.print(f"program {group.number}: {group.describe()}")

    def _load(self, member: Member) -> Model:
        """Return the model with its weights, which all trials share."""
        session = member.session
        print_notes(self.display.console, session.model.notes)
        with self.display.phase("checking the model's files"):
            setup.check_fingerprint(session, None)
        self.display.console.print(f"loading {self.config.model}")
        dtype = self.config.base_dtype
        params = base.read_params(session.source, session.model, self.mesh, dtype, self.display)
        return session.model.replace(params=params)

    def request(self, most: int) -> None:
        """Ask the source for trials, and queue them by group."""
        for trial in self.source.ask(most):
            self.enqueue(trial)

    def enqueue(self, trial: Trial) -> None:
        """Put a trial that was asked for into the queue of its group."""
        member = self._prepare(trial)
        key = grouping.group_key(member)
        found = next((g for g in self.groups if grouping.group_key(g.members[0]) == key), None)
        if found is None:
            found = grouping.make_group(len(self.groups), [member], self.space.fields)
            self.groups.append(found)
        self.book.results[trial.number].group = found.number
        self.queues.setdefault(found.number, []).append(member)

    def take_up(self, result: Result) -> None:
        """Take up a trial of a checkpoint with its result."""
        number = result.number
        if number not in self.members and result.status in (results.RUNNING, results.WAITING):
            self._prepare(make_trial(self.config, number, result.settings))
        elif number not in self.members:
            self.book.add(make_trial(self.config, number, result.settings))
        self.book.results[number] = result

    def keep_running(self, record: Mapping[str, Any]) -> set[int]:
        """Return the trials of a checkpoint that had not ended and are still this sweep's; forget
        those that others have taken over. Tell the source of trials that ended without its notice.
        """
        unfinished = (results.RUNNING, results.WAITING)
        open_trials = {n for n, one in self.book.results.items() if one.status in unfinished}
        if isinstance(self.source, Listed):
            return open_trials
        kept = set()
        for one in self.book.ordered:
            mine = self.source.adopt(one.number, record["owner"])
            if mine and one.number in open_trials:
                kept.add(one.number)
            elif mine:
                trial = make_trial(self.config, one.number, one.settings)
                self.source.tell(trial, one.status, one.loss)
            elif one.number in open_trials:
                del self.book.results[one.number]
        return kept

    def _next_places(self, model: Model) -> Places | None:
        """Return the places of the next group with trials; None at the end."""
        while not any(self.queues.values()):
            self.request(self.options.members or 1)
            if any(self.queues.values()) or not self.source.waits():
                break
            time.sleep(_PAUSE)
        waiting = next((g for g in self.groups if self.queues.get(g.number)), None)
        return None if waiting is None else self._places(model, waiting, None)

    def _open_places(self, model: Model, record: Mapping[str, Any]) -> Places:
        """Return the empty places that a checkpoint was saved from."""
        return self._places(model, self.groups[record["group"]], len(record["places"]))

    def _places(self, model: Model, group: Group, count: int | None) -> Places:
        known = self._opened.get(group.number)
        if known is not None:
            return known
        most = max(1, len(self.queues[group.number]))
        if not isinstance(self.source, Listed):
            most = max(most, self.source.wanted)
        count = count or choose_count(group, self.mesh, self.options.members, most)
        session = group.members[0].session
        digest = session.fingerprint["base"]
        self.display.console.print(
            f"program {group.number}: {counted(count, 'place')}, {group.joint.parameters:,} "
            "parameters each"
        )
        places = Places(group, model, self.mesh, count, digest, self.display)
        while len(self.book.groups) <= group.number:
            self.book.groups.append({"number": len(self.book.groups)})
        self.book.groups[group.number] |= {
            "members": count,
            "parameters": group.joint.parameters,
        }
        if not isinstance(self.source, Listed):
            self._opened[group.number] = places
        return places

    @cached_property
    def _opened(self) -> dict[int, Places]:
        """Places of groups that may get more trials."""
        return {}
