"""Two ways to start the steps of a run: afresh, or from a checkpoint. Both load the base."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lora_jax import adapters as methods
from lora_jax import data
from lora_jax.report import journal
from lora_jax.report.console import describe_share
from lora_jax.report.progress import Display
from lora_jax.report.window import Window
from lora_jax.session import Session
from lora_jax.train import base, base_scores, calibration, checkpoint, setup
from lora_jax.train.evaluate import Evaluator, make_evaluator
from lora_jax.train.monitor import LossMonitor
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.outputs import Run
from lora_jax.train.ready import Ready
from lora_jax.train.reference import (
    FILE,
    Given,
    make_reference,
    own_reference,
    saved_reference,
)
from lora_jax.train.scored import Scores
from lora_jax.train.trainer import Line, State, place_state


@dataclass(frozen=True)
class Start:
    """The state that the steps go on from, and everything that they need.

    session: with all settings, the ranks among them
    key: of dropout
    examples: those that a merged model is compared on
    before: scores before the first step of the run; None if they were not measured
    unsent: scores not yet in the logs and trackers
    position: place in a stream of training data
    pending: line of the last step, whose interrupted evaluation is repeated
    seconds: time that earlier sessions of the run took
    """

    session: Session
    evaluator: Evaluator
    optimizer: Any
    key: jax.Array
    state: State
    examples: list[data.Example]
    before: Scores | None
    unsent: Scores | None = None
    position: Mapping[str, Any] | None = None
    pending: Line | None = None
    seconds: float = 0.0


def fresh_start(ready: Ready, mesh: Mesh, display: Display) -> Start:
    """Load the base, initialise the adapters, and measure them.

    Raises:
        UserError: as `base.load_base` and `setup.check_training`.
    """
    session = ready.session
    optimizer = make_optimizer(session.config.train, session.config.adapter)
    init_key, dropout_key = jax.random.split(jax.random.key(session.config.seed))
    calibrate = calibration.make_calibrate(
        session.config, session.model, ready.train_data, ready.encoder, mesh
    )
    config, params, adapters = base.load_base(
        session.config, session.source, session.model, mesh, init_key, calibrate, display
    )
    session = session.with_config(config)
    setup.check_training(session)
    adapters = session.loaded or adapters
    state = place_state(config, session.model, mesh, optimizer, adapters)
    given = ready.reference or own_reference(config, adapters)
    evaluator, examples = _prepare(ready, session, params, given, display)
    with jax.set_mesh(mesh):
        before = _measure_before(evaluator, state, ready.fingerprint)
    return Start(
        *(session, evaluator, optimizer, dropout_key, state, examples),
        before=before,
        unsent=before,
    )


def resumed_start(
    ready: Ready, mesh: Mesh, run: Run, record: Mapping[str, Any], display: Display
) -> Start:
    """Read the checkpoint of `record`, cut the logs back to its step, and load the base.

    Raises:
        UserError: a damaged checkpoint; as `base.reload_base`.
    """
    session = ready.session
    config, model = session.config, session.model
    optimizer = make_optimizer(config.train, config.adapter)
    dropout_key = jax.random.split(jax.random.key(config.seed))[1]
    state = _restore(session, mesh, optimizer, run, record)
    # The line of a step with an interrupted evaluation is written after that is repeated.
    last = state.step - 1 if record["pending"] else state.step
    for name in journal.LOGS:
        journal.cut_back(run.output / name, last)
    params = base.reload_base(config, session.source, model, mesh, state.adapters, display)
    given = saved_reference(config, run.output / FILE)
    evaluator, examples = _prepare(ready, session, params, given, display)
    before = Scores(**record["before"]) if record["before"] else None
    scored = f"; before: {before.describe()}" if before else ""
    display.console.print(f"resumed from step {state.step}{scored}")
    return Start(
        *(session, evaluator, optimizer, dropout_key, state, examples),
        before=before,
        position=record["data"],
        pending=record["pending"],
        seconds=record.get("seconds", 0.0),
    )


def _restore(
    session: Session, mesh: Mesh, optimizer: Any, run: Run, record: Mapping[str, Any]
) -> State:
    """Read the state of a checkpoint."""
    config, model = session.config, session.model
    shapes = methods.shapes(model.params, session.trainable)
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = place_state(config, model, mesh, optimizer, empty)
    state.adapters, state.opt_state, _ = checkpoint.restore(
        run.place, state.adapters, state.opt_state, record["step"]
    )
    return dataclasses.replace(
        state,
        step=record["step"],
        supervised_tokens=record["supervised_tokens"],
        monitor=LossMonitor(**record["watch"]),
        window=Window(**record.get("window", {})),
    )


def _prepare(
    ready: Ready, session: Session, params: Any, given: Given | None, display: Display
) -> tuple[Evaluator, list[data.Example]]:
    """Return the evaluator of the loaded model, and the examples that a merge is measured on.
    `given` is the adapter of the reference, if the objective has one.
    """
    share = describe_share(session.trainable.parameters, session.frozen)
    display.console.print(f"training {share}")
    examples, mesh = ready.choose_probe(), ready.mesh
    model = session.model.replace(params=params)
    evaluator = make_evaluator(
        *(session.config, model, session.tokenizer, ready.held_out, mesh, display),
        trainable=session.trainable,
    )
    if session.config.train.needs_reference:
        reference = make_reference(session.config, model, mesh, given)
        evaluator = dataclasses.replace(evaluator, reference=reference)
    return evaluator, examples


def _measure_before(
    evaluator: Evaluator, state: State, fingerprint: Mapping[str, str]
) -> Scores | None:
    """Return the scores before the first step; None with `eval.before=false`."""
    console = evaluator.display.console
    if not evaluator.config.eval.before:
        console.print("before: not measured (eval.before=false)")
        return None
    before = Scores({}, {})
    if evaluator.held_out:
        before = base_scores.measure(evaluator, state.adapters, fingerprint, console.print)
    console.print(f"before: {before.describe()}")
    return before
