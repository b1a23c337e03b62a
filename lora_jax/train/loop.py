"""One run from top to bottom: config, base, adapters, evaluation, steps, checkpoints, export."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
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
from lora_jax.train import (
    base,
    calibration,
    checkpoint,
    epochs,
    export,
    interrupt,
    metrics,
    norms,
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
from lora_jax.train.trainer import State, place_state, train
from lora_jax.train.watch import Watch


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
        with interrupt.catch(agree, console.print) as signals:
            return _run(config, console, signals)


def _run(config: Config, console: Console, signals: interrupt.Signals) -> dict[str, Any]:
    started = time.monotonic()
    output, mesh, record = setup.prepare(config)
    device = jax.devices()[0].device_kind
    console.print(f"lora_jax {version('lora_jax')}, jax {jax.__version__}, {mesh.size} x {device}")
    hosts.from_main(lambda: str(formats.resolve(config.model)))  # hosts may share the cache
    source = formats.resolve(config.model)
    config, model = describe(config, source)
    for note in model.notes:
        console.print(f"note: {note}")
    config, loaded = setup.continue_adapter(config, model)
    given = config.adapter
    if record is not None:
        config = resume.with_date(record, resume.with_ranks(record, config))
        resume.check_config(record, config)
    found = setup.find_trainable(config, model)
    setup.check_attention(config, model, mesh, console)
    tokenizer = formats.load_tokenizer(source)
    config = sets.settle_date(config, tokenizer, console)
    prints = setup.take_fingerprint(config, source, tokenizer, record)
    find_stops(config, model, tokenizer)  # refuses damaged files before anything slow
    encoder = sets.make_encoder(config, model, tokenizer, prints["tokenizer"], console)
    train_data, held_out = sets.read_sets(config, encoder)
    prints |= {"data": train_data.digest(), "held_out": sets.digest(held_out.values())}
    if record is not None:
        fingerprint.check(record["fingerprint"], prints, "the checkpoint", config.allow_change)
    config = epochs.settle(config, train_data, encoder, record)
    setup.check_sizes(config, model, [*train_data.sets.values(), *held_out.values()], console)
    setup.check_metrics(config, model, tokenizer, held_out)
    if record is not None and (done := hosts.from_main(lambda: _finished(output, record, config))):
        console.print(f"{output} is finished: {done['steps']} steps; nothing is left to do")
        return done

    known = warn.name_training(train_data) | warn.name_held_out(config, held_out)
    measured = warn.measure(known, encoder.counts)
    warnings = warn.find(config, model, tokenizer, train_data, measured)
    for warning in warnings:
        console.print(f"warning: {warning}")
    console.print(f"loading {config.model}")
    optimizer = make_optimizer(config.train, config.adapter)
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    place = checkpoint.find_place(config, output)
    if record is None:
        calibrate = calibration.make_calibrate(config, model, train_data, encoder, mesh)
        config, params, adapters = base.load(config, source, model, mesh, init_key, calibrate)
        found = setup.find_trainable(config, model)  # init=eva moves ranks
        state = place_state(config, model, mesh, optimizer, loaded or adapters)
    else:
        empty = methods.shapes(model.params, config.adapter)
        empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), empty)
        state = place_state(config, model, mesh, optimizer, empty)
        _restore(state, place, output, record)
        params = base.load_under(config, source, model, mesh, state.adapters)
    frozen = 0 if config.adapter.method == "full" else tree.count(model.params)
    trained, model = found.parameters, model.replace(params=params)
    console.print(f"training {trained:,} parameters beside {frozen:,} frozen ones")

    merges = config.export.merged or config.adapter.method == "full"
    probed = probe.choose(config, encoder, train_data, held_out) if merges else []
    judge = make_judge(config, model, tokenizer, held_out, mesh)
    with jax.set_mesh(mesh):
        if record is None:
            before = judge.score(state.adapters)
            console.print(f"before: {before.describe()}")
            setup.clear_logs(output)
        else:
            before = Scores(**record["before"])
            console.print(f"resumed from step {state.step}; before: {before.describe()}")
        # The first thing written: whatever failed before, the same output_dir can be used again.
        metrics.write_whole(output / "config.yaml", configs.dump(config))
        about = {
            "config": dataclasses.asdict(config),
            "given_adapter": dataclasses.asdict(given),
            "versions": export.versions(),
            "fingerprint": prints,
            "rng": np.asarray(jax.random.key_data(dropout_key)).tolist(),
            "before": {"losses": before.losses, "metrics": before.metrics},
        }
        position = record and record["data"]
        loader = sets.make_loader(config, train_data, encoder, position, console)
        speed = train(judge, state, loader, optimizer, dropout_key, about, console, signals, record)
        summary = {"tokens_per_second": speed, "total_parameters": frozen + trained}
        summary |= {"trainable_parameters": trained, "adapter_bytes": 4 * found.exported}
        summary |= conclude(judge, state, before, prints, output, console, probed)
    summary |= {"seconds": time.monotonic() - started, "warnings": warnings}
    metrics.write_summary(output / "summary.json", summary)
    metrics.print_summary(console, summary)
    if hosts.is_main():
        written = ", ".join(sorted(path.name for path in output.iterdir()))
        console.print(f"written to {output}: {written}")
    return summary


def conclude(
    judge: Judge,
    state: State,
    before: Scores,
    prints: Mapping[str, str],
    output: Path,
    console: Console,
    probed: Sequence[data.Example] = (),
) -> dict[str, Any]:
    """After the last step: the adapters to keep, their scores, exports and plots. Returns what the
    summary says of them.
    """
    config, model, reader = judge.config, judge.model, judge.reader
    stops = reader.stop_tokens
    place = checkpoint.find_place(config, output)
    adapters, chosen = state.adapters, state.step
    if config.train.load_best_model_at_end and state.watch.best_step not in (None, chosen):
        chosen = state.watch.best_step
        adapters, _, _ = checkpoint.restore(place, adapters, step=chosen)
        console.print(f"the adapters of step {chosen} are the best: these are exported")
    file = output / "metrics.jsonl"
    curves: dict[str, Any] = hosts.from_main(lambda: metrics.read_curves(file, judge.held_out))
    logged = {name: dict(curves.get(name, ())) for name in judge.held_out}
    # A run that was resumed with other settings may end at a step without an evaluation.
    known = all(chosen in points for points in logged.values())
    losses = {name: points[chosen] for name, points in logged.items()} if known else None
    after = judge.score(adapters, losses)
    sizes = norms.measure(model.params, adapters, config.adapter)
    setup.remove_exports(output)
    extra: dict[str, Any] = {}
    full = config.adapter.method == "full"  # has no adapter to export, only a model
    if config.export.peft and not full:
        export.export_peft(output / "adapter", config, model, adapters, prints, stops=stops)
        trainable = methods.find_trainable(model.params, config.adapter)
        problems = formats.serving_problems(trainable)
        for problem in [*problems, *export.describe_stops(model, reader.tokenizer, stops)]:
            console.print(f"note: {problem}")
    for name, loss in before.losses.items():
        curves[name] = [(0, loss), *curves.get(name, [])]
    metrics.plot_losses(output / "plots" / "loss.png", curves)
    if sizes:
        metrics.plot_norms(output / "plots" / "norms.png", sizes)
    samples = scores.spread(after.answers, config.eval.samples)
    metrics.append_samples(output / "samples.jsonl", state.step, samples)
    metrics.print_samples(console, samples)
    if config.export.merged or full:  # last, as a gate may refuse it
        merged = output / "merged"
        extra |= export.export_merged(merged, config, model, adapters, console, probed, stops=stops)
    return {
        "steps": state.step,
        "exported_step": chosen,
        "supervised_tokens": round(state.supervised_tokens),
        "peak_rss_bytes": metrics.peak_rss_bytes(),
        **metrics.device_memory(),
        "checkpoint_bytes": hosts.from_main(lambda: checkpoint.size(place, state.step)),
        "task": score_pair("task", before, after),
        "regression": score_pair("regression", before, after),
        **norms.summarize(sizes),
        **extra,
    }


def _finished(output: Path, record: Mapping[str, Any], config: Config) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do; one that goes on loses its old one."""
    file = output / "summary.json"
    watch = Watch(**record["watch"])
    over = record["step"] == config.train.total_steps or watch.gave_up(config.train)
    if over and not record["pending"] and file.is_file():
        with contextlib.suppress(ValueError):  # damaged: what it says is worked out again
            return configs.read_json(file)
    file.unlink(missing_ok=True)
    return None


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
    # The line of a step whose evaluation was interrupted is written when it is made up for.
    last = step - 1 if record["pending"] else step
    for name in metrics.LOGS:
        metrics.cut_back(output / name, last)
