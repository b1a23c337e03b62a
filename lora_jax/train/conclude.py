"""The end of a run: the adapters to keep are scored, plotted and exported."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax import hosts
from lora_jax.report import journal, plots, scores
from lora_jax.report.console import print_notes, print_samples
from lora_jax.report.trackers import Tracker
from lora_jax.report.usage import device_memory, peak_rss_bytes
from lora_jax.train import checkpoint, export, norms, outputs, predictions
from lora_jax.train.bits import bits_per_nat, with_bits
from lora_jax.train.evaluate import Evaluator
from lora_jax.train.facts import Facts
from lora_jax.train.merged import export_merged
from lora_jax.train.outputs import Run
from lora_jax.train.scored import Scores, score_pair
from lora_jax.train.start import Start

Curves = dict[str, list[tuple[int, float]]]  # points (step, loss) by curve


def conclude(
    run: Run, start: Start, fingerprint: Mapping[str, str], trackers: Sequence[Tracker] = ()
) -> dict[str, Any]:
    """Score, plot and export the adapters to keep. Return that part of the summary."""
    evaluator, state, config = start.evaluator, start.state, start.session.config
    step, adapters = _choose(run, start)
    curves = _read_curves(run, evaluator)
    after = state.scores if step == state.step else None
    if after is None:
        after = _score_exported(evaluator, adapters, step, curves)
    predictions.put(run.output / "predictions.jsonl", step, after.answers, config.eval.metrics)
    journal.send(trackers, state.step, after.metrics)
    sizes = norms.measure(evaluator.model.params, adapters, start.session.trainable)
    results = {
        name: with_bits(score_pair(name, start.before, after), _bits_per_nat(start, name))
        for name in ("task", "regression")
    }
    facts = Facts(evaluator.reader.stop_tokens, results)
    run.remove_exports()
    wanted = outputs.wanted(config)
    if "adapter" in wanted:
        _export_adapter(run, start, adapters, fingerprint, facts)
    _plot(run, start.before, curves, sizes)
    samples = scores.spread(after.answers, config.eval.samples)
    journal.append_samples(run.output / "samples.jsonl", state.step, samples)
    print_samples(evaluator.display.console, samples)
    # Last, as export.min_merge_cosine or max_merge_kl may refuse it.
    merged = _export_merged(run, start, adapters, facts) if "merged" in wanted else {}
    return {
        "steps": state.step,
        "exported_step": step,
        "supervised_tokens": round(state.supervised_tokens),
        "peak_rss_bytes": peak_rss_bytes(),
        **device_memory(),
        "checkpoint_bytes": hosts.from_main(lambda: checkpoint.size(run.place, state.step)),
        **results,
        **norms.summarize(sizes),
        **merged,
        "outputs": hosts.from_main(run.digests),
    }


def _bits_per_nat(start: Start, name: str) -> float | None:
    """Return the factor from the loss of a held-out set to bits per byte; None if the loss is not
    per token.
    """
    evaluator = start.evaluator
    pairs = name == "task" and evaluator.config.train.compares_answers
    if name not in evaluator.held_out or evaluator.model.labels or pairs:
        return None
    limit = evaluator.config.eval.loss_examples
    measured = scores.spread(evaluator.held_out[name].examples, limit)
    return bits_per_nat(measured, start.session.tokenizer)


def _choose(run: Run, start: Start) -> tuple[int, Any]:
    """Return the step to export and its adapters: the last, or with `load_best_model_at_end` the
    best.
    """
    state, best = start.state, start.state.monitor.best_step
    wanted = start.session.config.train.load_best_model_at_end
    if not wanted or best is None or best == state.step:
        return state.step, state.adapters
    adapters, _, _ = checkpoint.restore(run.place, state.adapters, step=best)
    console = start.evaluator.display.console
    console.print(f"the adapters of step {best} are the best: these are exported")
    return best, adapters


def _read_curves(run: Run, evaluator: Evaluator) -> Curves:
    file = run.output / "metrics.jsonl"
    curves: Any = hosts.from_main(lambda: journal.read_curves(file, evaluator.held_out))
    return curves


def _score_exported(evaluator: Evaluator, adapters: Any, step: int, curves: Curves) -> Scores:
    """Score the adapters of a step; its losses come from the curves if they are there."""
    logged = {name: dict(curves.get(name, ())) for name in evaluator.held_out}
    # A run that was resumed with other settings may end at a step without an evaluation.
    known = all(step in points for points in logged.values())
    known = known and not evaluator.config.train.compares_answers  # whose metrics are no curves
    losses = {name: points[step] for name, points in logged.items()} if known else None
    with evaluator.display.about(f"step {step}"):
        return evaluator.score(adapters, losses)


def _plot(run: Run, before: Scores | None, curves: Curves, sizes: Any) -> None:
    """Plot the losses, from before the first step on, and the norms."""
    for name, loss in before.losses.items() if before else ():
        curves[name] = [(0, loss), *curves.get(name, [])]
    plots.plot_losses(run.output / "plots" / "loss.png", curves)
    if sizes:
        plots.plot_norms(run.output / "plots" / "norms.png", sizes)


def _export_adapter(
    run: Run, start: Start, adapters: Mapping, fingerprint: Mapping[str, str], facts: Facts
) -> None:
    """Write the PEFT directory, and print notes on its use in other programs."""
    session, display = start.session, start.evaluator.display
    with (
        display.phase("writing the adapter"),
        run.exporting("adapter", session.config) as target,
    ):
        export.export_peft(target, session, adapters, fingerprint, facts)
    problems = export.serving_problems(session)
    print_notes(display.console, [*problems, *export.stop_notes(session, facts.stops)])


def _export_merged(run: Run, start: Start, adapters: Mapping, facts: Facts) -> dict[str, Any]:
    """Write the merged model. Return its part of the summary."""
    config, evaluator = start.session.config, start.evaluator
    display, examples = evaluator.display, start.examples
    with display.phase("merging"), run.exporting("merged", config) as target:
        return export_merged(
            target, config, evaluator.model, adapters, display.console, examples, facts
        )
