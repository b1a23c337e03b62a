"""Checks of a run before anything slow starts."""

import contextlib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from rich.console import Console

from lora_jax import data, formats, hosts, sharding
from lora_jax.config import Config, expand, virtual_tokens
from lora_jax.data.sets import DataSet, check_vocabulary, training_sources
from lora_jax.errors import UserError, raise_all
from lora_jax.formats import fingerprint
from lora_jax.models.common import Model, attention_heads
from lora_jax.nn import kernels
from lora_jax.objectives.router import check_experts
from lora_jax.report import scores
from lora_jax.report.console import print_notes
from lora_jax.report.trackers import check_trackers
from lora_jax.session import Session
from lora_jax.train import directory
from lora_jax.train.evaluate import make_reader
from lora_jax.train.outputs import Run

_SHARED = 15.0  # seconds until a file written by one host must be visible on the others


def prepare(config: Config, held: contextlib.ExitStack) -> tuple[Run, Mesh, dict[str, Any] | None]:
    """Create the directories of a run and lock them until `held` ends. Return the run, the mesh,
    and the record of the checkpoint to resume from, if any.

    Raises:
        UserError: no training data; a metric or tracker whose package is missing; a mesh that does
            not fit the devices, the batch or the rows; an invalid shard size; directories that are
            in use, not writable or not shared by all hosts; as `directory.open_run`.
    """
    training_sources(config)
    mesh = sharding.make_mesh(config.mesh)
    check_settings(config, mesh)
    if config.train.optimizer_memory == "host" and sharding.host_memory(mesh) is None:
        raise UserError(
            f"train.optimizer_memory=host: {mesh.devices.flat[0].device_kind} cannot use host "
            "memory; use device"
        )
    run, record = directory.open_run(config, held)
    if jax.process_count() > 1 and isinstance(run.place, Path):
        _check_shared(run.output if config.checkpoint_dir is None else run.place)
    return run, mesh, record


def check_settings(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Check what depends on neither model nor data.

    Raises:
        UserError: a metric or tracker whose package is missing; a mesh that does not fit the batch
            or the rows; an invalid shard size.
    """
    scores.check_metrics(config.eval.metrics)
    check_trackers(config.train.report_to)
    micro = config.train.micro_batch_size
    sharding.check_batch(
        micro or config.train.batch_size, mesh, f"train.{'micro_' if micro else ''}batch_size"
    )
    sharding.check_batch(config.eval.batch_size, mesh, "eval.batch_size")
    sharding.check_length(config.data.max_length, mesh, "data.max_length")
    formats.parse_size(config.export.max_shard_size)


def _check_shared(directory: Path) -> None:
    """Raise if a host does not see what the main host writes to `directory`."""
    mark = directory / hosts.from_main(lambda: f".shared-{secrets.token_hex(4)}")
    hosts.from_main(lambda: mark.write_bytes(b""))
    until = time.monotonic() + _SHARED
    while not (seen := mark.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    seen_by_all = not hosts.agree(not seen)
    hosts.from_main(lambda: mark.unlink())
    if not seen:
        raise UserError(
            f"{str(directory)!r} is not the same directory on host {jax.process_index()} as on "
            "host 0: checkpoints need one that all hosts share, or a bucket; set checkpoint_dir"
        )
    if not seen_by_all:
        raise UserError(
            f"{str(directory)!r} is not the same directory on all hosts: checkpoints need one "
            "that they share, or a bucket; set checkpoint_dir"
        )


def check_attention(config: Config, model: Model, mesh: Mesh, console: Console) -> None:
    """Print notes on heads that the mesh cannot split.

    Raises:
        UserError: `train.attention` does not support this model, these devices or a prefix.
    """
    settings, device = config.train, mesh.devices.flat[0]
    if config.adapter.trains_prefix and settings.attention not in ("auto", "xla"):
        raise UserError(
            f"train.attention={settings.attention} does not read the keys and values of "
            "adapter.method=prefix; use auto or xla"
        )
    kernels.choose(settings.attention, model.config, settings.compute_dtype, device)
    print_notes(console, head_notes(model, mesh.shape["tensor"]))


def head_notes(model: Model, splits: int) -> Iterator[str]:
    """Yield a note on heads that a tensor axis of `splits` devices cannot split."""
    heads = model.config.num_attention_heads
    kv_heads = [n for n in sorted({n for n, _ in attention_heads(model.config)}) if n % splits]
    if heads % splits:
        yield (
            f"{heads} heads cannot be split over mesh.tensor={splits}; every device along it "
            "computes the attention of all of them"
        )
    elif kv_heads:
        yield (
            f"{' or '.join(map(str, kv_heads))} key and value heads cannot be split over "
            f"mesh.tensor={splits}; they are replicated, and only the heads of queries are split"
        )


def check_training(session: Session) -> None:
    """Raise if the model cannot be trained as the config says.

    Raises:
        UserError: as `Session.trainable`; adapters that `export.peft` could not write; a router
            loss for a model without routers.
    """
    config, model = session.config, session.model
    check_experts(model, config)
    trainable = session.trainable
    if config.export.peft and not config.adapter.trains_everything:
        problems = formats.peft_problems(trainable, model)
        raise_all([f"export.peft: {problem}" for problem in problems])


def check_fingerprint(session: Session, record: Mapping[str, Any] | None) -> None:
    """Compare tokenizer, template and base with those of the checkpoint, or of `adapter.path`.
    Without either, do not wait for the digest of the base.

    Raises:
        UserError: everything that differs, by name; as `Session.fingerprint`.
    """
    config = session.config
    if record is not None:
        stored, origin = record["fingerprint"], "the checkpoint"
    elif config.adapter.path is not None:
        origin = str(expand(config.adapter.path, "adapter.path"))
        stored = formats.read_fingerprint(Path(origin))
    else:
        return
    fingerprint.check(stored, session.fingerprint, origin, config.allow_change)


def check_metrics(session: Session, held_out: Mapping[str, DataSet]) -> None:
    """Raise if `eval.metrics` does not fit the held-out answers, or does not measure
    `train.metric_for_best_model`.
    """
    config = session.config
    best = config.train.metric_for_best_model
    known = (*config.train.metrics_without_answers, *config.eval.metrics)
    if best not in known:
        raise UserError(
            f"train.metric_for_best_model={best!r} is not measured; of this model, these are: "
            f"{', '.join(known)}"
        )
    task = held_out.get("task")
    if task is not None and config.eval.generate:
        reader = make_reader(config, session.model, session.tokenizer, task)
        rows = (row for row in task.rows if isinstance(row, data.Row))
        texts = (text for row in rows for text in reader.references([row]))
        scores.check_metrics(config.eval.metrics, texts)


def check_sizes(config: Config, model: Model, sets: Sequence[DataSet], console: Console) -> None:
    """Print a note on lengths beyond the model's, and check tokens by `check_vocabulary`.

    Raises:
        UserError: examples longer than a model with learned positions can read; unknown tokens.
    """
    positions = model.config.max_position_embeddings
    if (limit := model.learned_positions) is not None:
        adapter = config.adapter
        virtual = virtual_tokens(adapter) if adapter.trains_virtual_tokens else 0
        room = limit - (0 if adapter.prefix_gate else virtual)
        longest = limit if adapter.trains_prompt else room  # data.max_length counts these
        virtual_part = f", {virtual} of them for virtual tokens" if room < limit else ""
        data.raise_first(
            [
                f"{example.where}: {example.length} tokens, and {config.model} has positions for "
                f"{limit}{virtual_part}; set data.max_length to {longest} or less"
                for one in sets
                for example in one.examples
                if example.length > room
            ]
        )
    elif config.data.max_length > positions:
        console.print(
            f"note: data.max_length={config.data.max_length} is above the "
            f"max_position_embeddings={positions} that the model was made for"
        )
    examples = (example for one in sets for example in one.examples)
    check_vocabulary(examples, config.model, model.config.vocab_size)
