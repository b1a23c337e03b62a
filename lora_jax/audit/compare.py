"""Several adapters on the same held-out data, beside the base they adapt."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from lora_jax import adapters as methods
from lora_jax import data, formats, sharding
from lora_jax.config import AdapterConfig, Config, expand, is_directory, shown
from lora_jax.data import sets
from lora_jax.errors import raise_all
from lora_jax.formats import fingerprint
from lora_jax.report import scores
from lora_jax.report.progress import Display
from lora_jax.train import base, base_scores, predictions, setup
from lora_jax.train.evaluate import make_judge
from lora_jax.train.model import describe, make_encoder, settle_date


def compare(
    config: Config, paths: Sequence[str], console: Console, allow_change: Collection[str] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Losses and metrics of the base and of every PEFT adapter directory in `paths`, a mapping
    each, with its name under `adapter`; and a mapping per answer, as `predictions` has it.

    `config` gives the model, the held-out data and how they are measured.

    Raises:
        UserError: no held-out data; adapters that do not exist or fit, or were made with another
            base, tokenizer or template (unless named in `allow_change`).
    """
    scores.check(config.eval.metrics)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.eval.batch_size, mesh, "eval.batch_size")
    source = formats.resolve(config.model)
    config, model = describe(config, source)
    for note in model.notes:
        console.print(f"note: {note}")
    tokenizer = formats.load_tokenizer(source)
    config = settle_date(config, tokenizer, console)
    template = data.template_text(tokenizer, config.data.chat_template)
    display = Display(console)
    with display.phase("checking the model's files"):
        prints = fingerprint.take(source, tokenizer, template)
    directories = {path: expand(path, "adapter") for path in paths}
    raise_all(
        [
            f"adapter {shown(repr(path))} does not exist, or is no directory; give a PEFT "
            "adapter directory"
            for path, directory in directories.items()
            if not is_directory(directory, f"adapter {path!r}")
        ]
    )
    found = {}
    for path, directory in directories.items():
        found[path] = formats.read_adapter(directory, model.params, model)
        stored = formats.read_fingerprint(directory)
        fingerprint.check(stored, prints, path, allow_change)
        if stored:  # else it is another tool's, which records neither
            _note_prompt(console, path, directory, config)
    encoder = make_encoder(config, model, tokenizer, prints["tokenizer"], console)
    with display.phase("reading the data"):
        held_out = sets.read_held_out(config, encoder)
    setup.check_metrics(config, model, tokenizer, held_out)
    console.print(f"loading {config.model}")
    params = base.read_params(source, model, mesh, config.base_dtype, display)
    model = model.replace(params=params)
    # Fresh adapters of plain LoRA change nothing: they are the base.
    plain = AdapterConfig(rank=1)
    fresh = methods.init(jax.random.key(0), model.params, plain)[1]
    rows, lines = [], []
    for name, (adapters, settings) in [("base", (fresh, plain)), *found.items()]:
        specs = sharding.adapter_specs(adapters, model.params, model.rules, mesh)
        own = dataclasses.replace(config, adapter=settings)
        judge = make_judge(own, model, tokenizer, held_out, mesh, display)
        with jax.set_mesh(mesh):
            placed = sharding.place(adapters, specs, mesh)
            if adapters is fresh:
                result = base_scores.measure(judge, placed, prints, console.print)
            else:
                with display.about(name):
                    result = judge.score(placed)
        console.print(f"{name}: {result.describe()}")
        about = {"adapter": name}
        rows.append(about | result.numbers())
        lines += predictions.to_lines(about, result.answers, own.eval.metrics)
    return rows, lines


def print_table(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """One line per adapter, one column per number."""
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "adapter" else "right")
    for row in rows:
        table.add_row(row["adapter"], *(f"{x:.4f}" for key, x in row.items() if key != "adapter"))
    console.print(table)


def _note_prompt(console: Console, path: str, directory: Path, config: Config) -> None:
    """Say so if the adapter was trained with another prompt than it is measured with."""
    pairs: dict[str, Any] = {"chat_template_kwargs": formats.read_template_kwargs(directory)}
    if (system := formats.read_system_prompt(directory)) is not None:
        pairs["system_prompt"] = system
    for name, trained in pairs.items():
        if trained != (here := getattr(config.data, name)):
            console.print(
                f"note: {path} was trained with data.{name}={trained!r}, and is measured with "
                f"{here!r}"
            )
