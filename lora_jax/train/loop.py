"""One run from top to bottom: session, base, adapters, evaluation, steps, checkpoints, export."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lora_jax import config as configs
from lora_jax import data, hosts, objectives
from lora_jax.config import Config
from lora_jax.data import sets
from lora_jax.objectives import Objective
from lora_jax.report import journal
from lora_jax.report.console import make_console, print_summary, share
from lora_jax.report.progress import Display
from lora_jax.report.trackers import Tracker, open_trackers
from lora_jax.session import Session
from lora_jax.train import finished, interrupt, outputs, predictions, setup, warn
from lora_jax.train.conclude import conclude
from lora_jax.train.facts import versions
from lora_jax.train.outputs import Run
from lora_jax.train.ready import Ready, make_ready
from lora_jax.train.reference import FILE, with_reference
from lora_jax.train.start import Start, fresh_start, resumed_start
from lora_jax.train.trainer import Training, train


def run(
    config: Config, console: Console | None = None, objective: Objective | None = None
) -> dict[str, Any]:
    """Fine-tune as `config` says, write it all to `config.output_dir`, and return the summary.

    `objective` replaces the config's cross-entropy (`lora_jax.objectives`).

    Raises:
        UserError: a mistake in config, model, data or adapter files, found before training starts;
            a loss that diverges; files that cannot be written; hosts that do not meet.
        Interrupted: SIGTERM or Ctrl-C came; a checkpoint holds what was done.
    """
    with hosts.joined(config.hosts):
        agree = hosts.agree if jax.process_count() > 1 else None
        console = console or make_console(quiet=not hosts.is_main())
        leave = None if interrupt.leave is None else partial(_leave, console, interrupt.leave)
        with (
            interrupt.catch(agree, console.print, leave) as signals,
            contextlib.ExitStack() as held,
        ):
            return _run(config, Display(console), signals, held, objective)


def _leave(console: Console, leave: Callable[[int], None], status: int) -> None:
    """End the process at once, and show the cursor that a progress bar hid."""
    console.show_cursor()
    leave(status)


def _run(
    config: Config,
    display: Display,
    signals: interrupt.Signals,
    held: contextlib.ExitStack,
    objective: Objective | None,
) -> dict[str, Any]:
    began, console = time.monotonic(), display.console
    objectives.choose(config, objective)  # before anything slow
    run, mesh, record = setup.prepare(config, held)
    device = jax.devices()[0].device_kind
    console.print(f"lora_jax {version('lora_jax')}, jax {jax.__version__}, {mesh.size} x {device}")
    ready = make_ready(config, mesh, record, display)
    done = None
    if record is not None:
        settled = ready.session.config
        done = hosts.from_main(lambda: finished.find_finished(run, record, settled))
    if record is not None and done is not None:
        return finished.repair(run, done, record, ready, console)
    hosts.from_main(lambda: run.check_exports(outputs.wanted(ready.session.config)))
    measured = _measure(ready)
    warnings = _warn(ready, measured, console)

    console.print(f"loading {config.model}")
    if record is None:
        start = fresh_start(ready, mesh, display)
    else:
        start = resumed_start(ready, mesh, run, record, display)

    def seconds() -> float:
        return start.seconds + time.monotonic() - began

    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        loader = _make_loader(ready, start, display)
        # Signals wait from the first file on: a run that has begun ends with a checkpoint.
        with signals.held():
            _write_first(run, start, fresh=record is None)
            trackers = stack.enter_context(_open_trackers(run, start))
            training = Training(
                run=run,
                evaluator=start.evaluator,
                loader=loader,
                optimizer=start.optimizer,
                key=start.key,
                metadata=_metadata(run, ready, start),
                signals=signals,
                trackers=trackers,
                seconds=seconds,
                objective=objective,
            )
            speed = train(training=training, state=start.state, pending=start.pending)
        summary = conclude(run, start, ready.fingerprint, trackers)
    summary |= {"tokens_per_second": speed, **_count(start.session)}
    summary["data"] = {name: one.describe() for name, one in measured.items()}
    summary |= {"seconds": seconds(), "session_seconds": time.monotonic() - began}
    summary["warnings"] = [*warnings, *warn.of_forgetting(summary["regression"])]
    _report(summary, run.output, console, len(warnings))
    return summary


def _measure(ready: Ready) -> dict[str, warn.Measured]:
    """Measure the sets of a run, by the names of their settings."""
    named = warn.name_held_out(ready.session.config, ready.held_out)
    return warn.measure(warn.name_training(ready.train_data) | named, ready.encoder.counts)


def _warn(ready: Ready, measured: Mapping[str, warn.Measured], console: Console) -> list[str]:
    """Print the warnings about a run, and return them."""
    warnings = warn.find(ready.session, ready.train_data, ready.held_out, measured)
    for warning in warnings:
        console.print(f"warning: {warning}")
    return warnings


def _make_loader(ready: Ready, start: Start, display: Display) -> Any:
    """Return the batches of the run, with reference log-probabilities unless they are streamed."""
    config, reference = start.session.config, start.evaluator.reference
    console, position = display.console, start.position
    loader = sets.make_loader(config, ready.train_data, ready.encoder, position, console)
    if reference is None or isinstance(loader, data.StreamLoader):
        return loader
    return with_reference(loader, reference, ready.fingerprint["base"], display)


def _metadata(run: Run, ready: Ready, start: Start) -> dict[str, Any]:
    """Return the part of a checkpoint's record that is the same at every step."""
    before = start.before
    return {
        "run": run.id,
        "config": dataclasses.asdict(start.session.config),
        "given_adapter": dataclasses.asdict(ready.given),
        "versions": versions(),
        "fingerprint": ready.fingerprint,
        "rng": np.asarray(jax.random.key_data(start.key)).tolist(),
        "before": before and {"losses": before.losses, "metrics": before.metrics},
    }


def _count(session: Session) -> dict[str, Any]:
    """Return the parameter counts for the summary."""
    trained, frozen = session.trainable.parameters, session.frozen
    return {
        "total_parameters": frozen + trained,
        "trainable_parameters": trained,
        "trainable_share": share(trained, frozen),
        "adapter_bytes": 4 * session.trainable.exported,
    }


def _write_first(run: Run, start: Start, fresh: bool) -> None:
    """Write the first files. After a failure before this, the same output_dir can be used again."""
    if fresh:
        run.clear_logs()
    run.begin()
    config, reference = start.session.config, start.evaluator.reference
    if fresh and reference is not None:
        reference.save(run.output / FILE)
    journal.write_whole(run.output / "config.yaml", configs.dump(config))
    if start.unsent is not None:
        file, names = run.output / "predictions.jsonl", config.eval.metrics
        predictions.put(file, 0, start.unsent.answers, names)


@contextlib.contextmanager
def _open_trackers(run: Run, start: Start) -> Iterator[list[Tracker]]:
    """Open the trackers of `train.report_to`; those of a new run get the scores before it."""
    first = start.state.step + 1 if start.unsent is None else 0
    with open_trackers(start.session.config, run.output, first) as trackers:
        if start.unsent is not None:
            journal.send(trackers, 0, start.unsent.numbers())
        yield trackers


def _report(summary: Mapping[str, Any], output: Path, console: Console, printed: int) -> None:
    """Write the summary and print it, with the warnings after the first `printed` ones."""
    journal.write_summary(output / "summary.json", summary)
    print_summary(console, summary)
    for warning in summary["warnings"][printed:]:
        console.print(f"warning: {warning}")
    if hosts.is_main():
        names = (path.name for path in output.iterdir())
        written = ", ".join(sorted(name for name in names if not name.startswith(".")))
        console.print(f"written to {output}: {written}")
        console.print(f"as one page: lora-jax report {output}")
