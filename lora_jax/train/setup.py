"""What a run checks and reads before anything slow starts."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from lora_jax import data, demo, formats, sharding
from lora_jax.config import AdapterConfig, Config, UserError, raise_all
from lora_jax.models.common import Model

# org/name or org/name:split; a path to a missing .json or .jsonl file is no such name.
_HUB_NAME = re.compile(r"(?!.*\.jsonl?$)[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class DataSet:
    """Rows as they were read and as the model sees them."""

    rows: list[data.Row]
    examples: list[data.Example]
    system_prompt: str | None


def prepare(config: Config) -> tuple[Path, Mesh]:
    """The output directory, made and writable, and the mesh.

    Raises:
        UserError: no training data named; a mesh that does not fit the devices or the batch; a
            shard size that is none; an output directory that holds something or cannot be written.
    """
    if config.data.train is None:
        raise UserError(
            "data.train is not set: a .json or .jsonl file, a directory of them, or demo:usaddress"
        )
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
    if output.is_dir() and any(output.iterdir()):
        raise UserError(
            f"output_dir={str(output)!r} already holds a run or other files; choose another or "
            "remove it"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={str(output)!r} cannot be made: {error.strerror}") from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise UserError(f"output_dir={str(output)!r} is not writable")
    return output, mesh


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


def read_sets(
    config: Config, tokenizer: Any, console: Console
) -> tuple[DataSet, dict[str, DataSet]]:
    """The training set, and the held-out sets (`task`, `regression`) that the config names."""
    names = {"train": "train", "task": "eval", "regression": "regression"}
    sets = {
        name: _read_set(field, config, tokenizer, console)
        for name, field in names.items()
        if getattr(config.data, field) is not None
    }
    return sets.pop("train"), sets


def _read_set(field: str, config: Config, tokenizer: Any, console: Console) -> DataSet:
    """Rows and examples of data.FIELD. What was cut or dropped is printed, not silent."""
    spec, limit = getattr(config.data, field), config.data.max_length
    if spec.startswith("demo:"):
        rows = data.read_rows(demo.path(spec.removeprefix("demo:")))
    elif _HUB_NAME.fullmatch(spec) and not Path(spec).exists():
        rows = data.read_hub_rows(spec)
    else:
        rows = data.read_rows(Path(spec).expanduser())
    system_prompt = None if field == "regression" else config.data.system_prompt
    examples, counts = data.encode_all(
        rows,
        tokenizer,
        system_prompt=system_prompt,
        chat_template=config.data.chat_template,
        max_length=limit,
        too_long=config.data.too_long,
    )
    share = counts.supervised_tokens / counts.total_tokens
    notes = [
        f"data.{field}: {counts.examples:,} examples",
        f"{counts.total_tokens:,} tokens, {share:.0%} supervised",
    ]
    if counts.truncated:
        notes.append(f"{counts.truncated} cut to {limit} tokens (the longest has {counts.longest})")
    if counts.dropped:
        notes.append(f"{counts.dropped} dropped as longer than {limit} tokens")
    if counts.unaligned:
        notes.append(f"{counts.unaligned} whose prompt alone splits into other tokens")
    console.print("; ".join(notes))
    kept = {example.where for example in examples}
    return DataSet([row for row in rows if row.where in kept], examples, system_prompt)


def make_loader(config: Config, train_set: DataSet, console: Console) -> data.Loader:
    """The batches of the run."""
    rows, settings = config.train.batch_size, config.data
    loader = data.Loader(
        train_set.examples,
        rows,
        settings.max_length,
        settings.packing,
        settings.shuffle,
        config.seed,
    )
    console.print(
        f"{config.train.steps} steps of {rows} rows x {loader.row_length} tokens, "
        f"{loader.efficiency:.0%} filled, {loader.rows_per_epoch} rows an epoch"
    )
    return loader


def check_sizes(config: Config, model: Model, sets: Sequence[DataSet], console: Console) -> None:
    """Raise if the tokenizer makes tokens that the model has no embedding for."""
    largest = max(int(example.tokens.max()) for one in sets for example in one.examples)
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
