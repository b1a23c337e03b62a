"""The rounds of a sweep: one step of every member, and what ends a member or fills its place."""

import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_jax.report import journal
from lora_jax.sweep import results
from lora_jax.sweep.places import Place, Places
from lora_jax.sweep.results import Result
from lora_jax.sweep.schedule import Rungs
from lora_jax.train import checkpoint
from lora_jax.train.interrupt import Interrupted, Signals

METRICS = "metrics.jsonl"


@dataclass
class Training:
    """Trains the members of all groups.

    rounds: steps that were taken, each by all members of a group; checkpoints are named by it
    """

    run: Any
    sweep: Any
    kept: checkpoint.Checkpoints
    signals: Signals
    rungs: Rungs
    rounds: int = 0
    _ended: list[int] = field(default_factory=list)  # whose end the source does not know yet

    @property
    def book(self) -> results.Book:
        return self.sweep.book

    def run_group(self, places: Places) -> None:
        """Train the members of a group until none is left, with its checkpoints."""
        queue, changed = self.sweep.queues.setdefault(places.group.number, []), True
        with self.sweep.display.phase(f"program {places.group.number}: round") as phase:
            while True:
                if changed:
                    self._fill(places, queue)
                    phase.total = phase.done + _rounds_left(places, queue)
                if not places.active:
                    break
                changed = self._round(places)
                phase.advance()
        self.book.groups[places.group.number]["programs"] = places.programs
        self.book.write()

    def _fill(self, places: Places, queue: list) -> None:
        """Give free places to waiting trials; ask for more if none wait."""
        if len(queue) < len(places.free):
            self.sweep.request(len(places.free) - len(queue))
        members = [queue.pop(0) for _ in places.free[: len(queue)]]
        if not members:
            return
        name = f"program {places.group.number}: starting"
        with self.sweep.display.phase(name, len(members), "trials") as phase:
            for k, member in zip(places.free, members, strict=False):
                places.enter(k, member)
                self.book.results[member.number].status = results.RUNNING
                phase.advance()
        self.book.write()

    def _round(self, places: Places) -> bool:
        """Take one step, and do what is due after it. Return True if a member ended."""
        if self._drop_lost(places):
            return True
        measured = places.step()
        self.rounds += 1
        ended: set[int] = set()
        for k, place in places.active:
            if self._check(place, measured[k]):
                self._end(places, k, results.DIVERGED)
                ended.add(k)
        self._evaluate_due(places, ended)
        self._halve(places, ended)
        for k, place in places.active:
            if k not in ended and place.step >= place.member.steps:
                self._complete(places, k)
                ended.add(k)
        if ended:
            self.book.write()
        if ended or self._is_due(places):
            self._save(places)
        self._tell()
        try:
            self.signals.check()
        except Interrupted as stop:
            self._save(places)
            self.kept.wait()
            console = self.sweep.display.console
            console.print(f"{stop}: round {self.rounds} is saved; resume=true goes on from it")
            raise
        return bool(ended)

    def _drop_lost(self, places: Places) -> bool:
        """Free the places of trials that others have taken over. Return True if there are any."""
        lost = self.sweep.source.lost()
        for number in lost:
            self.sweep.display.console.print(
                f"trial {number}: another process has it now, as this one did not answer for long"
            )
            del self.book.results[number]
        for queue in self.sweep.queues.values():
            queue[:] = [member for member in queue if member.number not in lost]
        for k, place in places.active:
            if place.member.number in lost:
                places.leave(k)
        return bool(lost)

    def _is_due(self, places: Places) -> bool:
        settings = self.sweep.config.train
        steps = max((place.member.steps for _, place in places.active), default=1)
        return self.rounds % (settings.save_every or max(1, steps // 10)) == 0

    def _check(self, place: Place, measured: Mapping[str, float]) -> bool:
        """Record the step of a member. Return True if it diverges."""
        own, settings = self.book.results[place.member.number], place.member.config.train
        place.loss = measured["loss"]
        problem = place.monitor.problem(
            place.step, measured["loss"], measured["grad_norm"], settings.divergence
        )
        own.steps = place.step
        own.train_loss = _mean(place)
        if place.step % settings.log_every == 0 or place.step == place.member.steps or problem:
            line = {"trial": place.member.number, "step": place.step, "round": self.rounds}
            line |= {**measured, "learning_rate": float(place.rates[place.step - 1])}
            journal.append_line(self.run.output / METRICS, line)
        if problem is not None:
            own.reason = problem
            self.sweep.display.console.print(f"trial {place.member.number}: {problem}")
        return problem is not None

    def _measure(self, places: Places, k: int) -> dict[str, float]:
        """Evaluate a place, and record its losses."""
        place = places.taken[k]
        assert place is not None
        own = self.book.results[place.member.number]
        found = places.evaluate(k)
        own.task_loss = found.get("task_loss")
        own.regression_loss = found.get("regression_loss")
        own.metrics = {n: x for n, x in found.items() if not hasattr(own, n)}
        if found:
            line = {"trial": place.member.number, "step": place.step, "round": self.rounds}
            journal.append_line(self.run.output / METRICS, line | found)
        return found

    def _evaluate_due(self, places: Places, ended: set[int]) -> None:
        """Evaluate members whose `train.eval_every` is due; their patience may end them."""
        for k, place in places.active:
            settings = place.member.config.train
            every = settings.eval_every
            last = place.step >= place.member.steps
            if k in ended or every is None or last or place.step % every:
                continue
            found = self._measure(places, k)
            place.monitor.evaluated(place.step, found, settings.metric_for_best_model)
            if place.monitor.gave_up(settings):
                reason = f"{place.monitor.stale} evaluations without a better one"
                self._end(places, k, results.STOPPED, reason)
                ended.add(k)

    def _halve(self, places: Places, ended: set[int]) -> None:
        """Stop the worse of the members that reach a rung."""
        due: dict[tuple[int, str], list[int]] = {}
        for k, place in places.active:
            if k not in ended and self.rungs.is_due(place.step, place.member.steps):
                subject = self.book.subjects[place.member.number]
                due.setdefault((place.step, subject), []).append(k)
        for (step, subject), those in due.items():
            for k in those:
                self._measure(places, k)
            losses = [self._result(places, k).loss for k in those]
            trials = [place.member.trial for k, place in places.active if k in those]
            stops = self.sweep.source.stops(trials, step, losses)
            if stops is None:
                stops = self.rungs.add(step, subject, losses)
            for k, loss, stop in zip(those, losses, stops, strict=True):
                if stop:
                    reason = f"loss {loss:.4g} is not among the best of step {step}"
                    self._end(places, k, results.STOPPED, reason)
                    ended.add(k)

    def _result(self, places: Places, k: int) -> Result:
        place = places.taken[k]
        assert place is not None
        return self.book.results[place.member.number]

    def _complete(self, places: Places, k: int) -> None:
        """Measure and export a member that has taken all its steps."""
        place = places.taken[k]
        assert place is not None
        self._measure(places, k)
        own = self._result(places, k)
        own.status = results.COMPLETE
        self.book.export(place.member, places.adapters_of(k))
        shown = "no loss" if math.isinf(own.loss) else f"loss {own.loss:.4f}"
        self.sweep.display.console.print(f"trial {own.number}: complete, {shown}")
        self._ended.append(own.number)
        places.leave(k)

    def _end(self, places: Places, k: int, status: str, reason: str | None = None) -> None:
        """Free the place of a member that does not complete."""
        own = self._result(places, k)
        own.status, own.reason = status, reason or own.reason
        if status == results.STOPPED:
            self.sweep.display.console.print(f"trial {own.number}: stopped, {own.reason}")
        self._ended.append(own.number)
        places.leave(k)

    def _tell(self) -> None:
        """Tell the source of the trials that ended, once they are saved."""
        if not self._ended:
            return
        self.kept.wait()
        for number in self._ended:
            own, trial = self.book.results[number], self.sweep.members[number].trial
            self.sweep.source.tell(trial, own.status, own.loss if math.isfinite(own.loss) else None)
        self._ended.clear()

    def _save(self, places: Places) -> None:
        """Start a checkpoint of the places and of everything else that a resumed sweep needs."""
        record = {
            "run": self.run.id,
            "sweep": self.sweep.key,
            "owner": getattr(self.sweep.source, "owner", None),
            "group": places.group.number,
            "places": [None if one is None else one.record() for one in places.taken],
            "queues": {str(n): [m.number for m in q] for n, q in self.sweep.queues.items()},
            "results": [dataclasses.asdict(one) for one in self.book.ordered],
            "groups": self.book.groups,
            "rungs": self.rungs.values,
        }
        self.kept.save(self.rounds, places.adapters, places.opt_state, record)

    def restore(self, record: Mapping[str, Any], places: Places) -> Places:
        """Take up the state of a checkpoint. Return its places with their members.

        Raises:
            UserError: a damaged checkpoint.
        """
        sweep, self.rounds = self.sweep, record["step"]
        for one in record["results"]:
            sweep.take_up(Result(**one))
        kept = sweep.keep_running(record)
        self.book.groups[:] = record["groups"]
        self.rungs.values = dict(record["rungs"])
        for number, waiting in record["queues"].items():
            sweep.queues[int(number)] = [sweep.members[n] for n in waiting if n in kept]
        records = [one if one and one["trial"] in kept else None for one in record["places"]]
        places.adapters, places.opt_state, _ = checkpoint.restore(
            self.run.place, places.adapters, places.opt_state, record["step"]
        )
        places.restore(records, sweep.members)
        file = self.run.output / METRICS
        lines = [line for line in journal.read_lines(file) if line["round"] <= self.rounds]
        journal.write_whole(file, journal.to_text(lines))
        self.book.write()
        sweep.display.console.print(f"resumed from round {self.rounds}")
        return places


def _rounds_left(places: Places, queue: Sequence) -> int:
    """Return the rounds until all trials that are known have taken their steps. A waiting one takes
    the place that is free first.
    """
    left = sorted(place.member.steps - place.step for _, place in places.active)
    for member in queue:
        heapq.heapreplace(left, left[0] + member.steps)
    return max(left, default=0)


def _mean(place: Place) -> float | None:
    """Return the mean loss of the last steps."""
    recent = place.monitor.recent
    return sum(recent) / len(recent) if recent else place.loss
