"""One run from top to bottom: config, base, adapters, evaluation, steps, checkpoints, export."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from lora_jax import adapters as methods
from lora_jax import config as configs
from lora_jax import data, formats, hosts, objectives
from lora_jax.config import Config
from lora_jax.data import sets
from lora_jax.objectives import Objective
from lora_jax.report import card, journal, plots, scores
from lora_jax.report.console import (
    describe_share,
    make_console,
    print_samples,
    print_summary,
    share,
)
from lora_jax.report.progress import Display
from lora_jax.report.trackers import Sink, open_sinks
from lora_jax.report.usage import device_memory, peak_rss_bytes
from lora_jax.report.window import Window
from lora_jax.train import (
    base,
    base_scores,
    calibration,
    checkpoint,
    export,
    finished,
    interrupt,
    norms,
    outputs,
    predictions,
    session,
    setup,
    warn,
)
from lora_jax.train.evaluate import Judge, Scores, make_judge, score_pair
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.outputs import Run
from lora_jax.train.session import Session
from lora_jax.train.trainer import State, place_state, train
from lora_jax.train.watch import Watch


def run(
    config: Config, console: Console | None = None, objective: Objective | None = None
) -> dict[str, Any]:
    """Fine-tune as `config` says, write it all to `config.output_dir`, and return the summary.

    `objective` is minimised in place of the config's cross-entropy (`lora_jax.objectives`).

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
    """End the process in the middle of a program, with the cursor that a bar hides."""
    console.show_cursor()
    leave(status)


def _run(
    config: Config,
    display: Display,
    signals: interrupt.Signals,
    held: contextlib.ExitStack,
    objective: Objective | None,
) -> dict[str, Any]:
    started, console = time.monotonic(), display.console
    objectives.choose(config, objective)  # before anything slow
    run, mesh, record = setup.prepare(config, held)
    device = jax.devices()[0].device_kind
    console.print(f"lora_jax {version('lora_jax')}, jax {jax.__version__}, {mesh.size} x {device}")
    ready = session.read(config, mesh, record, display)
    if record is not None:
        done = hosts.from_main(lambda: finished.look(run, record, ready.config))
        if done is not None:
            return finished.mend(run, done, record, ready, console)
    hosts.from_main(lambda: run.check_exports(outputs.wanted(ready.config)))
    warnings = _warn(ready, console)

    console.print(f"loading {ready.config.model}")
    optimizer = make_optimizer(ready.config.train, ready.config.adapter)
    init_key, dropout_key = jax.random.split(jax.random.key(ready.config.seed))
    if record is None:
        ready, params, state = _init(ready, mesh, optimizer, init_key, display)
    else:
        params, state = _restore(ready, mesh, optimizer, run, record, display)
    config, model = ready.config, ready.model.replace(params=params)
    console.print(f"training {describe_share(ready.found.parameters, ready.frozen)}")
    probed = ready.choose_probe()
    judge = make_judge(config, model, ready.tokenizer, ready.held_out, mesh, display)
    earlier = 0.0 if record is None else record.get("seconds", 0.0)

    def seconds() -> float:
        return earlier + time.monotonic() - started

    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        before = _measure_before(judge, state, ready.prints, record)
        # A signal waits from the first file on: a run that has begun ends with a checkpoint.
        with signals.held():
            _begin(run, judge, before, fresh=record is None)
            sinks = stack.enter_context(_open_sinks(run, judge, state, before, record))
            position = record and record["data"]
            loader = sets.make_loader(config, ready.train_data, ready.encoder, position, console)
            speed = train(
                run=run,
                judge=judge,
                state=state,
                loader=loader,
                optimizer=optimizer,
                key=dropout_key,
                about=_about(run, ready, dropout_key, before),
                console=console,
                signals=signals,
                record=record,
                sinks=sinks,
                seconds=seconds,
                objective=objective,
            )
        summary = conclude(run, judge, state, before, ready.prints, probed, sinks)
    summary |= {"tokens_per_second": speed, **_count(ready)}
    summary |= {"seconds": seconds(), "session_seconds": time.monotonic() - started}
    summary["warnings"] = [*warnings, *warn.of_forgetting(summary["regression"])]
    _report(summary, run.output, console, len(warnings))
    return summary


def _warn(ready: Session, console: Console) -> list[str]:
    """Print the warnings about a run, and return them."""
    config, train_data = ready.config, ready.train_data
    known = warn.name_training(train_data) | warn.name_held_out(config, ready.held_out)
    measured = warn.measure(known, ready.encoder.counts)
    warnings = warn.find(config, ready.model, ready.tokenizer, train_data, ready.held_out, measured)
    for warning in warnings:
        console.print(f"warning: {warning}")
    return warnings


def _init(
    ready: Session, mesh: Mesh, optimizer: Any, key: jax.Array, display: Display
) -> tuple[Session, Mapping, State]:
    """Load the base and initialise the adapters. `init=eva` changes the ranks in the config."""
    config, model = ready.config, ready.model
    calibrate = calibration.make_calibrate(config, model, ready.train_data, ready.encoder, mesh)
    config, params, adapters = base.load(config, ready.source, model, mesh, key, calibrate, display)
    found = setup.find_trainable(config, model)
    state = place_state(config, model, mesh, optimizer, ready.loaded or adapters)
    return dataclasses.replace(ready, config=config, found=found), params, state


def _restore(
    ready: Session,
    mesh: Mesh,
    optimizer: Any,
    run: Run,
    record: Mapping[str, Any],
    display: Display,
) -> tuple[Mapping, State]:
    """Read the checkpoint of `record`, cut the logs back to its step, and load the base."""
    config, model = ready.config, ready.model
    empty = methods.shapes(model.params, config.adapter)
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), empty)
    state = place_state(config, model, mesh, optimizer, empty)
    step = record["step"]
    state.adapters, state.opt_state, _ = checkpoint.restore(
        run.place, state.adapters, state.opt_state, step
    )
    state.step, state.supervised_tokens = step, record["supervised_tokens"]
    state.watch = Watch(**record["watch"])
    state.window = Window(**record.get("window", {}))
    # The line of a step whose evaluation was interrupted is written when it is made up for.
    last = step - 1 if record["pending"] else step
    for name in journal.LOGS:
        journal.cut_back(run.output / name, last)
    params = base.load_under(config, ready.source, model, mesh, state.adapters, display)
    return params, state


def _about(run: Run, ready: Session, key: jax.Array, before: Scores | None) -> dict[str, Any]:
    """The part of a checkpoint's record that is the same at every step."""
    return {
        "run": run.id,
        "config": dataclasses.asdict(ready.config),
        "given_adapter": dataclasses.asdict(ready.given),
        "versions": export.versions(),
        "fingerprint": ready.prints,
        "rng": np.asarray(jax.random.key_data(key)).tolist(),
        "before": before and {"losses": before.losses, "metrics": before.metrics},
    }


def _count(ready: Session) -> dict[str, Any]:
    """The numbers of parameters, for the summary."""
    trained, frozen = ready.found.parameters, ready.frozen
    return {
        "total_parameters": frozen + trained,
        "trainable_parameters": trained,
        "trainable_share": share(trained, frozen),
        "adapter_bytes": 4 * ready.found.exported,
    }


def _measure_before(
    judge: Judge,
    state: State,
    prints: Mapping[str, str],
    record: Mapping[str, Any] | None,
) -> Scores | None:
    """The scores before the first step, which a checkpoint has; None with `eval.before=false`."""
    console = judge.display.console
    if record is not None:
        before = record["before"] and Scores(**record["before"])
        scored = f"; before: {before.describe()}" if before else ""
        console.print(f"resumed from step {state.step}{scored}")
        return before
    if not judge.config.eval.before:
        console.print("before: not measured (eval.before=false)")
        return None
    before = Scores({}, {})
    if judge.held_out:
        before = base_scores.measure(judge, state.adapters, prints, console.print)
    console.print(f"before: {before.describe()}")
    return before


def _begin(run: Run, judge: Judge, before: Scores | None, fresh: bool) -> None:
    """Write the first files: whatever failed before, the same output_dir can be used again."""
    if fresh:
        run.clear_logs()
    run.begin()
    journal.write_whole(run.output / "config.yaml", configs.dump(judge.config))
    if fresh and before is not None:
        names = judge.config.eval.metrics
        predictions.put(run.output / "predictions.jsonl", 0, before.answers, names)


@contextlib.contextmanager
def _open_sinks(
    run: Run,
    judge: Judge,
    state: State,
    before: Scores | None,
    record: Mapping[str, Any] | None,
) -> Iterator[list[Sink]]:
    """Open the sinks of `train.report_to`; those of a new run get the scores before it."""
    first = 0 if record is None and before is not None else state.step + 1
    with open_sinks(judge.config, run.output, first) as sinks:
        if record is None and before is not None:
            journal.send(sinks, 0, before.numbers())
        yield sinks


def _report(summary: Mapping[str, Any], output: Path, console: Console, said: int) -> None:
    """Write the summary and print it, with the warnings after the first `said` ones."""
    journal.write_summary(output / "summary.json", summary)
    print_summary(console, summary)
    for warning in summary["warnings"][said:]:
        console.print(f"warning: {warning}")
    if hosts.is_main():
        names = (path.name for path in output.iterdir())
        written = ", ".join(sorted(name for name in names if not name.startswith(".")))
        console.print(f"written to {output}: {written}")


def conclude(
    run: Run,
    judge: Judge,
    state: State,
    before: Scores | None,
    prints: Mapping[str, str],
    probed: Sequence[data.Example] = (),
    sinks: Sequence[Sink] = (),
) -> dict[str, Any]:
    """Score, plot and export the adapters to keep. Return that part of the summary."""
    config, output, console = judge.config, run.output, judge.display.console
    chosen, adapters = _choose(run, judge, state)
    file = output / "metrics.jsonl"
    curves: dict[str, Any] = hosts.from_main(lambda: journal.read_curves(file, judge.held_out))
    after = state.scores if chosen == state.step else None
    if after is None:
        after = _score_exported(judge, adapters, chosen, curves)
    predictions.put(output / "predictions.jsonl", chosen, after.answers, config.eval.metrics)
    journal.send(sinks, state.step, after.metrics)
    sizes = norms.measure(judge.model.params, adapters, config.adapter)
    results = {name: score_pair(name, before, after) for name in ("task", "regression")}
    run.remove_exports()
    wanted = outputs.wanted(config)
    if "adapter" in wanted:
        _export_adapter(run, judge, adapters, prints, results)
    for name, loss in before.losses.items() if before else ():
        curves[name] = [(0, loss), *curves.get(name, [])]
    plots.plot_losses(output / "plots" / "loss.png", curves)
    if sizes:
        plots.plot_norms(output / "plots" / "norms.png", sizes)
    samples = scores.spread(after.answers, config.eval.samples)
    journal.append_samples(output / "samples.jsonl", state.step, samples)
    print_samples(console, samples)
    merged: dict[str, Any] = {}
    if "merged" in wanted:  # last, as a gate may refuse it
        with judge.display.phase("merging"), run.exporting("merged", config) as target:
            stops = judge.reader.stop_tokens
            merged = export.export_merged(
                target, config, judge.model, adapters, console, probed, stops, results
            )
    return {
        "steps": state.step,
        "exported_step": chosen,
        "supervised_tokens": round(state.supervised_tokens),
        "peak_rss_bytes": peak_rss_bytes(),
        **device_memory(),
        "checkpoint_bytes": hosts.from_main(lambda: checkpoint.size(run.place, state.step)),
        **results,
        **norms.summarize(sizes),
        **merged,
        "outputs": hosts.from_main(run.digests),
    }


def _choose(run: Run, judge: Judge, state: State) -> tuple[int, Any]:
    """The step to export, and its adapters: the last or, where it is asked for, the best."""
    best = state.watch.best_step
    wanted = judge.config.train.load_best_model_at_end
    if not wanted or best is None or best == state.step:
        return state.step, state.adapters
    adapters, _, _ = checkpoint.restore(run.place, state.adapters, step=best)
    judge.display.console.print(f"the adapters of step {best} are the best: these are exported")
    return best, adapters


def _export_adapter(
    run: Run,
    judge: Judge,
    adapters: Mapping,
    prints: Mapping[str, str],
    results: card.Results,
) -> None:
    """Write the PEFT directory, with notes on what serves or ends its answers."""
    config, model, reader = judge.config, judge.model, judge.reader
    stops = reader.stop_tokens
    with judge.display.phase("writing the adapter"), run.exporting("adapter", config) as target:
        export.export_peft(target, config, model, adapters, prints, stops=stops, results=results)
    trainable = methods.find_trainable(model.params, config.adapter)
    problems = formats.serving_problems(trainable)
    for problem in [*problems, *export.describe_stops(model, reader.tokenizer, stops)]:
        judge.display.console.print(f"note: {problem}")


def _score_exported(
    judge: Judge,
    adapters: Any,
    step: int,
    curves: Mapping[str, Sequence[tuple[int, float]]],
) -> Scores:
    """The scores of the adapters of a step, its losses out of the curves where they are."""
    logged = {name: dict(curves.get(name, ())) for name in judge.held_out}
    # A run that was resumed with other settings may end at a step without an evaluation.
    known = all(step in points for points in logged.values())
    losses = {name: points[step] for name, points in logged.items()} if known else None
    with judge.display.about(f"step {step}"):
        return judge.score(adapters, losses)
