"""One run from top to bottom: config, base, adapters, evaluation, steps, checkpoints, export."""

import dataclasses
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lora_jax import adapters as methods
from lora_jax import config as configs
from lora_jax import formats, sharding, tree
from lora_jax.config import Config, UserError
from lora_jax.train import checkpoint, export, metrics, setup
from lora_jax.train.evaluate import Answers, Judge, make_judge, score_pair
from lora_jax.train.optimizer import make_optimizer, make_schedule
from lora_jax.train.step import make_train_step


def run(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Fine-tune as `config` says, write it all to `config.output_dir`, and return the summary.

    Raises:
        UserError: a mistake in config, model, data or adapter files; found before training starts.
    """
    started = time.monotonic()
    console = console or metrics.make_console()
    output, mesh = setup.prepare(config)
    device = jax.devices()[0].device_kind
    console.print(f"lora_jax {version('lora_jax')}, jax {jax.__version__}, {mesh.size} x {device}")
    source = formats.resolve(config.model)
    model = formats.describe(source, config.ignore_config_fields)
    config, loaded = setup.continue_adapter(config, model)
    targets = tree.find_targets(model.params, config.adapter)
    tokenizer = formats.load_tokenizer(source)
    train_set, held_out = setup.read_sets(config, tokenizer, console)
    setup.check_sizes(config, model, [train_set, *held_out.values()], console)

    console.print(f"loading {config.model}")
    dtype = None if config.base_dtype is None else jnp.dtype(config.base_dtype)
    params = formats.read_params(source, model, mesh, dtype)
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    params, adapters = methods.init(init_key, params, config.adapter)
    specs = sharding.adapter_specs(adapters, params, model.rules, mesh)
    adapters = sharding.place(loaded or adapters, specs, mesh)
    model = model.replace(params=params)
    frozen, trained = tree.count(params), sum(target.parameters for target in targets)
    console.print(f"training {trained:,} parameters beside {frozen:,} frozen ones")

    judge = make_judge(config, model, tokenizer, held_out, mesh)
    with jax.set_mesh(mesh):
        before = judge.score(adapters)
        console.print(f"before: {before.describe()}")
        # The first thing written: whatever failed before, the same output_dir can be used again.
        (output / "config.yaml").write_text(configs.dump(config), encoding="utf-8")
        adapters, curves, totals = train_steps(
            judge, adapters, train_set, dropout_key, output, console
        )
        after = judge.score(adapters)

    if config.export.peft:
        export.export_peft(output / "adapter", config, model, adapters)
    if config.export.merged:
        export.export_merged(output / "merged", config, model, adapters)
    last = config.train.steps
    for name, loss in before.losses.items():
        curves[name] = [(0, loss), *curves.get(name, []), (last, after.losses[name])]
    summary = {
        "steps": last,
        **totals,
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": metrics.peak_rss_bytes(),
        "total_parameters": frozen + trained,
        "trainable_parameters": trained,
        "adapter_bytes": 4 * trained,
        "checkpoint_bytes": metrics.directory_bytes(output / "checkpoints" / str(last)),
        "task": score_pair("task", before, after),
        "regression": score_pair("regression", before, after),
    }
    report(output, console, summary, curves, after.answers[: config.eval.samples])
    return summary


def report(
    output: Path, console: Console, summary: dict[str, Any], curves: dict, samples: Answers
) -> None:
    """The plot, summary.json, and the same for the eye."""
    metrics.plot_losses(output / "plots" / "loss.png", curves)
    metrics.write_summary(output / "summary.json", summary)
    metrics.print_samples(console, samples)
    metrics.print_summary(console, summary)
    written = ", ".join(sorted(path.name for path in output.iterdir()))
    console.print(f"written to {output}: {written}")


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens at every so many steps happens at this one."""
    return every is not None and step % every == 0


def train_steps(
    judge: Judge,
    adapters: Any,
    train_set: setup.DataSet,
    key: jax.Array,
    output: Path,
    console: Console,
) -> tuple[Any, dict[str, list], dict[str, Any]]:
    """All optimizer steps with their logs, held-out losses and checkpoints.

    Returns the adapters, the points (step, loss) of every curve, and the totals for the summary.
    """
    config, settings, mesh = judge.config, judge.config.train, judge.mesh
    optimizer = make_optimizer(settings)
    opt_state = sharding.replicate_scalars(optimizer.init(adapters), mesh)
    placement = jax.tree.map(lambda leaf: leaf.sharding, (adapters, opt_state))
    step_fn = make_train_step(judge.model, config, optimizer, placement)
    schedule = make_schedule(settings)
    loader = setup.make_loader(config, train_set, console)
    curves: dict[str, list[tuple[int, float]]] = {"train": []}
    supervised, clock = 0.0, metrics.Clock()
    checkpoints = checkpoint.open_checkpoints(output / "checkpoints")
    with (
        checkpoints as manager,
        metrics.Journal(output / "metrics.jsonl", settings.steps, console) as journal,
    ):
        for step in range(1, settings.steps + 1):
            batch = loader.batch(step - 1)
            placed = sharding.place_batch(batch, mesh)
            adapters, opt_state, measured = step_fn(
                adapters, opt_state, judge.model.params, placed, jax.random.fold_in(key, step)
            )
            measured = {name: float(value) for name, value in measured.items()}
            if not np.isfinite(measured["loss"]):
                raise UserError(
                    f"the loss of step {step} is {measured['loss']}; lower train.learning_rate or "
                    "check the data"
                )
            clock.lap(int(np.count_nonzero(batch["segment_ids"])))
            supervised += measured["supervised_tokens"]
            curves["train"].append((step, measured["loss"]))
            rate = float(schedule(step - 1))
            journal.show(step, measured["loss"], rate, clock)
            speed = {"learning_rate": rate, "tokens_per_second": clock.tokens_per_second}
            held_out = {}
            if is_due(step, settings.eval_every) and step < settings.steps:
                with clock.paused():
                    for name, loss in judge.losses(adapters).items():
                        curves.setdefault(name, []).append((step, loss))
                        held_out[f"{name}_loss"] = loss
                    console.print(f"step {step}: {held_out}")
            if is_due(step, settings.log_every) or held_out or step == settings.steps:
                journal.write({"step": step, **measured, **speed, **held_out})
            if is_due(step, settings.save_every) or step == settings.steps:
                with clock.paused():
                    checkpoint.save(
                        manager, step, adapters, opt_state, {"config": dataclasses.asdict(config)}
                    )
    totals = {"supervised_tokens": round(supervised), "tokens_per_second": clock.tokens_per_second}
    return adapters, curves, totals
