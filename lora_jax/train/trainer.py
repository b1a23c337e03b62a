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
from lora_jax.report.trackers import Tracker
from lora_jax.report.usage import Clock, device_memory
from lora_jax.report.window import Window
from lora_jax.sharding import local_rows, place_batch
from lora_jax.train import checkpoint, forecast, norms, predictions
from lora_jax.train.evaluate import Evaluator
from lora_jax.train.interrupt import Interrupted, Signals
from lora_jax.train.monitor import LossMonitor
from lora_jax.train.optimizer import make_schedule
from lora_jax.train.outputs import Run
from lora_jax.train.scored import Scores
from lora_jax.train.step import make_train_step

Line = dict[str, Any]  # of metrics.jsonl
_NOTHING = 1e-6  # a loss that counts as 0


@dataclass
class State:
    """State of training, updated by steps and stored in checkpoints."""

    adapters: Any
    opt_state: Any
    step: int = 0  # optimizer steps done
    supervised_tokens: float = 0.0  # trained on so far
    monitor: LossMonitor = field(default_factory=LossMonitor)
    scores: Scores | None = None  # of this step, with answers, if measured; not in checkpoints
    window: Window = field(default_factory=Window)  # steps since the last line


def place_state(
    config: Config, model: Model, mesh: Mesh, optimizer: Any, adapters: Mapping
) -> State:
    """Return the state of the first step: adapters sharded as their base, and the optimizer's
    state sharded as they are, or in host memory with `train.optimizer_memory=host`.
    """
    specs = sharding.adapter_specs(adapters, model.params, model.rules, mesh)
    adapters = sharding.place(adapters, specs, mesh)
    with jax.set_mesh(mesh):
        opt_state = sharding.replicate_scalars(optimizer.init(adapters), mesh)
    if config.train.optimizer_memory == "host":
        opt_state = jax.tree.map(sharding.to_host, opt_state)
    return State(adapters, opt_state)


@dataclass(frozen=True)
class Training:
    """Everything that the steps of a run need besides their state.

    metadata: part of a checkpoint's record that is the same at every step
    seconds: time that the run has taken, in earlier sessions too
    objective: minimised in place of the config's
    """

    run: Run
    evaluator: Evaluator
    loader: data.Loader | data.Mixture | data.StreamLoader
    optimizer: Any
    key: jax.Array
    metadata: Mapping[str, Any]
    signals: Signals
    trackers: Sequence[Tracker] = ()
    seconds: Callable[[], float] = lambda: 0.0
    objective: Objective | None = None


def train(training: Training, state: State, pending: Line | None = None) -> float:
    """Take all steps after `state.step`; `state` is changed in place. Return tokens per second.

    pending: line of the last step, if its evaluation was interrupted and is to be repeated

    A signal ends training between steps, and inside an evaluation, with a checkpoint of that step.

    Raises:
        UserError: a loss that diverges; files that cannot be written.
        Interrupted: a signal came.
    """
    run, evaluator, signals = training.run, training.evaluator, training.signals
    settings, clock = evaluator.config.train, Clock()
    with (
        signals.held(),
        checkpoint.open_checkpoints(
            run.place, settings.save_total_limit, run.check, run.committed
        ) as kept,
        Journal(
            run.output / "metrics.jsonl",
            settings.total_steps,
            evaluator.display,
            training.trackers,
            state.step,
            lambda step: forecast.seconds_left(evaluator, clock, step),
        ) as journal,
    ):
        trainer = _Trainer(
            training=training,
            state=state,
            step_fn=_make_step(training, state),
            schedule=make_schedule(settings),
            kept=kept,
            journal=journal,
            clock=clock,
        )
        over = trainer.over if pending is None else trainer.finish_step(pending)
        while not over:
            over = trainer.finish_step(trainer.take_step())
        with evaluator.display.phase("writing the checkpoint"):
            kept.wait()
    signals.check()  # one that came during the last save
    if state.step < settings.total_steps:
        evaluator.display.console.print(
            f"stopped early at step {state.step}: {state.monitor.stale} evaluations without a "
            f"better {settings.metric_for_best_model.replace('_', ' ')} than that of step "
            f"{state.monitor.best_step}"
        )
    return clock.tokens_per_second


def _make_step(training: Training, state: State) -> Callable:
    """Return the compiled train step, whose outputs have the shardings of the state."""
    placement = jax.tree.map(lambda leaf: leaf.sharding, (state.adapters, state.opt_state))
    model, config = training.evaluator.model, training.evaluator.config
    return make_train_step(model, config, training.optimizer, placement, training.objective)


def _is_due(step: int, every: int | None) -> bool:
    """Return True if an action with this interval is due at this step."""
    return every is not None and step % every == 0


def _check_first(measured: Mapping[str, float]) -> None:
    """Raise if the first step of an objective that compares answers has nothing to learn.

    Raises:
        UserError: its loss is 0 and its accuracy 1.
    """
    if measured.get("accuracy") == 1 and abs(measured["loss"]) < _NOTHING:
        margin = measured.get("margin", math.nan)
        raise UserError(
            f"the first step has loss {measured['loss']:.1g}, accuracy 1 and margin {margin:.4g}: "
            "the model prefers every chosen answer already, and there is nothing to learn. With "
            "objective.reference=start, the loss of DPO begins at log 2: another reference may be "
            "no model for these data. Else lower objective.beta, or look at the pairs with "
            "`lora-jax inspect`"
        )


@dataclass
class _Trainer:
    """Takes the steps of a run in order."""

    training: Training
    state: State
    step_fn: Callable
    schedule: Callable
    kept: checkpoint.Checkpoints
    journal: Journal
    clock: Clock
    compiled: bool = False

    @property
    def evaluator(self) -> Evaluator:
        return self.training.evaluator

    @property
    def signals(self) -> Signals:
        return self.training.signals

    @property
    def output(self) -> Path:
        return self.training.run.output

    @property
    def console(self) -> Console:
        return self.evaluator.display.console

    @property
    def over(self) -> bool:
        """True if no step is left to take."""
        settings = self.evaluator.config.train
        return self.state.step >= settings.total_steps or self.state.monitor.gave_up(settings)

    def take_step(self) -> Line:
        """Take one optimizer step. Return the line for the steps since the last line."""
        state, mesh, settings = self.state, self.evaluator.mesh, self.evaluator.config.train
        rows = settings.batch_size
        batch = self.training.loader.batch(state.step, local_rows(rows, mesh))
        with self._compiling():
            placed = place_batch(batch, mesh, rows)
            if self.evaluator.reference is not None:
                placed = self.evaluator.reference.attach(placed)
            state.adapters, state.opt_state, measured = self.step_fn(
                state.adapters,
                state.opt_state,
                self.evaluator.model.params,
                placed,
                jax.random.fold_in(self.training.key, state.step + 1),
            )
        measured = {name: float(value) for name, value in measured.items()}
        state.scores = None
        self._check_loss(state.step + 1, measured["loss"], measured["grad_norm"])
        if state.step == 0 and settings.compares_answers:
            _check_first(measured)
        rate = float(self.schedule(state.step))
        state.step += 1
        state.supervised_tokens += measured["supervised_tokens"]
        state.window.add(measured)
        # Each host has seen only its own rows.
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

    def _check_loss(self, step: int, loss: float, grad_norm: float) -> None:
        """Raise for a loss that diverges, after removing the checkpoints that it may have spoilt.

        Raises:
            UserError: it is not finite, or climbs.
        """
        monitor, divergence = self.state.monitor, self.evaluator.config.train.divergence
        problem = monitor.problem(step, loss, grad_norm, divergence)
        if problem is not None:
            # A loss that is not finite makes the state before it suspect; one that climbs, all
            # states since its minimum.
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            sound = monitor.lowest_step if finite else step - 2
            raise UserError(f"{problem}. {self._keep_good(sound or 0)}")

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """Show a progress phase around the first call of the step, which compiles it."""
        if self.compiled:
            yield
            return
        with self.evaluator.display.phase("compiling the train step"):
            yield
        self.compiled = True

    def finish_step(self, line: Line) -> bool:
        """Evaluate, log and save what is due after the step of `line`. Return True if it was the
        last one.
        """
        state, settings = self.state, self.evaluator.config.train
        line, better = dict(line), False
        try:
            self.signals.check()
            last = state.step == settings.total_steps
            if self.evaluator.held_out and (last or _is_due(state.step, settings.eval_every)):
                with self.signals.free(), self.clock.paused():
                    measured = self._evaluate()
                line |= self._evaluated(measured)
                better = state.monitor.evaluated(
                    state.step, measured.numbers(), settings.metric_for_best_model
                )
        except Interrupted as stop:
            self._save(pending=line)
            self.kept.wait()
            self.console.print(f"{stop}: step {state.step} is saved; resume=true goes on from it")
            raise
        evaluated = any(f"{name}_loss" in line for name in self.evaluator.held_out)
        if evaluated or self.over or _is_due(state.step, settings.log_every):
            self.journal.write(line)
            state.window = Window()
        every = settings.save_every or max(1, settings.total_steps // 10)
        if better or self.over or _is_due(state.step, every):
            with self.clock.paused():
                self._save(pending=None)
        return self.over

    def _evaluate(self) -> Scores:
        """Measure the held-out losses. Every eval.generate_every steps and after the last step, all
        answers and their metrics are measured too; other evaluations write sample answers to a
        file. Without eval.generate_every, the answers after the last step are left to the caller.
        """
        evaluator, state, settings = self.evaluator, self.state, self.evaluator.config.eval
        every, check = settings.generate_every, self.signals.check
        last = state.step == evaluator.config.train.total_steps
        with evaluator.display.about(f"step {state.step}"):
            losses = evaluator.losses(state.adapters, check)
            if every is not None and (last or _is_due(state.step, every)):
                answers = evaluator.answers(state.adapters, settings.generate_examples, check)
                state.scores = evaluator.with_metrics(losses, answers)
                return state.scores
            if settings.samples and not self.over:
                answers = evaluator.answers(state.adapters, settings.samples, check)
                append_samples(self.output / "samples.jsonl", state.step, answers)
        return Scores(losses, {})

    def _evaluated(self, measured: Scores) -> Line:
        """Return held-out losses, metrics and mean norms for the step's line. Write answers, and
        the norms of every layer, to their files.
        """
        evaluator, state, config = self.evaluator, self.state, self.evaluator.config
        self.console.print(f"step {state.step}: {measured.describe()}")
        if measured.answers:
            file, names = self.output / "predictions.jsonl", config.eval.metrics
            predictions.put(file, state.step, measured.answers, names)
            if not self.over:  # those of the last step are shown at the end
                samples = spread(measured.answers, config.eval.samples)
                append_samples(self.output / "samples.jsonl", state.step, samples)
        sizes = norms.measure(evaluator.model.params, state.adapters, evaluator.adapter)
        append_line(self.output / "norms.jsonl", {"step": state.step, "modules": sizes})
        return measured.numbers() | norms.summarize(sizes)

    def _save(self, pending: Line | None) -> None:
        """Start a checkpoint of the state; `pending` is a line whose evaluation is still due."""
        state = self.state
        record = {
            **self.training.metadata,
            "supervised_tokens": state.supervised_tokens,
            "seconds": self.training.seconds(),
            "watch": dataclasses.asdict(state.monitor),
            "window": dataclasses.asdict(state.window),
            "data": self.training.loader.position(state.step),
            "pending": pending,
        }
        best, sound = state.monitor.best_step, state.monitor.lowest_step
        self.kept.save(state.step, state.adapters, state.opt_state, record, best, sound)

    def _keep_good(self, sound: int) -> str:
        """Remove checkpoints after step `sound` if there is an earlier one; the best one is always
        kept. Return a sentence on the remaining checkpoints.
        """
        self.kept.wait()
        best, steps = self.state.monitor.best_step, self.kept.steps
        good = [step for step in steps if step <= sound or step == best]
        if good:
            for step in set(steps) - set(good):
                self.kept.delete(step)
        steps = self.kept.steps
        if not steps:
            return "No checkpoint had been written yet"
        if not good:
            return f"All checkpoints are suspect: start again (checkpoints: {steps})"
        return f"The last good state is the checkpoint of step {good[-1]} (kept: {steps})"
