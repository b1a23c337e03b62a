"""One run from top to bottom: config, base, adapters, evaluation, steps, checkpoints, export."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lora_jax import adapters as methods
from lora_jax import config as configs
from lora_jax import data, formats, hosts, tree
from lora_jax.config import Config
from lora_jax.formats import fingerprint
from lora_jax.models.common import Model
from lora_jax.train import (
    base,
    base_scores,
    calibration,
    checkpoint,
    directory,
    epochs,
    export,
    interrupt,
    metrics,
    norms,
    plots,
    predictions,
    probe,
    resume,
    scores,
    sets,
    setup,
    warn,
)
from lora_jax.train.evaluate import Judge, Scores, make_judge, score_pair
from lora_jax.train.model import describe, find_stops
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.progress import Display
from lora_jax.train.sinks import Sink, open_sinks
from lora_jax.train.trainer import State, place_state, train
from lora_jax.train.watch import Watch
from lora_jax.train.window import Window


def run(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Fine-tune as `config` says, write it all to `config.output_dir`, and return the summary.

    Raises:
        UserError: a mistake in config, model, data or adapter files, found before training starts;
            a loss that diverges; files that cannot be written; hosts that do not meet.
        Interrupted: SIGTERM or Ctrl-C came; a checkpoint holds what was done.
    """
    with hosts.joined(config.hosts):
        agree = hosts.agree if jax.process_count() > 1 else None
        console = console or metrics.make_console(quiet=not hosts.is_main())
        leave = None if interrupt.leave is None else partial(_leave, console, interrupt.leave)
        with (
            interrupt.catch(agree, console.print, leave) as signals,
            contextlib.ExitStack() as held,
        ):
            return _run(config, Display(console), signals, held)


def _leave(console: Console, leave: Callable[[int], None], status: int) -> None:
    """End the process in the middle of a program, with the cursor that a bar hides."""
    console.show_cursor()
    leave(status)


def _run(
    config: Config, display: Display, signals: interrupt.Signals, held: contextlib.ExitStack
) -> dict[str, Any]:
    started, console = time.monotonic(), display.console
    run, mesh, record = setup.prepare(config, held)
    output = run.output
    device = jax.devices()[0].device_kind
    console.print(f"lora_jax {version('lora_jax')}, jax {jax.__version__}, {mesh.size} x {device}")
    hosts.from_main(lambda: str(formats.resolve(config.model)))  # hosts may share the cache
    source = formats.resolve(config.model)
    config, model = describe(config, source)
    for note in model.notes:
        console.print(f"note: {note}")
    base_digest = fingerprint.start(source)
    config, loaded = setup.continue_adapter(config, model)
    given = config.adapter
    if record is not None:
        config = resume.with_date(record, resume.with_ranks(record, config))
        resume.check_config(record, config)
    found = setup.find_trainable(config, model)
    setup.check_attention(config, model, mesh, console)
    tokenizer = formats.load_tokenizer(source)
    config = sets.settle_date(config, tokenizer, console)
    with display.phase("checking the model's files"):
        prints = setup.take_fingerprint(config, base_digest, tokenizer, record)
    find_stops(config, model, tokenizer)  # refuses damaged files before anything slow
    encoder = sets.make_encoder(config, model, tokenizer, prints["tokenizer"], console)
    with display.phase("reading the data"):
        train_data, held_out = sets.read_sets(config, encoder)
    prints |= {"data": train_data.digest(), "held_out": sets.digest(held_out.values())}
    prints["base"] = setup.settle_base(base_digest)
    if record is not None:
        fingerprint.check(record["fingerprint"], prints, "the checkpoint", config.allow_change)
    config = epochs.settle(config, train_data, encoder, record)
    setup.check_sizes(config, model, [*train_data.sets.values(), *held_out.values()], console)
    setup.check_metrics(config, model, tokenizer, held_out)
    if record is not None and (done := hosts.from_main(lambda: _finished(run, record, config))):
        merges = "merged" in done["wrong"]
        probed = probe.choose(config, encoder, train_data, held_out) if merges else []
        return _mend(run, done, record, config, model, tokenizer, prints, console, probed)
    hosts.from_main(lambda: run.check_exports(directory.wanted(config)))

    known = warn.name_training(train_data) | warn.name_held_out(config, held_out)
    measured = warn.measure(known, encoder.counts)
    warnings = warn.find(config, model, tokenizer, train_data, measured)
    for warning in warnings:
        console.print(f"warning: {warning}")
    console.print(f"loading {config.model}")
    optimizer = make_optimizer(config.train, config.adapter)
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    if record is None:
        calibrate = calibration.make_calibrate(config, model, train_data, encoder, mesh)
        config, params, adapters = base.load(
            config, source, model, mesh, init_key, calibrate, display
        )
        found = setup.find_trainable(config, model)  # init=eva moves ranks
        state = place_state(config, model, mesh, optimizer, loaded or adapters)
    else:
        empty = methods.shapes(model.params, config.adapter)
        empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), empty)
        state = place_state(config, model, mesh, optimizer, empty)
        _restore(state, checkpoint.find_place(config, output), output, record)
        params = base.load_under(config, source, model, mesh, state.adapters, display)
    frozen = 0 if config.adapter.method == "full" else tree.count(model.params)
    trained, model = found.parameters, model.replace(params=params)
    console.print(f"training {metrics.describe_share(trained, frozen)}")

    merges = config.export.merged or config.adapter.method == "full"
    probed = probe.choose(config, encoder, train_data, held_out) if merges else []
    judge = make_judge(config, model, tokenizer, held_out, mesh, display)
    earlier = 0.0 if record is None else record.get("seconds", 0.0)

    def seconds() -> float:
        return earlier + time.monotonic() - started

    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        before = _measure_before(judge, state, prints, record, console)
        # A signal waits from the first file on: a run that has begun ends with a checkpoint.
        with signals.held():
            _begin(run, judge, before, fresh=record is None)
            first = 0 if record is None and before is not None else state.step + 1
            sinks = stack.enter_context(open_sinks(config, output, first))
            if record is None and before is not None:
                metrics.send(sinks, 0, before.numbers())
            about = {
                "run": run.id,
                "config": dataclasses.asdict(config),
                "given_adapter": dataclasses.asdict(given),
                "versions": export.versions(),
                "fingerprint": prints,
                "rng": np.asarray(jax.random.key_data(dropout_key)).tolist(),
                "before": before and {"losses": before.losses, "metrics": before.metrics},
            }
            position = record and record["data"]
            loader = sets.make_loader(config, train_data, encoder, position, console)
            speed = train(
                *(run, judge, state, loader, optimizer, dropout_key, about, console, signals),
                *(record, sinks, seconds),
            )
        summary = conclude(run, judge, state, before, prints, console, probed, sinks)
    summary |= {"tokens_per_second": speed, "total_parameters": frozen + trained}
    summary |= {"trainable_parameters": trained, "trainable_share": metrics.share(trained, frozen)}
    summary |= {"adapter_bytes": 4 * found.exported, "seconds": seconds()}
    summary |= {"session_seconds": time.monotonic() - started}
    summary["warnings"] = [*warnings, *warn.of_forgetting(summary["regression"])]
    _report(summary, output, console, len(warnings))
    return summary


def _measure_before(
    judge: Judge,
    state: State,
    prints: Mapping[str, str],
    record: Mapping[str, Any] | None,
    console: Console,
) -> Scores | None:
    """The scores before the first step, which a checkpoint has; None with `eval.before=false`."""
    if record is not None:
        before = record["before"] and Scores(**record["before"])
        told = f"; before: {before.describe()}" if before else ""
        console.print(f"resumed from step {state.step}{told}")
        return before
    if not judge.config.eval.before:
        console.print("before: not measured (eval.before=false)")
        return None
    before = Scores({}, {})
    if judge.held_out:
        before = base_scores.measure(judge, state.adapters, prints, console.print)
    console.print(f"before: {before.describe()}")
    return before


def _begin(run: directory.Run, judge: Judge, before: Scores | None, fresh: bool) -> None:
    """Write the first files: whatever failed before, the same output_dir can be used again."""
    if fresh:
        run.clear_logs()
    run.begin()
    metrics.write_whole(run.output / "config.yaml", configs.dump(judge.config))
    if fresh and before is not None:
        names = judge.config.eval.metrics
        predictions.put(run.output / "predictions.jsonl", 0, before.answers, names)


def _report(summary: Mapping[str, Any], output: Path, console: Console, said: int) -> None:
    """Write the summary and print it, with the warnings after the first `said` ones."""
    metrics.write_summary(output / "summary.json", summary)
    metrics.print_summary(console, summary)
    for warning in summary["warnings"][said:]:
        console.print(f"warning: {warning}")
    if hosts.is_main():
        names = (path.name for path in output.iterdir())
        written = ", ".join(sorted(name for name in names if not name.startswith(".")))
        console.print(f"written to {output}: {written}")


def conclude(
    run: directory.Run,
    judge: Judge,
    state: State,
    before: Scores | None,
    prints: Mapping[str, str],
    console: Console,
    probed: Sequence[data.Example] = (),
    sinks: Sequence[Sink] = (),
) -> dict[str, Any]:
    """After the last step: the adapters to keep, their scores, exports and plots. Returns what the
    summary says of them.
    """
    config, model, reader = judge.config, judge.model, judge.reader
    stops, output, place = reader.stop_tokens, run.output, run.place
    adapters, chosen = state.adapters, state.step
    if config.train.load_best_model_at_end and state.watch.best_step not in (None, chosen):
        chosen = state.watch.best_step
        adapters, _, _ = checkpoint.restore(place, adapters, step=chosen)
        console.print(f"the adapters of step {chosen} are the best: these are exported")
    file = output / "metrics.jsonl"
    curves: dict[str, Any] = hosts.from_main(lambda: metrics.read_curves(file, judge.held_out))
    after = state.scores if chosen == state.step else None
    if after is None:
        after = _score_exported(judge, adapters, chosen, curves)
    names = config.eval.metrics
    predictions.put(output / "predictions.jsonl", chosen, after.answers, names)
    metrics.send(sinks, state.step, after.metrics)
    sizes = norms.measure(model.params, adapters, config.adapter)
    results = {name: score_pair(name, before, after) for name in ("task", "regression")}
    run.remove_exports()
    extra: dict[str, Any] = {}
    wanted = directory.wanted(config)
    if "adapter" in wanted:
        with judge.display.phase("writing the adapter"), run.exporting("adapter", config) as target:
            export.export_peft(
                target, config, model, adapters, prints, stops=stops, results=results
            )
        trainable = methods.find_trainable(model.params, config.adapter)
        problems = formats.serving_problems(trainable)
        for problem in [*problems, *export.describe_stops(model, reader.tokenizer, stops)]:
            console.print(f"note: {problem}")
    for name, loss in before.losses.items() if before else ():
        curves[name] = [(0, loss), *curves.get(name, [])]
    plots.plot_losses(output / "plots" / "loss.png", curves)
    if sizes:
        plots.plot_norms(output / "plots" / "norms.png", sizes)
    samples = scores.spread(after.answers, config.eval.samples)
    metrics.append_samples(output / "samples.jsonl", state.step, samples)
    metrics.print_samples(console, samples)
    if "merged" in wanted:  # last, as a gate may refuse it
        with judge.display.phase("merging"), run.exporting("merged", config) as target:
            extra |= export.export_merged(
                target, config, model, adapters, console, probed, stops, results
            )
    return {
        "steps": state.step,
        "exported_step": chosen,
        "supervised_tokens": round(state.supervised_tokens),
        "peak_rss_bytes": metrics.peak_rss_bytes(),
        **metrics.device_memory(),
        "checkpoint_bytes": hosts.from_main(lambda: checkpoint.size(place, state.step)),
        **results,
        **norms.summarize(sizes),
        **extra,
        "outputs": hosts.from_main(run.digests),
    }


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


def _finished(
    run: directory.Run, record: Mapping[str, Any], config: Config
) -> dict[str, Any] | None:
    """Of a run that has no step left to take, the summary and the exports that are not what it
    says. A run that goes on loses its summary.
    """
    run.check()
    file = run.output / "summary.json"
    watch = Watch(**record["watch"])
    over = record["step"] == config.train.total_steps or watch.gave_up(config.train)
    if over and not record["pending"] and file.is_file():
        with contextlib.suppress(ValueError):  # damaged: what it says is worked out again
            summary = configs.read_json(file)
            if (summary.get("steps"), summary.get("exported_step")) == (
                record["step"],
                export.chosen_step(config, record),
            ):
                return {"summary": summary, "wrong": run.find_wrong(config, summary)}
    file.unlink(missing_ok=True)
    return None


def _mend(
    run: directory.Run,
    done: Mapping[str, Any],
    record: Mapping[str, Any],
    config: Config,
    model: Model,
    tokenizer: Any,
    prints: Mapping[str, str],
    console: Console,
    probed: Sequence[data.Example],
) -> dict[str, Any]:
    """Export again, from the checkpoint, what is wrong with the exports of a finished run. Returns
    the summary, which says what there is then.
    """
    summary, wrong = dict(done["summary"]), done["wrong"]
    finished = f"{run.output} is finished: {summary['steps']} steps"
    if not wrong:
        console.print(f"{finished}; nothing is left to do")
        if "outputs" not in summary:
            console.print("note: its summary has no digests of its exports: they are not checked")
        return summary
    hosts.from_main(lambda: run.check_exports(wrong))
    for name, reason in wrong.items():
        console.print(
            f"{finished}; {run.output / name} {reason}: it is exported again from the checkpoint "
            f"of step {summary['exported_step']}"
        )
        kind = "peft" if name == "adapter" else "hf"
        with run.exporting(name, config) as target:
            summary |= export.export_checkpoint(
                *(kind, target, run.place, record, config, model, tokenizer, prints),
                *(console, probed, None, summary),
            )
    summary["outputs"] = hosts.from_main(run.digests)
    metrics.write_summary(run.output / "summary.json", summary)
    return summary


def _restore(
    state: State, place: checkpoint.Place, output: Path, record: Mapping[str, Any]
) -> None:
    """Put what the checkpoint of `record` holds into `state`, and cut the logs back to its step."""
    step = record["step"]
    state.adapters, state.opt_state, _ = checkpoint.restore(
        place, state.adapters, state.opt_state, step
    )
    state.step, state.supervised_tokens = step, record["supervised_tokens"]
    state.watch = Watch(**record["watch"])
    state.window = Window(**record.get("window", {}))
    # The line of a step whose evaluation was interrupted is written when it is made up for.
    last = step - 1 if record["pending"] else step
    for name in metrics.LOGS:
        metrics.cut_back(output / name, last)
