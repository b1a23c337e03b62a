"""Results of a sweep: sweep.json, the table, best.yaml and the exported adapters."""

import dataclasses
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_jax import config as configs
from lora_jax.config import Config
from lora_jax.errors import counted
from lora_jax.report.journal import write_whole
from lora_jax.sweep.prepare import Member
from lora_jax.sweep.space import Trial
from lora_jax.train.export import export_peft
from lora_jax.train.facts import Facts

FOLDER = "adapters"  # the root that `lora-jax serve --adapter-root` takes
WAITING, RUNNING, COMPLETE = "waiting", "running", "complete"
STOPPED, DIVERGED = "stopped", "diverged"
_SHOWN = 40  # rows of the table
_DIGITS = 5


@dataclass
class Result:
    """A trial in sweep.json.

    status: waiting, running, complete, stopped (by halving or its patience) or diverged
    group: number of its program
    adapter: its directory below `adapters`, if it is exported
    """

    number: int
    settings: dict[str, Any]
    status: str = WAITING
    task_loss: float | None = None
    regression_loss: float | None = None
    train_loss: float | None = None
    steps: int = 0
    group: int | None = None
    adapter: str | None = None
    reason: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The loss that trials are compared by: of the task, else of training."""
        found = self.train_loss if self.task_loss is None else self.task_loss
        return math.inf if found is None or not math.isfinite(found) else found


def subject(config: Config) -> str:
    """Return what the losses of a trial are losses on; those of others do not compare."""
    return json.dumps([config.data.train, config.data.eval, config.train.objective])


def rank(results: Sequence[Result], subjects: Mapping[int, str]) -> list[Result]:
    """Return complete trials, the best of each subject first."""
    done = [one for one in results if one.status == COMPLETE and math.isfinite(one.loss)]
    found = sorted(done, key=lambda one: (one.loss, one.number))
    order = list(dict.fromkeys(subjects[one.number] for one in results))
    return sorted(found, key=lambda one: order.index(subjects[one.number]))


def winners(results: Sequence[Result], subjects: Mapping[int, str], best: int) -> list[Result]:
    """Return the `best` complete trials of each subject."""
    seen: Counter[str] = Counter()
    found = []
    for one in rank(results, subjects):
        if seen[subjects[one.number]] < best:
            found.append(one)
        seen[subjects[one.number]] += 1
    return found


@dataclass
class Book:
    """All results of a sweep, and the files that are made of them.

    best: adapters that are exported of each subject
    """

    output: Path
    base: Config
    best: int
    results: dict[int, Result] = field(default_factory=dict)
    subjects: dict[int, str] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)

    def add(self, trial: Trial) -> None:
        """Add a trial that waits."""
        self.results.setdefault(trial.number, Result(trial.number, dict(trial.settings)))
        self.subjects[trial.number] = subject(trial.config)

    @property
    def ordered(self) -> list[Result]:
        return [self.results[number] for number in sorted(self.results)]

    def write(self) -> None:
        """Write sweep.json."""
        content = {
            "trials": [_as_json(one) for one in self.ordered],
            "best": [one.number for one in winners(self.ordered, self.subjects, self.best)],
            "groups": self.groups,
        }
        write_whole(self.output / "sweep.json", json.dumps(content, indent=2) + "\n")

    def export(self, member: Member, adapters: Any) -> None:
        """Write the adapter of a complete trial if it is among the best of its subject, and remove
        those that no longer are.
        """
        chosen = winners(self.ordered, self.subjects, self.best)
        own = self.results[member.number]
        if own in chosen:
            own.adapter = self.name_of(member)
            target = self.output / FOLDER / own.adapter
            shutil.rmtree(target, ignore_errors=True)
            session = member.session
            facts = Facts(session.stops)
            export_peft(target, session, adapters, session.fingerprint, facts)
        for one in self.ordered:
            if one.adapter is not None and one not in chosen:
                shutil.rmtree(self.output / FOLDER / one.adapter, ignore_errors=True)
                one.adapter = None

    def name_of(self, member: Member) -> str:
        """Return the name of a trial's adapter: `trial-7`, or after its data where trials differ in
        these, `acme` or with more than one of each `acme-7`.
        """
        if len(set(self.subjects.values())) == 1:
            return f"trial-{member.number}"
        train = member.trial.config.data.train
        stem = Path(train).stem if isinstance(train, str) else "mixture"
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-")[:100] or "data"
        mine, others = self.subjects[member.number], 0
        for one in self.results.values():
            source = one.settings.get("data.train", "")
            same = isinstance(source, str) and Path(source).stem == Path(str(train)).stem
            others += same and self.subjects[one.number] != mine
        return f"{stem}-{member.number}" if self.best > 1 or others else stem

    def finish(self, console: Console, configs_of: Mapping[int, Config]) -> None:
        """Write best.yaml and print the table."""
        self.write()
        found = rank(self.ordered, self.subjects)
        print_table(console, [*found, *(one for one in self.ordered if one not in found)])
        console.print(f"as one page: lora-jax report {self.output}")
        if not found:
            console.print("no trial is complete: there is no best.yaml")
            return
        best = min(found, key=lambda one: (one.loss, one.number))
        config = configs_of[best.number]
        config = dataclasses.replace(
            config, output_dir=f"{self.base.output_dir}/best", resume=False
        )
        head = f"# Trial {best.number} of {self.base.output_dir}, loss {best.loss:.{_DIGITS}g}\n"
        write_whole(self.output / "best.yaml", head + configs.dump(config))
        names = [one.adapter for one in found if one.adapter is not None]
        console.print(
            f"best: trial {best.number}, loss {best.loss:.{_DIGITS}g}; "
            f"python train.py --config {self.output / 'best.yaml'}"
        )
        if names:
            console.print(
                f"{counted(len(names), 'adapter')} in {self.output / FOLDER}: "
                f"lora-jax serve --model {self.base.model} --adapter-root {self.output / FOLDER}"
            )


def read_result(content: Mapping[str, Any]) -> Result:
    """Return a trial of sweep.json."""
    names = {field.name for field in dataclasses.fields(Result)}
    own = {name: value for name, value in content.items() if name in names}
    return Result(**own, metrics={n: x for n, x in content.items() if n not in names})


def _as_json(result: Result) -> dict[str, Any]:
    found = dataclasses.asdict(result)
    metrics = found.pop("metrics")
    numbers = {name: value for name, value in metrics.items() if name not in found}
    return {name: _finite(value) for name, value in (found | numbers).items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(console: Console, results: Sequence[Result]) -> None:
    """Print the settings and losses of trials, in their order."""
    fields = list(dict.fromkeys(name for one in results for name in one.settings))
    has_regression = any(one.regression_loss is not None for one in results)
    table = Table(title="trials")
    losses = ["task_loss", *(["regression_loss"] if has_regression else []), "train_loss"]
    for column in ("trial", *fields, "status", *losses):
        table.add_column(column, justify="left" if column == "status" else "right")
    for one in results[:_SHOWN]:
        values = (_cell(one.settings.get(name)) for name in fields)
        cells = (_cell(getattr(one, name)) for name in losses)
        table.add_row(str(one.number), *values, one.status, *cells)
    console.print(table)
    if len(results) > _SHOWN:
        console.print(f"{len(results) - _SHOWN} more trials are in sweep.json")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else str(value)
