"""Export of a run's adapters merged into its base: a Hugging Face directory with a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from lora_jax import adapters as methods
from lora_jax import formats, tree
from lora_jax.adapters import bind, merge
from lora_jax.config import Config, expand
from lora_jax.data import Example
from lora_jax.errors import UserError
from lora_jax.models.common import Model
from lora_jax.quantize import SCHEMES
from lora_jax.report import card
from lora_jax.report import merge as merge_report
from lora_jax.sharding import make_mesh
from lora_jax.targets import Trainable, find_trainable
from lora_jax.train import probe
from lora_jax.train.facts import NO_FACTS, Facts, own_template, versions
from lora_jax.weights import materialize, widen


def export_merged(
    target: str | Path,
    config: Config,
    model: Model,
    adapters: Mapping,
    console: Console,
    examples: Sequence[Example] = (),
    facts: Facts = NO_FACTS,
) -> dict[str, Any]:
    """Write a Hugging Face model directory with the adapters merged in, in `export.dtype` or the
    dtype of the base. The directory has a model card and the report of the merge, measured on the
    weights and on `examples` (from `probe`). Its generation config adds the stop tokens of `facts`.

    Over a quantised base, `export.quantized_base` chooses the weights that the adapters are merged
    into. Return entries of the summary: the figures of the report as `merge` and, over such a base,
    `merged_distance`, the distance of either choice from the trained model, |W - W_trained| /
    |W_trained| over all weights. `init=loftq` has no such choice and no `merged_distance`.

    Raises:
        UserError: values that `export.dtype` cannot hold; a merge that `export.min_merge_cosine`
            or `export.max_merge_kl` refuses, or the latter without examples. Nothing is written.
    """
    with jax.set_mesh(make_mesh(config.mesh)):
        merged, report, summary = merge_with_report(config, model, adapters, console, examples)
        _write(expand(target), config, model, merged, report, facts)
    return summary


def merge_with_report(
    config: Config,
    model: Model,
    adapters: Mapping,
    console: Console,
    examples: Sequence[Example] = (),
) -> tuple[Mapping, merge_report.Report, dict[str, Any]]:
    """Merge within the mesh of the run, and print the report. Return the weights, the report and
    the entries of the summary, which are those of `export_merged`.

    Raises:
        UserError: as `export_merged`.
    """
    settings, mesh = config.export, make_mesh(config.mesh)
    if settings.max_merge_kl is not None and not examples:
        raise UserError(
            f"export.max_merge_kl={settings.max_merge_kl:g} is measured on rows of data.eval or "
            "data.train, and there are none; leave it out"
        )
    summary: dict[str, Any] = {}
    trainable = find_trainable(model.params, config.adapter)
    live = bind(model.params, adapters, trainable)
    start = _start(config, model, adapters, trainable, mesh)
    bound, before = live, start  # the tree to merge, and the tree before the first step
    if config.base_dtype in SCHEMES and config.adapter.init != "loftq":
        own = methods.residual(
            formats.read_params(model.directory, model, mesh), adapters, trainable
        )
        other = bind(own, adapters, trainable)
        summary["merged_distance"] = _compare_bases(other, live, console)
        if settings.quantized_base == "original":
            bound, before = other, methods.initial_params(own, adapters, trainable)
    merged = _merge(bound, model.params, settings.dtype)
    report = merge_report.Report(
        dtype=_dtypes(merged),
        modules=merge_report.measure(trainable, bound, before, merged),
        kl=_measure_kl(config, model, live, merged, start, examples, mesh),
        probe_rows=len(examples),
    )
    merge_report.print_report(report, console)
    merge_report.check(report, settings)
    return merged, report, {"merge": merge_report.summarize(report), **summary}


def _write(
    target: Path,
    config: Config,
    model: Model,
    merged: Mapping,
    report: merge_report.Report,
    facts: Facts,
) -> None:
    """Write the directory, with the report and the model card in it."""
    text = card.of_model(config, model, facts.results, versions())

    with formats.new_directory_on_main(target) as directory:
        formats.write_model_files(
            directory,
            model,
            merged,
            model.directory,
            max_shard_size=config.export.max_shard_size,
            chat_template=own_template(config),
            stops=facts.stops,
        )
        if directory is not None:
            merge_report.write(report, directory)
            (directory / "README.md").write_text(text, encoding="utf-8")


def _compare_bases(original: Mapping, live: Mapping, console: Console) -> dict[str, float]:
    """Print and return the distance from the live model to the one over the original weights."""
    far = _distance(merge(original), merge(live))
    console.print(
        f"merged into the original weights, the model is {far:.2%} away from the one that "
        "was trained; into the dequantised ones, it is that one"
    )
    return {"original": far, "dequantized": 0.0}


def _start(
    config: Config, model: Model, adapters: Mapping, trainable: Trainable, mesh: Mesh
) -> Mapping:
    """Return the parameters of the model before the first step."""
    if config.adapter.trains_everything:  # it holds the trained weights alone
        return formats.read_params(model.directory, model, mesh, config.base_dtype)
    return methods.initial_params(model.params, adapters, trainable)


def _measure_kl(
    config: Config,
    model: Model,
    live: Mapping,
    merged: Mapping,
    start: Mapping,
    examples: Sequence[Example],
    mesh: Mesh,
) -> dict[str, float] | None:
    """Return the KL divergence of the live model from the merged one and from the base."""
    if not examples:
        return None
    return probe.divergences(
        model,
        live,
        {"merged": merged, "base": start},
        examples,
        mesh,
        batch_size=config.eval.batch_size,
        # Logits of two models, and what is computed from them, are in memory at once.
        chunk=-(-config.train.loss_chunk // 4),
    )


def _distance(params: Mapping, trained: Mapping) -> float:
    """Return |params - trained| / |trained| over all weights, in float32."""

    @jax.jit
    def squares(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.stack([jnp.sum(jnp.square(x - y)), jnp.sum(jnp.square(y))])

    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True)
    apart, total = np.sum([np.asarray(squares(x, y), np.float64) for x, y in pairs], axis=0)
    return float(np.sqrt(apart / total))


def _merge(bound: Mapping, params: Mapping, dtype: str | None) -> dict:
    """Return every weight in `dtype`, or in that of the base. Adapted and trained weights are
    added in float32 and rounded once.
    """
    given = None if dtype is None else jnp.dtype(dtype)
    dtypes = {path: given or leaf.dtype for path, leaf in tree.flatten(params).items()}
    merged = {
        path: jax.tree.map(lambda x, path=path: x.astype(dtypes[path]), _exact(leaf))
        for path, leaf in tree.flatten(bound).items()
    }
    lost = [
        tree.dotted(path)
        for path, leaf in merged.items()
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(leaf))
    ]
    if lost:
        raise UserError(
            f"merged weights hold values that {dtype or 'their dtype'} cannot hold, in:\n  "
            + tree.summarize(lost)
        )
    return tree.unflatten(merged)


def _exact(leaf: Any) -> Any:
    """Return a trained weight without rounding; a plain one is returned unchanged."""
    return leaf if isinstance(leaf, jax.Array) else materialize(widen(leaf))


def _dtypes(merged: Mapping) -> str:
    return ", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(merged)}))
