"""Adapters to files that others load: a PEFT directory, or a merged Hugging Face directory."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp

from lora_jax import config as configs
from lora_jax import formats
from lora_jax.adapters import bind, init, merge
from lora_jax.config import Config, UserError
from lora_jax.data import resolve_template
from lora_jax.models.common import Model
from lora_jax.sharding import make_mesh
from lora_jax.train import checkpoint


def own_template(config: Config) -> str | None:
    """The chat template that the run used in place of the tokenizer's, or None."""
    chosen = config.data.chat_template
    return None if chosen in (None, "none") else resolve_template(None, chosen)


def export_peft(target: Path, config: Config, model: Model, adapters: Mapping) -> None:
    """Write a PEFT adapter directory with the tokenizer and template that the run used."""
    formats.write_adapter(
        target,
        adapters,
        model.params,
        config.adapter,
        base_model=config.model,
        source=model.directory,
        chat_template=own_template(config),
        extra={
            "versions": {name: version(name) for name in ("lora_jax", "jax", "flax")},
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


def export_run(run: Path, kind: str, output: Path) -> None:
    """Export the latest checkpoint of a run as `peft` or `hf`.

    Raises:
        UserError: no run, no checkpoint, or `output` exists and is not empty.
    """
    config = load_run(run)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output} already exists and is not empty; choose another directory or remove it"
        )
    source = formats.resolve(config.model, weights=kind == "hf")
    model = formats.describe(source, config.ignore_config_fields)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), model.params, config.adapter)[1])
    adapters, _, _ = checkpoint.restore(run / "checkpoints", shapes)
    if kind == "peft":
        return export_peft(output, config, model, adapters)
    mesh = make_mesh(config.mesh)
    dtype = None if config.base_dtype is None else jnp.dtype(config.base_dtype)
    params = formats.read_params(source, model, mesh, dtype)
    export_merged(output, config, model.replace(params=params), adapters)
