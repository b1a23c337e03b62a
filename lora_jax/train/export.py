"""Adapters to files that others load: a PEFT directory, or a merged Hugging Face directory."""

from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp

from lora_jax import config as configs
from lora_jax import formats
from lora_jax.adapters import bind, init, merge
from lora_jax.config import Config, UserError
from lora_jax.data import resolve_template, template_text
from lora_jax.formats import fingerprint
from lora_jax.models.common import Model
from lora_jax.sharding import make_mesh
from lora_jax.train import checkpoint


def own_template(config: Config) -> str | None:
    """The chat template that the run used in place of the tokenizer's, or None."""
    chosen = config.data.chat_template
    return None if chosen in (None, "none") else resolve_template(None, chosen)


def versions() -> dict[str, str]:
    """Of the packages that decide the numbers."""
    return {name: version(name) for name in ("lora_jax", "jax", "flax", "optax")}


def export_peft(
    target: Path, config: Config, model: Model, adapters: Mapping, prints: Mapping[str, str]
) -> None:
    """Write a PEFT adapter directory with the tokenizer, template and fingerprint of the run."""
    formats.write_adapter(
        target,
        adapters,
        model.params,
        config.adapter,
        base_model=config.model,
        source=model.directory,
        chat_template=own_template(config),
        extra={
            "fingerprint": {name: prints[name] for name in fingerprint.PARTS},
            "versions": versions(),
            "seed": config.seed,
        },
    )


def export_merged(target: Path, config: Config, model: Model, adapters: Mapping) -> None:
    """Write a Hugging Face model directory with the adapters merged in, in the dtype of the
    base.
    """
    formats.write_model(
        target,
        model,
        merge(bind(model.params, adapters, config.adapter)),
        model.directory,
        max_shard_size=config.export.max_shard_size,
        chat_template=own_template(config),
    )


def load_run(directory: Path) -> Config:
    """The resolved config of a run directory.

    Raises:
        UserError: not a run directory.
    """
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} is no run directory: it has no config.yaml")
    return configs.load(directory / "config.yaml")


def export_run(run: Path, kind: str, output: Path, allow_change: Collection[str] = ()) -> None:
    """Export the latest checkpoint of a run as `peft` or `hf`; with
    `train.load_best_model_at_end`, the best one.

    Raises:
        UserError: no run, no checkpoint, a damaged one, `output` exists and is not empty, or base,
            tokenizer or template are not those of the run (unless named in `allow_change`).
    """
    config = load_run(run)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output} already exists and is not empty; choose another directory or remove it"
        )
    place = run / "checkpoints"
    record = checkpoint.read_record(place)
    source = formats.resolve(config.model)
    model = formats.describe(source, config.ignore_config_fields)
    tokenizer = formats.load_tokenizer(source)
    template = template_text(tokenizer, config.data.chat_template)
    found = fingerprint.take(source, tokenizer, template)
    fingerprint.check(record["fingerprint"], found, str(run), allow_change)
    best = record["watch"]["best_step"] if config.train.load_best_model_at_end else None
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), model.params, config.adapter)[1])
    adapters, _, _ = checkpoint.restore(place, shapes, step=best)
    if kind == "peft":
        return export_peft(output, config, model, adapters, found)
    mesh = make_mesh(config.mesh)
    dtype = None if config.base_dtype is None else jnp.dtype(config.base_dtype)
    params = formats.read_params(source, model, mesh, dtype)
    export_merged(output, config, model.replace(params=params), adapters)
