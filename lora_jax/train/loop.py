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
from lora_jax import data, formats, sharding, tree
from lora_jax.config import Config, UserError
from lora_jax.generate import make_generate
from lora_jax.train import checkpoint, export, metrics, setup
from lora_jax.train.evaluate import Judge, describe_scores, score_pair
from lora_jax.train.optimizer import make_optimizer, make_schedule
from lora_jax.train.step import make_eval_step, make_train_step


def run(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Fine-tune as `config` says, write everything to `config.output_dir`, and return the summary.

    Raises:
        UserError: a mistake in config, model, data or adapter files; found before training starts.
    """
    started = time.monotonic()
    console = console or Console(stderr=True, highlight=False)
    output, mesh = setup.prepare(config)
    console.print(
        f"lora_jax {version('lora_jax')}, jax {jax.__version__}, {mesh.size} x {jax.devices()[0].device_kind}"
    )
    source = formats.resolve(config.model)
    model = formats.describe(source, config.ignore_config_fields)
    config, loaded = setup.continue_adapter(config, model)
    targets = tree.find_targets(model.params, config.adapter)
    tokenizer = formats.load_tokenizer(source)
    train_set = setup.read_set("train", config, config.data.system_prompt, tokenizer, console)
    held_out = {
        "task": setup.read_set("eval", config, config.data.system_prompt, tokenizer, console),
        "regression": setup.read_set("regression", config, None, tokenizer, console),
    }
    setup.check_sizes(config, model, tokenizer)

    console.print(f"loading {config.model}")
    dtype = None if config.base_dtype is None else jnp.dtype(config.base_dtype)
    params = formats.read_params(source, model, mesh, dtype)
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    params, adapters = methods.init(init_key, params, config.adapter)
    specs = sharding.adapter_specs(adapters, params, model.rules, mesh)
    adapters = sharding.place(loaded or adapters, specs, mesh)
    model = model.replace(params=params)
    trainable = sum(target.parameters for target in targets)
    console.print(f"training {trainable:,} parameters beside {tree.count(params):,} frozen ones")
    (output / "config.yaml").write_text(configs.dump(config), encoding="utf-8")

    stops = data.stop_tokens(tokenizer, config.data.chat_template, formats.stop_tokens(source))
    compute_dtype = jnp.dtype(config.train.compute_dtype)
    judge = Judge(
        config,
        model,
        tokenizer,
        stops,
        held_out,
        mesh,
        make_eval_step(model, config),
        make_generate(model, compute_dtype),
    )
    with jax.set_mesh(mesh):
        before, answers_before = judge.losses(adapters), judge.answers(adapters)
        console.print(f"before: {describe_scores(before, answers_before)}")
        adapters, curves, totals = train_steps(
            judge, adapters, train_set, dropout_key, output, console
        )
        after, answers_after = judge.losses(adapters), judge.answers(adapters)

    if config.export.peft:
        export.export_peft(output / "adapter", config, model, adapters, source)
    if config.export.merged:
        export.export_merged(output / "merged", config, model, adapters, source)
    for name in before:
        curves[name] = [(0, before[name]), *curves.get(name, []), (config.train.steps, after[name])]
    metrics.plot_losses(output / "plots" / "loss.png", curves)
    summary = {
        "steps": config.train.steps,
        **totals,
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": metrics.peak_rss_bytes(),
        "total_parameters": tree.count(params) + trainable,
        "trainable_parameters": trainable,
        "adapter_bytes": 4 * trainable,
        "checkpoint_bytes": metrics.directory_bytes(
            output / "checkpoints" / str(config.train.steps)
        ),
        "task": score_pair("task", before, after, answers_before, answers_after),
        "regression": score_pair("regression", before, after),
    }
    metrics.write_summary(output / "summary.json", summary)
    metrics.print_samples(console, answers_after[: config.eval.samples])
    metrics.print_summary(console, summary)
    console.print(
        f"written to {output}: {', '.join(sorted(path.name for path in output.iterdir()))}"
    )
    return summary


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
    opt_state = optimizer.init(adapters)
    step_fn, schedule = make_train_step(judge.model, config, optimizer), make_schedule(settings)
    loader = data.Loader(
        train_set.examples,
        settings.batch_size,
        config.data.max_length,
        config.data.packing,
        config.data.shuffle,
        config.seed,
    )
    console.print(
        f"{settings.steps} steps of {settings.batch_size} rows x {loader.row_length} tokens, "
        f"{loader.efficiency:.0%} filled, {loader.rows_per_epoch} rows an epoch"
    )
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
                    f"the loss of step {step} is {measured['loss']}; lower train.learning_rate or check the data"
                )
            clock.lap(int(np.count_nonzero(batch["segment_ids"])))
            supervised += measured["supervised_tokens"]
            curves["train"].append((step, measured["loss"]))
            rate = float(schedule(step - 1))
            journal.show(step, measured["loss"], rate, clock)
            if step % settings.log_every == 0 or step == settings.steps:
                speed = {"learning_rate": rate, "tokens_per_second": clock.tokens_per_second}
                journal.write({"step": step, **measured, **speed})
            if settings.eval_every and step % settings.eval_every == 0 and step < settings.steps:
                with clock.paused():
                    for name, loss in judge.losses(adapters).items():
                        curves.setdefault(name, []).append((step, loss))
                        journal.write({"step": step, f"{name}_loss": loss})
            if step == settings.steps or (settings.save_every and step % settings.save_every == 0):
                with clock.paused():
                    checkpoint.save(
                        manager, step, adapters, opt_state, {"config": dataclasses.asdict(config)}
                    )
    totals = {"supervised_tokens": round(supervised), "tokens_per_second": clock.tokens_per_second}
    return adapters, curves, totals
