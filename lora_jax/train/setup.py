"""What a run checks and reads before anything slow starts."""

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from lora_jax import data, formats, sharding
from lora_jax.config import AdapterConfig, Config, UserError, raise_all
from lora_jax.formats import fingerprint
from lora_jax.models.common import Model
from lora_jax.train import resume, scores
from lora_jax.train.metrics import LOGS
from lora_jax.train.sets import DataSet, training_sources
from lora_jax.train.sinks import check_sinks


def prepare(config: Config) -> tuple[Path, Mesh, dict[str, Any] | None]:
    """The output directory, made and writable, the mesh, and the record of the checkpoint that the
    run goes on from, if there is one.

    Raises:
        UserError: no training data named; a metric or sink whose package is missing; a mesh that
            does not fit the devices or the batch; a shard size that is none; an output directory
            that holds something or cannot be written; as `resume.find_record`.
    """
    training_sources(config)
    if jax.process_count() > 1:
        raise UserError(
            f"this is one of {jax.process_count()} processes; a run writes its files from one, "
            "over all devices of one host"
        )
    scores.check(config.eval.metrics)
    check_sinks(config.train.report_to)
    mesh = sharding.make_mesh(config.mesh)
    micro = config.train.micro_batch_size
    sharding.check_batch(
        micro or config.train.batch_size, mesh, f"train.{'micro_' if micro else ''}batch_size"
    )
    sharding.check_batch(config.eval.batch_size, mesh, "eval.batch_size")
    formats.parse_size(config.export.max_shard_size)
    output = Path(config.output_dir).expanduser()
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir={str(output)!r} is a file; choose a directory")
    record = resume.find_record(config, output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={str(output)!r} cannot be made: {error.strerror}") from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise UserError(f"output_dir={str(output)!r} is not writable")
    return output, mesh, record


def continue_adapter(config: Config, model: Model) -> tuple[Config, Mapping | None]:
    """With `adapter.path`, the config with that adapter's settings, and its weights; otherwise the
    config as it is.

    Raises:
        UserError: files that do not fit the model, or settings that contradict the adapter's.
    """
    if config.adapter.path is None:
        return config, None
    adapters, found = formats.read_adapter(Path(config.adapter.path).expanduser(), model.params)
    given, default = config.adapter, AdapterConfig()
    free = {"path", "dropout"}
    problems, kept = [], {"path": given.path, "dropout": given.dropout}
    for field in dataclasses.fields(AdapterConfig):
        mine, theirs = getattr(given, field.name), getattr(found, field.name)
        if field.name not in free and mine != getattr(default, field.name) and mine != theirs:
            if not field.name.endswith("_modules"):  # compared by what they select, below
                problems.append(
                    f"adapter.{field.name}={mine!r} contradicts {given.path}, which has "
                    f"{theirs!r}; leave it out"
                )
    raise_all(problems)
    return dataclasses.replace(config, adapter=dataclasses.replace(found, **kept)), adapters


def take_fingerprint(
    config: Config, source: Path, tokenizer: Any, record: Mapping[str, Any] | None
) -> dict[str, str]:
    """The fingerprint of base, tokenizer and template, after a comparison with those of the
    checkpoint and of `adapter.path`.

    Raises:
        UserError: what differs, by name.
    """
    template = data.template_text(tokenizer, config.data.chat_template)
    found = fingerprint.take(source, tokenizer, template)
    if record is not None:
        fingerprint.check(record["fingerprint"], found, "the checkpoint", config.allow_change)
    elif config.adapter.path is not None:
        path = Path(config.adapter.path).expanduser()
        stored = formats.read_fingerprint(path)
        fingerprint.check(stored, found, str(path), config.allow_change)
    return found


def clear_logs(output: Path) -> None:
    """Remove what a run that was killed before its first checkpoint has written."""
    for name in LOGS:
        (output / name).unlink(missing_ok=True)


def remove_exports(output: Path) -> None:
    """Remove earlier exports of this very run, and what a kill left of one that was under way."""
    for pattern in ("adapter", "merged", ".adapter-*", ".merged-*"):
        for directory in output.glob(pattern):
            shutil.rmtree(directory)


def check_metrics(config: Config, held_out: Mapping[str, DataSet]) -> None:
    """Raise if the held-out answers are not what `eval.metrics` compares."""
    if "task" in held_out and config.eval.generate:
        rows = (row for row in held_out["task"].rows if isinstance(row, data.Row))
        scores.check(config.eval.metrics, [data.reference(row) for row in rows])


def check_sizes(config: Config, model: Model, sets: Sequence[DataSet], console: Console) -> None:
    """Raise if the tokenizer makes tokens that the model has no embedding for."""
    largest = max(
        (int(example.tokens.max()) for one in sets for example in one.examples), default=0
    )
    if largest >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {config.model} makes token {largest}, "
            f"and the model's vocab_size is {model.config.vocab_size}: they do not belong together"
        )
    positions = model.config.max_position_embeddings
    if config.data.max_length > positions:
        console.print(
            f"note: data.max_length={config.data.max_length} is above the "
            f"max_position_embeddings={positions} that the model was made for"
        )
