"""Facts about a model and the data of a run that advice follows from."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from lora_jax import data, tree
from lora_jax.audit.preview import Report
from lora_jax.config import AdapterConfig, Config
from lora_jax.data import sets
from lora_jax.errors import counted
from lora_jax.session import Session
from lora_jax.targets import Target, find_trainable

# Objectives that train on rows of a form; the first one is advised.
OBJECTIVES = {
    "one": ("sft",),
    "pairs": ("dpo", "ipo", "orpo", "simpo"),
    "judged": ("kto",),
}
FORMS = {
    "one": "rows have one answer",
    "pairs": "rows have a chosen and a rejected answer",
    "judged": "rows have an answer with a label",
}
_LOOKED_AT = 20  # records whose keys show the form of the rows


@dataclass(frozen=True)
class Facts:
    """Properties of a model and of the data of a run that the advice follows from.

    per_rank: parameters of an adapter of rank 1 on all linears
    groups: the same of attention and of the rest ("mlp"), with their targets
    largest_rank: of the smallest linear
    form: of the rows, a key of `OBJECTIVES`
    examples, tokens: of the training data; tokens are supervised ones
    streamed: only the first records of the data were read
    rows, steps: of the run
    seen: supervised tokens of the run, each counted once
    """

    model_type: str
    hidden_size: int
    parameters: int
    per_rank: int
    groups: Mapping[str, tuple[int, Sequence[Target]]]
    largest_rank: int
    classifies: bool
    form: str
    examples: int
    tokens: int
    streamed: bool
    examples_per_row: float
    rows: int
    steps: int
    seen: int


def find_form(config: Config) -> str:
    """Return the form of the training rows, by the keys of the first record that is an object."""
    for source in sets.training_sources(config):
        for _, record, _ in islice(data.records(source), _LOOKED_AT):
            if not isinstance(record, dict):
                continue
            given = {key for key, value in record.items() if value is not None}
            if {"chosen", "rejected"} <= given:
                return "pairs"
            if {"completion", "label"} <= given and config.train.objective == "kto":
                return "judged"
            is_label = isinstance(record.get("label"), bool)
            return "judged" if is_label and {"prompt", "completion"} <= given else "one"
    return "one"


def find_facts(session: Session, report: Report, form: str) -> Facts:
    """Return the facts of a model and of the data that `inspect` reported on."""
    config, model = report.config, session.model
    given = session.config.adapter
    linears = AdapterConfig(
        rank=1,
        exclude_modules=given.exclude_modules,
        layers_to_transform=given.layers_to_transform,
    )
    targets = find_trainable(model.params, linears).targets
    groups: dict[str, list[Target]] = {"attention": [], "mlp": []}
    for target in targets:
        groups["attention" if re.search("attn|attention", target.names[0]) else "mlp"].append(
            target
        )
    packings = {name: one for name, one in report.packing.items() if name != config.data.replay}
    trained = {name: report.sets[f"data.train {name}"] for name in packings}
    examples = sum(len(one.lengths) for one in trained.values())
    is_stream = report.records is not None
    seen = sum(
        packing.supervised_tokens
        if is_stream or packing.epochs <= 1
        else int(trained[name].supervised.sum())
        for name, packing in packings.items()
    )
    return Facts(
        model_type=str(model.hf_config.get("model_type")),
        hidden_size=model.config.hidden_size,
        parameters=tree.count(model.params),
        per_rank=sum(target.parameters for target in targets),
        groups={
            name: (sum(target.parameters for target in own), own) for name, own in groups.items()
        },
        largest_rank=min(min(target.shape) for target in targets),
        classifies=bool(model.labels),
        form=form,
        examples=examples,
        tokens=sum(int(one.supervised.sum()) for one in trained.values()),
        streamed=is_stream,
        examples_per_row=examples / sum(one.rows_per_epoch for one in packings.values()),
        rows=config.train.total_steps * config.train.batch_size,
        steps=config.train.total_steps,
        seen=seen,
    )


def describe_facts(facts: Facts, config: Config) -> list[str]:
    """Return lines on the model, the data and the run."""
    some = "the first " if facts.streamed else ""
    return [
        f"{config.model}: {facts.model_type}, hidden size {facts.hidden_size:,}, "
        f"{facts.parameters:,} parameters",
        f"data: {some}{counted(facts.examples, 'example')} with {facts.tokens:,} supervised tokens",
        f"run: {counted(facts.steps, 'step')} of {counted(config.train.batch_size, 'row')}, which "
        f"hold {facts.seen:,} different supervised tokens",
    ]
