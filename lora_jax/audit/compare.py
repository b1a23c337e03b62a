"""Comparison of adapters and their base on the same held-out data."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from lora_jax import adapters as methods
from lora_jax import formats, sharding
from lora_jax.config import AdapterConfig, Config, expand, is_directory, shown
from lora_jax.data import sets
from lora_jax.errors import UserError, raise_all
from lora_jax.formats import fingerprint
from lora_jax.models.common import Model
from lora_jax.report import scores
from lora_jax.report.console import print_notes
from lora_jax.report.progress import Display
from lora_jax.session import Session, open_session, settle_date
from lora_jax.train import base, base_scores, predictions, setup
from lora_jax.train.evaluate import make_evaluator
from lora_jax.train.scored import Scores
from lora_jax.train.strength import check_scale, with_strength


def compare(
    config: Config,
    paths: Sequence[str],
    console: Console,
    allow_change: Collection[str] = (),
    scales: Sequence[float] = (),
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure the base and every PEFT adapter directory in `paths` on the same held-out data.
    Return a mapping of losses and metrics for each, with its name as `adapter`, and a mapping per
    answer, as in `predictions`. With `scales`, each adapter is measured at these multiples of its
    update, and both mappings have the `scale`.

    `config` gives the model, the held-out data and the settings of the evaluation. With
    `eval.before` false, the base is left out.

    Raises:
        UserError: no held-out data; nothing to measure; adapters that do not exist or fit, or were
            made with another base, tokenizer or template (unless named in `allow_change`).
    """
    _check_request(config, paths, scales)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.eval.batch_size, mesh, "eval.batch_size")
    session = open_session(config)
    print_notes(console, session.model.notes)
    session = settle_date(session, console)
    display = Display(console)
    with display.phase("checking the model's files"):
        found = session.fingerprint
    adapters = _read_adapters(session, paths, found, console, allow_change)
    encoder = session.make_encoder(console)
    with display.phase("reading the data"):
        held_out = sets.read_held_out(session.config, encoder)
    setup.check_metrics(session, held_out)
    console.print(f"loading {config.model}")
    base_dtype = session.config.base_dtype
    params = base.read_params(session.source, session.model, mesh, base_dtype, display)
    loaded = Loaded(session, session.model.replace(params=params), held_out, mesh, display, found)
    results: list[tuple[dict[str, Any], Scores]] = []
    if config.eval.before:
        is_base = {"adapter": "base"} | ({"scale": 0.0} if scales else {})
        results.append((is_base, loaded.measure_base()))
    for path, own in adapters.items():
        if not scales:
            results.append(({"adapter": path}, loaded.measure(path, *own)))
        for scale in scales:
            result = loaded.measure(f"{path} at {scale:g}", *_at(session, scale, *own))
            results.append(({"adapter": path, "scale": scale}, result))
    names = session.config.eval.metrics
    rows = [name | result.numbers() for name, result in results]
    lines = [
        line
        for name, result in results
        for line in predictions.to_lines(name, result.answers, names)
    ]
    return rows, lines


def _check_request(config: Config, paths: Sequence[str], scales: Sequence[float]) -> None:
    """Check what needs no file, before anything slow."""
    scores.check_metrics(config.eval.metrics)
    if not (config.eval.before or paths):
        raise UserError(
            "nothing to measure: eval.before=false leaves out the base, and no adapter is given"
        )
    for scale in scales:
        check_scale(scale)


def _at(
    session: Session, scale: float, weights: Any, settings: AdapterConfig
) -> tuple[Any, AdapterConfig]:
    """Return adapters with `scale` times their update."""
    if scale == 1:
        return weights, settings
    made = with_strength(session.source, session.model, weights, settings, scale)
    return made.adapters, made.config


@dataclass(frozen=True)
class Loaded:
    """A base and held-out data that adapters are measured on.

    model: with its weights
    fingerprint: digests of base, tokenizer and template
    """

    session: Session
    model: Model
    held_out: Mapping[str, sets.DataSet]
    mesh: Mesh
    display: Display
    fingerprint: Mapping[str, str]

    def measure_base(self) -> Scores:
        """Measure the base: fresh adapters of plain LoRA change nothing."""
        plain = AdapterConfig(rank=1)
        fresh = methods.init(jax.random.key(0), self.model.params, plain)[1]
        return self.measure("base", fresh, plain, is_base=True)

    def measure(
        self, name: str, adapters: Any, settings: AdapterConfig, is_base: bool = False
    ) -> Scores:
        """Measure adapters and print their scores. Those of the base may be known already."""
        config = dataclasses.replace(self.session.config, adapter=settings)
        tokenizer, console = self.session.tokenizer, self.display.console
        evaluator = make_evaluator(
            config, self.model, tokenizer, self.held_out, self.mesh, self.display
        )
        params, rules = self.model.params, self.model.rules
        specs = sharding.adapter_specs(adapters, params, rules, self.mesh)
        with jax.set_mesh(self.mesh):
            placed = sharding.place(adapters, specs, self.mesh)
            if is_base:
                result = base_scores.measure(evaluator, placed, self.fingerprint, console.print)
            else:
                with self.display.about(name):
                    result = evaluator.score(placed)
        console.print(f"{name}: {result.describe()}")
        return result


def _read_adapters(
    session: Session,
    paths: Sequence[str],
    found: Mapping[str, str],
    console: Console,
    allow_change: Collection[str],
) -> dict[str, tuple[Any, AdapterConfig]]:
    """Return weights and settings of adapters by path. `found` is the fingerprint of the base."""
    directories = {path: expand(path, "adapter") for path in paths}
    raise_all(
        [
            f"adapter {shown(repr(path))} does not exist, or is no directory; give a PEFT "
            "adapter directory"
            for path, directory in directories.items()
            if not is_directory(directory, f"adapter {path!r}")
        ]
    )
    adapters = {}
    for path, directory in directories.items():
        adapters[path] = formats.read_adapter(directory, session.model.params, session.model)
        stored = formats.read_fingerprint(directory)
        fingerprint.check(stored, found, path, allow_change)
        if stored:  # else another tool wrote it, and recorded neither
            _note_prompt(console, path, directory, session.config)
    return adapters


def print_table(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a line per adapter with a column per loss and metric."""
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "adapter" else "right")
    for row in rows:
        shown = {"adapter": str, "scale": "{:g}".format}
        table.add_row(*(shown.get(key, "{:.4f}".format)(x) for key, x in row.items()))
    console.print(table)


def _note_prompt(console: Console, path: str, directory: Path, config: Config) -> None:
    """Print a note if an adapter is measured with another prompt than in training."""
    pairs: dict[str, Any] = {"chat_template_kwargs": formats.read_template_kwargs(directory)}
    if (system := formats.read_system_prompt(directory)) is not None:
        pairs["system_prompt"] = system
    for name, trained in pairs.items():
        if trained != (here := getattr(config.data, name)):
            console.print(
                f"note: {path} was trained with data.{name}={trained!r}, and is measured with "
                f"{here!r}"
            )
