"""Adapters of a run as files for other programs: a PEFT directory, a merged model (`merged`), or
GGUF files (`gguf`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lora_jax import adapters as methods
from lora_jax import config as configs
from lora_jax import formats, hosts
from lora_jax.config import Config, expand
from lora_jax.data import Example
from lora_jax.errors import UserError, raise_all
from lora_jax.formats import fingerprint
from lora_jax.models.common import Model
from lora_jax.report import card
from lora_jax.report.console import print_notes
from lora_jax.session import Session, open_session
from lora_jax.sharding import gather_to_host, make_mesh
from lora_jax.train import base, checkpoint, probe
from lora_jax.train.facts import NO_FACTS, Facts, own_template, versions
from lora_jax.train.gguf import (
    ADAPTER,
    MERGED,
    check_gguf,
    export_gguf_adapter,
    export_gguf_model,
)
from lora_jax.train.merged import export_merged
from lora_jax.train.strength import check_scale, session_of, with_strength


@dataclass(frozen=True)
class Variant:
    """Ways in which an export differs from the run.

    profile: a program that must be able to load the adapter
    scale: multiple of the update
    """

    profile: str | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Saved:
    """Checkpoints of a run, and the record of the latest one."""

    place: checkpoint.Place
    record: Mapping[str, Any]

    def restore(self, session: Session) -> Any:
        """Read the adapters of the step that the run exports.

        Raises:
            UserError: a damaged checkpoint.
        """
        shapes = methods.shapes(session.model.params, session.trainable)
        step = chosen_step(session.config, self.record)
        return checkpoint.restore(self.place, shapes, step=step)[0]


def export_peft(
    target: str | Path,
    session: Session,
    adapters: Mapping,
    digests: Mapping[str, str],
    facts: Facts = NO_FACTS,
    profile: str | None = None,
) -> None:
    """Write a PEFT adapter directory with tokenizer, templates, fingerprint and model card.
    `eos_token_id` in its lora_jax.json has the ids that end an answer.
    """
    config, model, trainable = session.config, session.model, session.trainable
    target = expand(target)
    adapters = jax.tree.map(gather_to_host, adapters)
    if not hosts.is_main():
        return
    problems = [] if profile else serving_problems(session)
    rank = formats.file_rank(trainable)
    text = card.of_adapter(config, model, rank, problems, facts.results, versions())
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
            "fingerprint": {name: digests[name] for name in fingerprint.PARTS},
            "versions": versions(),
            "seed": config.seed,
            "chat_template_kwargs": config.data.chat_template_kwargs,
            "system_prompt": config.data.system_prompt,
            **({"eos_token_id": sorted(facts.stops)} if facts.stops else {}),
        },
        profile=profile,
        card=text,
    )


def serving_problems(session: Session) -> list[str]:
    """List what keeps vLLM from serving the adapters of a run."""
    model_type = session.model.hf_config.get("model_type")
    return formats.serving_problems(session.trainable, model_type)


def stop_notes(session: Session, stops: Collection[int]) -> list[str]:
    """Return a note on ids that end an answer and are missing from the base's own files."""
    known = formats.generation_stops(session.source) if stops else []
    added = sorted(set(stops) - set(known))
    if not added:
        return []
    tokenizer = session.tokenizer
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in added)
    return [
        f"answers end with {names}, which generation_config.json of the base does not name: pass "
        f"eos_token_id={[*known, *added]} to `generate` of transformers, and "
        f"stop_token_ids={added} to vLLM; a merged export names them itself"
    ]


def load_run(directory: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the resolved config of a run directory. `overrides` change settings of `export`.

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


def export_run(
    run: str | Path,
    kind: str,
    output: str | Path,
    console: Console,
    allow_change: Collection[str] = (),
    overrides: Sequence[str] = (),
    variant: Variant = Variant(),
) -> None:
    """Export the latest checkpoint of a run as `peft`, `hf`, `gguf` (an adapter for llama.cpp) or
    `gguf-merged`; with `train.load_best_model_at_end`, the best one. `overrides` are settings of
    `export`, as in `export.dtype=bfloat16`. Without a profile in `variant`, a note names what keeps
    vLLM from loading the adapter.

    Raises:
        UserError: no run, no checkpoint, a damaged one, `output` exists and is not empty, or base,
            tokenizer or template are not those of the run (unless named in `allow_change`);
            adapters that PEFT cannot represent or reads otherwise (`peft_problems`); what a GGUF
            file cannot hold; a profile that cannot load the adapter, or one for another kind; as
            `strength.with_strength`.
    """
    output = expand(output)
    run = expand(run)
    config = load_run(run, overrides)
    _check_kind(kind, config, run, variant.profile)
    check_scale(variant.scale)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output} already exists and is not empty; choose another directory or remove it"
        )
    place = checkpoint.find_place(config, run)
    saved = Saved(place, checkpoint.read_record(place))
    session = open_session(config)
    fingerprint.check(saved.record["fingerprint"], session.fingerprint, str(run), allow_change)
    check_gguf(kind, session)
    if kind == "peft":
        raise_all(formats.peft_problems(session.trainable, session.model))
    examples = () if kind in ("peft", ADAPTER) else _read_probe(session, console)
    step = chosen_step(session.config, saved.record)
    if not (run / "summary.json").is_file():
        console.print(f"note: {run} is not finished: this is its checkpoint of step {step}")
    results = _read_results(run, step)
    adapters = saved.restore(session)
    if variant.scale != 1:
        whole = jax.tree.map(gather_to_host, adapters)
        settings = session.config.adapter
        made = with_strength(session.source, session.model, whole, settings, variant.scale)
        # The scores are those of the whole update.
        adapters, session, results = made.adapters, session_of(session, made), None
    facts = Facts(session.stops, results)
    if kind == "peft":
        export_saved_adapter(output, session, adapters, console, facts, variant.profile)
    elif kind == ADAPTER:
        export_gguf_adapter(output, session, adapters, console, facts)
    elif kind == MERGED:
        model = _with_base(session, adapters)
        export_gguf_model(output, session.config, model, adapters, console, examples, facts)
    else:
        export_saved_merged(output, session, adapters, console, facts, examples)


def _check_kind(kind: str, config: Config, run: Path, profile: str | None) -> None:
    """Raise if a run of `config` cannot be exported as `kind`."""
    if profile and kind != "peft":
        raise UserError(f"--profile {profile} is for --format peft; a {kind} export needs none")
    if kind in ("peft", ADAPTER) and config.adapter.trains_everything:
        other = "--format hf" if kind == "peft" else "--format gguf --merged"
        raise UserError(f"{run} trained the whole model: it has no adapter; use {other}")
    if kind in ("hf", MERGED) and not config.adapter.is_mergeable:
        raise UserError(
            f"{run} trained virtual tokens (method={config.adapter.method}), which cannot be "
            "merged into weights; use --format peft"
        )
    if kind in ("hf", MERGED) and (problem := configs.merge_problem(config)):
        raise UserError(problem)


def _read_results(run: Path, step: int) -> card.Results | None:
    """Return the scores in summary.json, if they are those of the exported step."""
    file = run / "summary.json"
    found = configs.read_json(file) if file.is_file() else {}
    return found if found.get("exported_step") == step else None


def _read_probe(session: Session, console: Console) -> list[Example]:
    """Return the rows of the run that a merge is measured on. If they cannot be read, print a note
    and return none, or raise if `export.max_merge_kl` needs them.
    """
    limit = session.config.export.max_merge_kl
    try:
        return probe.read(session.config, session.make_encoder(console))
    except UserError as error:
        reason = str(error).splitlines()[0]
        if limit is not None:
            raise UserError(
                f"export.max_merge_kl={limit:g} needs the data of the run, "
                f"and they cannot be read: {error}"
            ) from error
        console.print(f"note: KL(live, merged) is left out, without data: {reason}")
        return []


def chosen_step(config: Config, record: Mapping[str, Any]) -> int:
    """Return the step to export for a run that ends with this record."""
    best = record["watch"]["best_step"] if config.train.load_best_model_at_end else None
    return record["step"] if best is None else best


def export_saved_adapter(
    target: str | Path,
    session: Session,
    adapters: Mapping,
    console: Console,
    facts: Facts,
    profile: str | None = None,
) -> None:
    """Write the adapters of a run as a PEFT directory, with notes on their use in other programs.

    Raises:
        UserError: adapters that PEFT cannot represent or reads otherwise; as `export_peft`.
    """
    problems = [] if profile else serving_problems(session)
    print_notes(console, [*problems, *stop_notes(session, facts.stops)])
    export_peft(target, session, adapters, session.fingerprint, facts, profile)


def export_saved_merged(
    target: str | Path,
    session: Session,
    adapters: Mapping,
    console: Console,
    facts: Facts,
    examples: Sequence[Example],
) -> dict[str, Any]:
    """Write the model of a run with its adapters merged in, as `export_merged`."""
    model = _with_base(session, adapters)
    return export_merged(target, session.config, model, adapters, console, examples, facts)


def _with_base(session: Session, adapters: Mapping) -> Model:
    """Return the model with its weights read again."""
    config, model = session.config, session.model
    params = base.reload_base(config, session.source, model, make_mesh(config.mesh), adapters)
    return model.replace(params=params)
