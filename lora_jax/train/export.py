"""Adapters to files that others load: a PEFT directory, or a merged Hugging Face directory."""

from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from lora_jax import adapters as methods
from lora_jax import config as configs
from lora_jax import formats, hosts, tree
from lora_jax.adapters import bind, merge
from lora_jax.config import Config, expand
from lora_jax.data import Example, resolve_template, template_text
from lora_jax.errors import UserError, raise_all
from lora_jax.formats import fingerprint
from lora_jax.models.common import Model
from lora_jax.quantize import SCHEMES
from lora_jax.report import card
from lora_jax.report import merge as merge_report
from lora_jax.sharding import make_mesh, whole
from lora_jax.targets import find_trainable
from lora_jax.train import base, checkpoint, probe, sets
from lora_jax.train.model import describe, find_stops
from lora_jax.weights import materialize, widen


def own_template(config: Config) -> str | None:
    """The chat template that the run used in place of the tokenizer's, or None."""
    chosen = config.data.chat_template
    return None if chosen in (None, "none") else resolve_template(None, chosen)


def versions() -> dict[str, str]:
    """Versions of the packages that affect numerical results."""
    return {name: version(name) for name in ("lora_jax", "jax", "flax", "optax")}


def export_peft(
    target: str | Path,
    config: Config,
    model: Model,
    adapters: Mapping,
    prints: Mapping[str, str],
    profile: str | None = None,
    stops: Collection[int] = (),
    results: card.Results | None = None,
) -> None:
    """Write a PEFT adapter directory with the tokenizer, templates and fingerprint of the run, a
    model card with its `results`, and under `eos_token_id` in lora_jax.json the ids that end an
    answer.
    """
    target = expand(target)
    adapters = jax.tree.map(whole, adapters)
    if not hosts.is_main():
        return
    found = find_trainable(model.params, config.adapter)
    ranks = [rank for one in found.targets for rank in one.ranks]
    problems = [] if profile else formats.serving_problems(found)
    formats.write_adapter(
        target,
        adapters,
        model.params,
        config.adapter,
        base_model=formats.public_name(config.model),
        task_type="SEQ_CLS" if model.labels else "CAUSAL_LM",
        source=model.directory,
        chat_template=own_template(config),
        extra={
            "base_model": config.model,
            "fingerprint": {name: prints[name] for name in fingerprint.PARTS},
            "versions": versions(),
            "seed": config.seed,
            "chat_template_kwargs": config.data.chat_template_kwargs,
            "system_prompt": config.data.system_prompt,
            **({"eos_token_id": sorted(stops)} if stops else {}),
        },
        profile=profile,
        card=card.of_adapter(config, model, max(ranks, default=0), problems, results, versions()),
    )


def describe_stops(model: Model, tokenizer: Any, stops: Collection[int]) -> list[str]:
    """A note on the ids that end an answer of the run and no generation of its base, if any."""
    known = formats.generation_stops(model.directory) if stops else []
    added = sorted(set(stops) - set(known))
    if not added:
        return []
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in added)
    return [
        f"answers end with {names}, which generation_config.json of the base does not name: pass "
        f"eos_token_id={[*known, *added]} to `generate` of transformers, and "
        f"stop_token_ids={added} to vLLM; a merged export names them itself"
    ]


def export_merged(
    target: str | Path,
    config: Config,
    model: Model,
    adapters: Mapping,
    console: Console,
    examples: Sequence[Example] = (),
    stops: Collection[int] = (),
    results: card.Results | None = None,
) -> dict[str, Any]:
    """Write a Hugging Face model directory with the adapters merged in, in `export.dtype`, or the
    dtype of the base, and next to the weights what `merge_report` measures of them, and of
    `examples`, those of `probe`, and a model card with the `results` of the run. Its generation
    config ends an answer at `stops` too.

    Over a quantised base, `export.quantized_base` says what they are merged into. Returns, for the
    summary, the figures of the report under `merge`, and over such a base `merged_distance`: how
    far either choice is from the model that was trained, |W - W_trained| / |W_trained| over all
    weights; not with the start of loftq, which leaves no choice.

    Raises:
        UserError: numbers that `export.dtype` cannot hold; a merge that `export.min_merge_cosine`
            or `export.max_merge_kl` refuses, or the latter without examples. Nothing is written.
    """
    target = expand(target)
    settings, mesh, summary = config.export, make_mesh(config.mesh), {}
    if settings.max_merge_kl is not None and not examples:
        raise UserError(
            f"export.max_merge_kl={settings.max_merge_kl:g} is measured on rows of data.eval or "
            "data.train, and there are none; leave it out"
        )
    with jax.set_mesh(mesh):
        live = bind(model.params, adapters, config.adapter)
        start = _start(config, model, adapters, mesh)
        bound, before = live, start  # what is merged, and the same before the first step
        if config.base_dtype in SCHEMES and config.adapter.init != "loftq":
            own = methods.residual(
                formats.read_params(model.directory, model, mesh), adapters, config.adapter
            )
            other = bind(own, adapters, config.adapter)
            far = _distance(merge(other), merge(live))
            summary["merged_distance"] = {"original": far, "dequantized": 0.0}
            console.print(
                f"merged into the original weights, the model is {far:.2%} away from the one that "
                "was trained; into the dequantised ones, it is that one"
            )
            if settings.quantized_base == "original":
                bound, before = other, methods.started(own, adapters, config.adapter)
        merged = _merge(bound, model.params, settings.dtype)
        found = find_trainable(model.params, config.adapter)
        report = merge_report.Report(
            dtype=_dtypes(merged),
            modules=merge_report.measure(found, bound, before, merged),
            kl=_measure_kl(config, model, live, merged, start, examples, mesh),
            probe_rows=len(examples),
        )
        merge_report.print_report(report, console)
        merge_report.check(report, settings)
        text = card.of_model(config, model, results, versions())

        with formats.new_directory_on_main(target) as directory:
            formats.write_model_files(
                directory,
                model,
                merged,
                model.directory,
                max_shard_size=settings.max_shard_size,
                chat_template=own_template(config),
                stops=stops,
            )
            if directory is not None:
                merge_report.write(report, directory)
                (directory / "README.md").write_text(text, encoding="utf-8")
    return {"merge": merge_report.summarize(report), **summary}


def _start(config: Config, model: Model, adapters: Mapping, mesh: Mesh) -> Mapping:
    """The model before the first step."""
    if config.adapter.method == "full":  # it holds the trained weights alone
        return formats.read_params(model.directory, model, mesh, config.base_dtype)
    return methods.started(model.params, adapters, config.adapter)


def _measure_kl(
    config: Config,
    model: Model,
    live: Mapping,
    merged: Mapping,
    start: Mapping,
    examples: Sequence[Example],
    mesh: Mesh,
) -> dict[str, float] | None:
    if not examples:
        return None
    return probe.divergences(
        model,
        live,
        {"merged": merged, "base": start},
        examples,
        mesh,
        batch_size=config.eval.batch_size,
        # The logits of two models stand there at once, and what is made of them.
        chunk=-(-config.train.loss_chunk // 4),
    )


def _distance(params: Mapping, trained: Mapping) -> float:
    """|params - trained| / |trained| over all weights, in float32."""

    @jax.jit
    def squares(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.stack([jnp.sum(jnp.square(x - y)), jnp.sum(jnp.square(y))])

    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True)
    apart, whole = np.sum([np.asarray(squares(x, y), np.float64) for x, y in pairs], axis=0)
    return float(np.sqrt(apart / whole))


def _merge(bound: Mapping, params: Mapping, dtype: str | None) -> dict:
    """Every weight in `dtype`, or in that of the base: added in float32, where it is adapted or
    trained whole, and rounded once.
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
            f"merged weights hold numbers that {dtype or 'their dtype'} cannot hold, in:\n  "
            + tree.summarize(lost)
        )
    return tree.unflatten(merged)


def _exact(leaf: Any) -> Any:
    """The weight that trained, not rounded; a plain one as it is."""
    return leaf if isinstance(leaf, jax.Array) else materialize(widen(leaf))


def _dtypes(merged: Mapping) -> str:
    return ", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(merged)}))


def load_run(directory: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a run directory, with other settings of `export` if any are given.

    Raises:
        UserError: not a run directory; overrides of anything else.
    """
    directory = expand(directory)
    other = [text for text in overrides if not text.startswith("export.")]
    if other:
        raise UserError(f"only settings of export can be given here, not {', '.join(other)}")
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} is no run directory: it has no config.yaml")
    return configs.load(directory / "config.yaml", overrides)


def _read_results(run: Path, step: int) -> card.Results | None:
    """The scores in summary.json, if they are those of the exported step."""
    file = run / "summary.json"
    found = configs.read_json(file) if file.is_file() else {}
    return found if found.get("exported_step") == step else None


def _read_probe(config: Config, encoder: sets.Encoder) -> list[Example]:
    """The rows of the run, which need not be where they were: unless `export.max_merge_kl` asks for
    them, a line says so and there are none.
    """
    try:
        return probe.read(config, encoder)
    except UserError as error:
        reason = str(error).splitlines()[0]
        if config.export.max_merge_kl is not None:
            raise UserError(
                f"export.max_merge_kl={config.export.max_merge_kl:g} needs the data of the run, "
                f"and they cannot be read: {error}"
            ) from error
        encoder.console.print(f"note: KL(live, merged) is left out, without data: {reason}")
        return []


def export_run(
    run: str | Path,
    kind: str,
    output: str | Path,
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
            tokenizer or template are not those of the run (unless named in `allow_change`);
            adapters that PEFT has no form for, or others over this base (`peft_problems`); a
            profile that cannot load the adapter, or of a merged model.
    """
    output = expand(output)
    run = expand(run)
    config = load_run(run, overrides)
    if profile and kind != "peft":
        raise UserError(f"--profile {profile} is for --format peft; a merged model needs none")
    if kind == "peft" and config.adapter.method == "full":
        raise UserError(f"{run} trained the whole model: it has no adapter; use --format hf")
    if kind == "hf" and config.adapter.method in configs.VIRTUAL_TOKEN_METHODS:
        raise UserError(
            f"{run} trained virtual tokens (method={config.adapter.method}), which cannot be "
            "merged into weights; use --format peft"
        )
    if kind == "hf" and (problem := configs.merge_problem(config)):
        raise UserError(problem)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output} already exists and is not empty; choose another directory or remove it"
        )
    place = checkpoint.find_place(config, run)
    record = checkpoint.read_record(place)
    source = formats.resolve(config.model)
    config, model = describe(config, source)
    tokenizer = formats.load_tokenizer(source)
    template = template_text(tokenizer, config.data.chat_template)
    found = fingerprint.take(source, tokenizer, template)
    fingerprint.check(record["fingerprint"], found, str(run), allow_change)
    examples = (
        ()
        if kind == "peft"
        else _read_probe(
            config, sets.make_encoder(config, model, tokenizer, found["tokenizer"], console)
        )
    )
    step = chosen_step(config, record)
    if not (run / "summary.json").is_file():
        console.print(f"note: {run} is not finished: this is its checkpoint of step {step}")
    results = _read_results(run, step)
    export_checkpoint(
        *(kind, output, place, record, config, model, tokenizer, found, console, examples),
        *(profile, results),
    )


def chosen_step(config: Config, record: Mapping[str, Any]) -> int:
    """The step whose adapters a run that ends with this record exports."""
    best = record["watch"]["best_step"] if config.train.load_best_model_at_end else None
    return record["step"] if best is None else best


def export_checkpoint(
    kind: str,
    target: str | Path,
    place: checkpoint.Place,
    record: Mapping[str, Any],
    config: Config,
    model: Model,
    tokenizer: Any,
    prints: Mapping[str, str],
    console: Console,
    examples: Sequence[Example] = (),
    profile: str | None = None,
    results: card.Results | None = None,
) -> dict[str, Any]:
    """Write `target` as `peft` or `hf` from the checkpoint in `place` that `record`, the latest
    one, chooses. `model` has shapes, and `results` are for the model card. Returns what
    `export_merged` does, of an adapter nothing.

    Raises:
        UserError: a damaged checkpoint; adapters that PEFT has no form for, or others over this
            base; as `export_peft` and `export_merged`.
    """
    stops = find_stops(config, model, tokenizer)
    trainable = find_trainable(model.params, config.adapter)
    if kind == "peft":
        raise_all(formats.peft_problems(trainable, model))
    shapes = methods.shapes(model.params, config.adapter)
    adapters, _, _ = checkpoint.restore(place, shapes, step=chosen_step(config, record))
    if kind == "peft":
        problems = [] if profile else formats.serving_problems(trainable)
        for problem in [*problems, *describe_stops(model, tokenizer, stops)]:
            console.print(f"note: {problem}")
        export_peft(target, config, model, adapters, prints, profile, stops, results)
        return {}
    params = base.load_under(config, model.directory, model, make_mesh(config.mesh), adapters)
    model = model.replace(params=params)
    return export_merged(target, config, model, adapters, console, examples, stops, results)
