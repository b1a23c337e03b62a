"""Results of a run as GGUF files for llama.cpp and Ollama: an adapter, or a merged model."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lora_jax import formats
from lora_jax.config import Config, expand
from lora_jax.data import Example
from lora_jax.errors import raise_all
from lora_jax.models.common import Model
from lora_jax.report import merge as merge_report
from lora_jax.report.console import print_notes
from lora_jax.session import Session
from lora_jax.sharding import make_mesh
from lora_jax.train.facts import NO_FACTS, Facts, own_template
from lora_jax.train.merged import merge_with_report

ADAPTER, MERGED = "gguf", "gguf-merged"  # kinds of an export


def check_gguf(kind: str, session: Session) -> None:
    """Check that the result of a run can be a file of `kind`.

    Raises:
        UserError: what the file cannot hold, all of it listed.
    """
    if kind == ADAPTER:
        raise_all(formats.gguf_adapter_problems(session.trainable, session.model))
    if kind == MERGED:
        raise_all(formats.gguf_model_problems(session.model))


def export_gguf_adapter(
    target: str | Path,
    session: Session,
    adapters: Mapping,
    console: Console,
    facts: Facts = NO_FACTS,
) -> None:
    """Write the adapters of a run as `adapter.gguf` with a Modelfile.

    Raises:
        UserError: as `formats.write_gguf_adapter`.
    """
    config = session.config
    base, chat = formats.public_name(config.model), _chat(config, facts)
    base = Path(base).name if Path(base).is_absolute() else base
    formats.write_gguf_adapter(
        target, adapters, session.model, session.trainable, base_model=base, chat=chat
    )
    if chat.template is not None:
        print_notes(
            console,
            [
                "the run has a chat template of its own, and a GGUF adapter cannot hold one: give "
                "chat_template.jinja to llama.cpp as --chat-template-file"
            ],
        )


def export_gguf_model(
    target: str | Path,
    config: Config,
    model: Model,
    adapters: Mapping,
    console: Console,
    examples: Sequence[Example] = (),
    facts: Facts = NO_FACTS,
) -> dict[str, Any]:
    """Write `model.gguf` with the adapters merged in, in `export.dtype` or float32, with a
    Modelfile and the report of the merge. Return the same as `export_merged`.

    Raises:
        UserError: as `export_merged` and `formats.write_gguf_model`.
    """
    export = dataclasses.replace(config.export, dtype=config.export.dtype or "float32")
    config = dataclasses.replace(config, export=export)
    with jax.set_mesh(make_mesh(config.mesh)):
        merged, report, summary = merge_with_report(config, model, adapters, console, examples)
        with formats.new_directory_on_main(expand(target)) as directory:
            formats.write_gguf_model_files(directory, model, merged, _chat(config, facts))
            if directory is not None:
                merge_report.write(report, directory)
    return summary


def _chat(config: Config, facts: Facts) -> formats.Chat:
    return formats.Chat(facts.stops, own_template(config), config.data.system_prompt)
