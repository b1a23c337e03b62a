"""Adapters to files that others load: a PEFT directory, or a merged Hugging Face directory."""

from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lora_jax import adapters as methods
from lora_jax import config as configs
from lora_jax import formats, tree
from lora_jax.adapters import bind, merge
from lora_jax.config import Config, UserError
from lora_jax.data import resolve_template, template_text
from lora_jax.formats import fingerprint
from lora_jax.models.common import Model
from lora_jax.quantize import SCHEMES
from lora_jax.sharding import make_mesh
from lora_jax.targets import find_trainable
from lora_jax.train import base, checkpoint
from lora_jax.train.model import describe


def own_template(config: Config) -> str | None:
    """The chat template that the run used in place of the tokenizer's, or None."""
    chosen = config.data.chat_template
    return None if chosen in (None, "none") else resolve_template(None, chosen)


def versions() -> dict[str, str]:
    """Of the packages that decide the numbers."""
    return {name: version(name) for name in ("lora_jax", "jax", "flax", "optax")}


def export_peft(
    target: Path,
    config: Config,
    model: Model,
    adapters: Mapping,
    prints: Mapping[str, str],
    profile: str | None = None,
) -> None:
    """Write a PEFT adapter directory with the tokenizer, template and fingerprint of the run."""
    formats.write_adapter(
        target,
        adapters,
        model.params,
        config.adapter,
        base_model=config.model,
        task_type="SEQ_CLS" if model.labels else "CAUSAL_LM",
        source=model.directory,
        chat_template=own_template(config),
        extra={
            "fingerprint": {name: prints[name] for name in fingerprint.PARTS},
            "versions": versions(),
            "seed": config.seed,
        },
        profile=profile,
    )


def export_merged(
    target: Path, config: Config, model: Model, adapters: Mapping, console: Console
) -> dict[str, Any]:
    """Write a Hugging Face model directory with the adapters merged in, in `export.dtype`, or the
    dtype of the base.

    Over a quantised base, `export.quantized_base` says what they are merged into. Returns how far
    either choice is from the model that was trained, |W - W_trained| / |W_trained| over all
    weights, under `merged_distance`; nothing over a plain base, or with the start of loftq, which
    leaves no choice.

    Raises:
        UserError: numbers that `export.dtype` cannot hold.
    """
    merged, report = merge(bind(model.params, adapters, config.adapter)), {}
    if config.base_dtype in SCHEMES and config.adapter.init != "loftq":
        mesh = make_mesh(config.mesh)
        original = formats.read_params(model.directory, model, mesh)
        own = methods.residual(original, adapters, config.adapter)
        other = merge(bind(own, adapters, config.adapter))
        report = {"original": _distance(other, merged), "dequantized": 0.0}
        console.print(
            f"merged into the original weights, the model is {report['original']:.2%} away from "
            "the one that was trained; into the dequantised ones, it is that one"
        )
        merged = other if config.export.quantized_base == "original" else merged
    formats.write_model(
        target,
        model,
        _cast(merged, model.params, config.export.dtype),
        model.directory,
        max_shard_size=config.export.max_shard_size,
        chat_template=own_template(config),
    )
    return {"merged_distance": report} if report else {}


def _distance(params: Mapping, trained: Mapping) -> float:
    """|params - trained| / |trained| over all weights, in float32."""

    @jax.jit
    def squares(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.stack([jnp.sum(jnp.square(x - y)), jnp.sum(jnp.square(y))])

    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True)
    apart, whole = np.sum([np.asarray(squares(x, y), np.float64) for x, y in pairs], axis=0)
    return float(np.sqrt(apart / whole))


def _cast(merged: Mapping, params: Mapping, dtype: str | None) -> dict:
    """Every weight in `dtype`, or in that of the base: what trained whole did so in float32."""
    leaves = tree.flatten(params)
    if dtype is None:
        dtypes = {path: leaf.dtype for path, leaf in leaves.items()}
    else:
        dtypes = dict.fromkeys(leaves, jnp.dtype(dtype))
    cast = {
        path: jax.tree.map(lambda x, path=path: x.astype(dtypes[path]), leaf)
        for path, leaf in tree.flatten(merged).items()
    }
    lost = [
        tree.dotted(path)
        for path, leaf in cast.items()
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(leaf))
    ]
    if lost:
        raise UserError(
            f"merged weights hold numbers that {dtype or 'their dtype'} cannot hold, in:\n  "
            + tree.summarize(lost)
        )
    return tree.unflatten(cast)


def load_run(directory: Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a run directory, with other settings of `export` if any are given.

    Raises:
        UserError: not a run directory; overrides of anything else.
    """
    other = [text for text in overrides if not text.startswith("export.")]
    if other:
        raise UserError(f"only settings of export can be given here, not {', '.join(other)}")
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} is no run directory: it has no config.yaml")
    return configs.load(directory / "config.yaml", overrides)


def export_run(
    run: Path,
    kind: str,
    output: Path,
    console: Console,
    allow_change: Collection[str] = (),
    overrides: Sequence[str] = (),
    profile: str | None = None,
) -> None:
    """Export the latest checkpoint of a run as `peft` or `hf`; with
    `train.load_best_model_at_end`, the best one. `overrides` are settings of `export`, as in
    `export.dtype=bfloat16`. `profile` names a program that shall load the adapter; without one, a
    line on the console says what would keep vLLM from it.

    Raises:
        UserError: no run, no checkpoint, a damaged one, `output` exists and is not empty, or base,
            tokenizer or template are not those of the run (unless named in `allow_change`); a
            profile that cannot load the adapter, or of a merged model.
    """
    config = load_run(run, overrides)
    if profile and kind != "peft":
        raise UserError(f"--profile {profile} is for --format peft; a merged model needs none")
    if kind == "peft" and config.adapter.method == "full":
        raise UserError(f"{run} trained the whole model: it has no adapter; use --format hf")
    if kind == "hf" and (problem := configs.merge_problem(config)):
        raise UserError(problem)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output} already exists and is not empty; choose another directory or remove it"
        )
    place = run / "checkpoints"
    record = checkpoint.read_record(place)
    source = formats.resolve(config.model)
    config, model = describe(config, source)
    tokenizer = formats.load_tokenizer(source)
    template = template_text(tokenizer, config.data.chat_template)
    found = fingerprint.take(source, tokenizer, template)
    fingerprint.check(record["fingerprint"], found, str(run), allow_change)
    best = record["watch"]["best_step"] if config.train.load_best_model_at_end else None
    shapes = methods.shapes(model.params, config.adapter)
    adapters, _, _ = checkpoint.restore(place, shapes, step=best)
    if kind == "peft":
        trainable = find_trainable(model.params, config.adapter)
        for problem in [] if profile else formats.serving_problems(trainable):
            console.print(f"note: {problem}")
        return export_peft(output, config, model, adapters, found, profile)
    params = base.load_under(config, source, model, make_mesh(config.mesh), adapters)
    export_merged(output, config, model.replace(params=params), adapters, console)
