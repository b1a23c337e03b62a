"""The optimizer steps of a run, with their logs, evaluations and checkpoints."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from lora_jax import data, sharding
from lora_jax.config import Config
from lora_jax.errors import UserError
from lora_jax.models.common import Model
from lora_jax.objectives import Objective
from lora_jax.report.journal import Journal, append_line, append_samples
from lora_jax.report.scores import spread
from lora_jax.report.trackers import Sink
from lora_jax.report.usage import Clock, device_memory
from lora_jax.report.window import Window
from lora_jax.sharding import local_rows, place_batch
from lora_jax.train import checkpoint, forecast, norms, predictions
from lora_jax.train.evaluate import Judge, Scores
from lora_jax.train.interrupt import Interrupted, Signals
from lora_jax.train.optimizer import make_schedule
from lora_jax.train.outputs import Run
from lora_jax.train.step import make_train_step
from lora_jax.train.watch import Watch

Line = dict[str, Any]  # of metrics.jsonl


@dataclass
class State:
    """What training changes, and a checkpoint holds."""

    adapters: Any
    opt_state: Any
    step: int = 0  # optimizer steps done
    supervised_tokens: float = 0.0  # trained on so far
    watch: Watch = field(default_factory=Watch)
    scores: Scores | None = None  # of this step, with answers, if they were measured; not saved
    window: Window = field(default_factory=Window)  # steps since the last line


def place_state(
    config: Config, model: Model, mesh: Mesh, optimizer: Any, adapters: Mapping
) -> State:
    """Adapters beside their base's shards, and the optimizer's state beside them, in host memory if
    `train.optimizer_memory` says so.
    """
    specs = sharding.adapter_specs(adapters, model.params, model.rules, mesh)
    adapters = sharding.place(adapters, specs, mesh)
    with jax.set_mesh(mesh):
        opt_state = sharding.replicate_scalars(optimizer.init(adapters), mesh)
    if config.train.optimizer_memory == "host":
        opt_state = jax.tree.map(sharding.to_host, opt_state)
    return State(adapters, opt_state)


def train(
    run: Run,
    judge: Judge,
    state: State,
    loader: data.Loader | data.Mixture | data.StreamLoader,
    optimizer: Any,
    key: jax.Array,
    about: Mapping[str, Any],
    console: Console,
    signals: Signals,
    record: Mapping[str, Any] | None,
    sinks: Sequence[Sink] = (),
    seconds: Callable[[], float] = lambda: 0.0,
    objective: Objective | None = None,
) -> float:
    """All steps from `state.step` on; `state` is changed in place. Returns tokens per second.

    `about` joins every checkpoint's record, and so do the `seconds` that the run has taken;
    `record` is that of the checkpoint `state` came from. A signal ends it between steps, and inside
    an evaluation, with a checkpoint of that step.

    Raises:
        UserError: a loss that diverges; files that cannot be written.
        Interrupted: a signal came.
    """
    config, output = judge.config, run.output
    settings = config.train
    placement = jax.tree.map(lambda leaf: leaf.sharding, (state.adapters, state.opt_state))
    clock = Clock()
    with (
        signals.held(),
        checkpoint.open_checkpoints(
            run.place, settings.save_total_limit, run.check, run.committed
        ) as kept,
        Journal(
            output / "metrics.jsonl",
            settings.total_steps,
            judge.display,
            sinks,
            state.step,
            lambda step: forecast.seconds_left(judge, clock, step),
        ) as journal,
    ):
        trainer = _Trainer(
            judge=judge,
            state=state,
            loader=loader,
            step_fn=make_train_step(judge.model, config, optimizer, placement, objective),
            schedule=make_schedule(settings),
            key=key,
            about=about,
            output=output,
            console=console,
            signals=signals,
            kept=kept,
            journal=journal,
            clock=clock,
            seconds=seconds,
        )
        over = False
        if record is not None:
            over = trainer.finish_step(record["pending"]) if record["pending"] else trainer.over
        while not over:
            over = trainer.finish_step(trainer.take_step())
        with judge.display.phase("writing the checkpoint"):
            kept.wait()
    signals.check()  # one that came during the last save
    if state.step < settings.total_steps:
        console.print(
            f"stopped early at step {state.step}: {state.watch.stale} evaluations without a better "
            f"{settings.metric_for_best_model.replace('_', ' ')} than that of step "
            f"{state.watch.best_step}"
        )
    return trainer.clock.tokens_per_second


def _is_due(step: int, every: int | None) -> bool:
    """Whether something that happens at every so many steps happens at this one."""
    return every is not None and step % every == 0


@dataclass
class _Trainer:
    judge: Judge
    state: State
    loader: data.Loader | data.Mixture | data.StreamLoader
    step_fn: Callable
    schedule: Callable
    key: jax.Array
    about: Mapping[str, Any]
    output: Path
    console: Console
    signals: Signals
    kept: checkpoint.Checkpoints
    journal: Journal
    clock: Clock
    seconds: Callable[[], float]
    compiled: bool = False

    @property
    def over(self) -> bool:
        """Whether no step is left to take."""
        settings = self.judge.config.train
        return self.state.step >= settings.total_steps or self.state.watch.gave_up(settings)

    def take_step(self) -> Line:
        """Take one optimizer step. Returns the line for the steps since the last line."""
        state, mesh = self.state, self.judge.mesh
        rows = self.judge.config.train.batch_size
        batch = self.loader.batch(state.step, local_rows(rows, mesh))
        with self._compiling():
            state.adapters, state.opt_state, measured = self.step_fn(
                state.adapters,
                state.opt_state,
                self.judge.model.params,
                place_batch(batch, mesh, rows),
                jax.random.fold_in(self.key, state.step + 1),
            )
        measured = {name: float(value) for name, value in measured.items()}
        state.scores = None
        problem = state.watch.problem(
            state.step + 1,
            measured["loss"],
            measured["grad_norm"],
            self.judge.config.train.divergence,
        )
        if problem is not None:
            # A loss that is not finite puts the state it came from in doubt; one that climbs, all
            # states since it was lowest.
            finite = math.isfinite(measured["loss"]) and math.isfinite(measured["grad_norm"])
            sound = state.watch.lowest_step if finite else state.step - 1
            raise UserError(f"{problem}. {self._keep_good(sound or 0)}")
        rate = float(self.schedule(state.step))
        state.step += 1
        state.supervised_tokens += measured["supervised_tokens"]
        state.window.add(measured)
        # Of several hosts each has seen its own rows only.
        share = rows / len(batch["segment_ids"])
        self.clock.lap(round(share * np.count_nonzero(batch["segment_ids"])))
        self.journal.show(state.step, measured["loss"], rate, self.clock)
        speed = self.clock.tokens_per_second
        return {
            "step": state.step,
            **state.window.describe(),
            "learning_rate": rate,
            "tokens_per_second": speed,
            **device_memory(),
        }

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """The first call compiles the step; later ones return at once."""
        if self.compiled:
            yield
            return
        with self.judge.display.phase("compiling the train step"):
            yield
        self.compiled = True

    def finish_step(self, line: Line) -> bool:
        """Evaluate, log and save what is due after the step of `line`; whether it was the last."""
        state, settings = self.state, self.judge.config.train
        line, better = dict(line), False
        try:
            self.signals.check()
            last = state.step == settings.total_steps
            if self.judge.held_out and (last or _is_due(state.step, settings.eval_every)):
                with self.signals.free(), self.clock.paused():
                    measured = self._evaluate()
                line |= self._evaluated(measured)
                values = {**measured.losses, **measured.metrics}
                better = state.watch.evaluated(state.step, values, settings.metric_for_best_model)
        except Interrupted as stop:
            self._save(pending=line)
            self.kept.wait()
            self.console.print(f"{stop}: step {state.step} is saved; resume=true goes on from it")
            raise
        evaluated = any(f"{name}_loss" in line for name in self.judge.held_out)
        if evaluated or self.over or _is_due(state.step, settings.log_every):
            self.journal.write(line)
            state.window = Window()
        every = settings.save_every or max(1, settings.total_steps // 10)
        if better or self.over or _is_due(state.step, every):
            with self.clock.paused():
                self._save(pending=None)
        return self.over

    def _evaluate(self) -> Scores:
        """Held-out losses; at every eval.generate_every steps and after the last one all answers
        with their metrics, and at other evaluations sample answers, which go to a file of their
        own. Without eval.generate_every, the answers after the last step are left to the caller.
        """
        judge, state, settings = self.judge, self.state, self.judge.config.eval
        every, check = settings.generate_every, self.signals.check
        last = state.step == judge.config.train.total_steps
        with judge.display.about(f"step {state.step}"):
            losses = judge.losses(state.adapters, check)
            if every is not None and (last or _is_due(state.step, every)):
                answers = judge.answers(state.adapters, settings.generate_examples, check)
                state.scores = judge.with_metrics(losses, answers)
                return state.scores
            if settings.samples and not self.over:
                answers = judge.answers(state.adapters, settings.samples, check)
                append_samples(self.output / "samples.jsonl", state.step, answers)
        return Scores(losses, {})

    def _evaluated(self, measured: Scores) -> Line:
        """Held-out losses, metrics and mean norms for the step's line; answers, and the norms of
        every layer, go to files of their own.
        """
        judge, state, config = self.judge, self.state, self.judge.config
        self.console.print(f"step {state.step}: {measured.describe()}")
        if measured.answers:
            file, names = self.output / "predictions.jsonl", config.eval.metrics
            predictions.put(file, state.step, measured.answers, names)
            if not self.over:  # those of the last step are shown at the end
                samples = spread(measured.answers, config.eval.samples)
                append_samples(self.output / "samples.jsonl", state.step, samples)
        sizes = norms.measure(judge.model.params, state.adapters, config.adapter)
        append_line(self.output / "norms.jsonl", {"step": state.step, "modules": sizes})
        return measured.numbers() | norms.summarize(sizes)

    def _save(self, pending: Line | None) -> None:
        """Start a checkpoint of the state; `pending` is a line whose evaluation is still due."""
        state = self.state
        record = {
            **self.about,
            "supervised_tokens": state.supervised_tokens,
            "seconds": self.seconds(),
            "watch": dataclasses.asdict(state.watch),
            "window": dataclasses.asdict(state.window),
            "data": self.loader.position(state.step),
            "pending": pending,
        }
        best, sound = state.watch.best_step, state.watch.lowest_step
        self.kept.save(state.step, state.adapters, state.opt_state, record, best, sound)

    def _keep_good(self, sound: int) -> str:
        """Remove checkpoints after step `sound`, if there is an earlier one, and say what is left.
        The one of the best task loss stays in any case.
        """
        self.kept.wait()
        best, steps = self.state.watch.best_step, self.kept.steps
        good = [step for step in steps if step <= sound or step == best]
        if good:
            for step in set(steps) - set(good):
                self.kept.delete(step)
        steps = self.kept.steps
        if not steps:
            return "No checkpoint had been written yet"
        if not good:
            return f"What is kept led here: start again (checkpoints: {steps})"
        return f"The last good state is the checkpoint of step {good[-1]} (kept: {steps})"
