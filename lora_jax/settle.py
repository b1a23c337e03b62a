"""Settings that follow from a model's config.json, before its weights are read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import data, formats
from lora_jax.config import AdapterConfig, Config, EvalConfig, virtual_tokens
from lora_jax.errors import UserError, raise_all
from lora_jax.models import CLASSIFIERS
from lora_jax.models.common import Model, has_states

# Settings of `data` that a classifier has no use for.
_OF_TEXT = (
    *("prompt", "completion", "system_prompt", "chat_template", "chat_template_kwargs"),
    *("template_date", "regression", "replay"),
)


def describe_model(config: Config, source: Path) -> tuple[Config, Model]:
    """Return the config with the settings that follow from the model in `source`, and that model
    with shapes in place of weights.

    For a classifier, `data.labels` are those of the training data if none are given; its head
    trains (`modules_to_save`), with everything else that its files lack; and answers are scored by
    accuracy. Virtual tokens that start as a text are as many as the text has, if no number is
    given. `data.share_prompts` is true or false.

    Raises:
        UserError: as `formats.describe`; settings that do not fit the model; fewer than two
            labels, or none given for a stream; prompts that cannot be shared; virtual tokens that
            leave no room for a text, or that start as a text without a tokenizer.
    """
    model = formats.describe(source, config.ignore_config_fields)
    given = config.data.labels
    if not model.labels:
        if given is not None:
            kind = model.hf_config.get("model_type")
            raise UserError(
                f"data.labels={given!r} is for classifiers ({', '.join(CLASSIFIERS)}); "
                f"{config.model} is of model_type={kind!r} and writes text"
            )
        _check_no_classification(config)
        return _with_sharing(_with_virtual_tokens(config, source, model), model), model
    _check_classification(config)
    config = _with_sharing(config, model)
    labels = tuple(given) if given is not None else _read_labels(config)
    if not labels:  # nothing is trained: those of the model itself
        labels = model.labels
    if len(set(labels)) < max(2, len(labels)):
        raise UserError(f"data.labels={list(labels)!r}: at least two are needed, each once")
    model = formats.describe(source, config.ignore_config_fields, labels)
    settled = dataclasses.replace(config.data, labels=list(labels))
    return dataclasses.replace(
        config,
        data=settled,
        adapter=_with_heads(config.adapter, source, model),
        eval=_with_accuracy(config.eval),
    ), model


def text_tokens(adapter: AdapterConfig, tokenizer: Any) -> list[int] | None:
    """Return the tokens that virtual tokens start as, with the special tokens that the tokenizer
    puts around a text; None if they do not start as a text.

    Raises:
        UserError: a text without tokens.
    """
    if not adapter.trains_virtual_tokens or adapter.prompt_init != "text":
        return None
    tokens = list(tokenizer(adapter.prompt_text)["input_ids"])
    if not tokens:
        raise UserError(f"adapter.prompt_text={adapter.prompt_text!r} has no tokens")
    return tokens


def _with_sharing(config: Config, model: Model) -> Config:
    """Return the config with `data.share_prompts` as true or false."""
    given, problem = config.data.share_prompts, _sharing_problem(config, model)
    if given is True and problem is not None:
        raise UserError(f"data.share_prompts=true: {problem}; leave it out")
    shares = problem is None and (given is True or config.train.compares_answers)
    settled = dataclasses.replace(config.data, share_prompts=given is not False and shares)
    return dataclasses.replace(config, data=settled)


def _sharing_problem(config: Config, model: Model) -> str | None:
    """Return why texts of a row cannot share their starts, or None."""
    if model.labels:
        return f"{config.model} classifies, and its texts have no prompt"
    if getattr(model.config, "ropes_by_length", ()):
        return f"the rotary frequencies of {config.model} depend on the length of the whole text"
    if has_states(model.config):
        return f"layers of {config.model} pass a state from token to token, in one order"
    if config.train.router_aux_loss_coef:
        return "train.router_aux_loss_coef counts every token, and a shared one would count once"
    if not config.data.packing and not config.train.compares_answers:
        return "data.packing=false puts one text into a row"
    return None


def _with_virtual_tokens(config: Config, source: Path, model: Model) -> Config:
    adapter = config.adapter
    if not adapter.trains_virtual_tokens or adapter.path is not None:
        return config
    if adapter.prompt_init == "text":
        try:
            tokens = text_tokens(adapter, formats.load_tokenizer(source))
        except UserError as error:
            raise UserError(f"adapter.prompt_init=text needs a tokenizer: {error}") from error
        model.check_tokens(np.asarray(tokens, np.int64), "adapter.prompt_text")
        count = adapter.num_virtual_tokens or len(tokens or ())
        adapter = dataclasses.replace(adapter, num_virtual_tokens=count)
    count, limit = virtual_tokens(adapter), model.config.max_position_embeddings
    problems = []
    if count >= limit:
        problems.append(
            f"adapter.num_virtual_tokens={count} leaves no room for a text: {config.model} has "
            f"max_position_embeddings={limit}"
        )
    if adapter.trains_prompt and count > config.data.max_length - 2:
        problems.append(
            f"adapter.num_virtual_tokens={count} leaves no room for a text in data.max_length="
            f"{config.data.max_length}, which counts them"
        )
    raise_all(problems)
    return dataclasses.replace(config, adapter=adapter)


def _check_no_classification(config: Config) -> None:
    """Raise for settings of classifiers."""
    default = Config().data
    problems = [
        f"data.{name}={getattr(config.data, name)!r} is for classifiers; {config.model} writes text"
        for name in ("text", "label")
        if getattr(config.data, name) != getattr(default, name)
    ]
    if "accuracy" in config.eval.metrics:
        problems.append(
            f"eval.metrics: accuracy is for classifiers, and {config.model} writes text; "
            "exact_match compares its answers"
        )
    raise_all(problems)


def _check_classification(config: Config) -> None:
    """Raise for settings of models that write text."""
    default, adapter = Config(), config.adapter
    if adapter.trains_virtual_tokens:
        raise UserError(
            f"adapter.method={adapter.method} is for models that write text; {config.model} "
            "classifies"
        )
    if config.train.compares_answers:
        raise UserError(
            f"train.objective={config.train.objective} compares answers, and {config.model} "
            "classifies; leave it out"
        )
    raise_all(
        [
            f"data.{name}={getattr(config.data, name)!r} is for models that write text; "
            f"{config.model} classifies"
            for name in _OF_TEXT
            if getattr(config.data, name) != getattr(default.data, name)
        ]
        + [
            f"eval.metrics: {name} is for models that write text, and {config.model} classifies; "
            "accuracy counts its labels"
            for name in config.eval.metrics
            if name not in ("accuracy", "exact_match")
        ]
    )


def _read_labels(config: Config) -> tuple[str, ...]:
    settings = config.data
    if settings.train is None:
        return ()
    if settings.streaming:
        raise UserError(
            "data.streaming=true, and the labels are not known before the data are read: list them "
            "in data.labels"
        )
    sources = settings.train if isinstance(settings.train, Mapping) else [settings.train]

    def parse(record: object, where: str) -> list[data.AnyRow]:
        ignored = settings.ignore_columns
        return [data.parse_label_row(record, where, settings.text, settings.label, ignored)]

    rows = [
        row
        for source in sources
        for row in data.read(source, on_bad_row=settings.on_bad_row, parse=parse).rows
        if isinstance(row, data.LabelRow)
    ]
    return data.label_names(rows)


def _with_heads(adapter: AdapterConfig, source: Path, model: Model) -> AdapterConfig:
    if adapter.trains_everything:
        return adapter
    # These always train, as in PEFT's SEQ_CLS, where the name is the end of any path.
    heads = [head for head in model.names.heads if head.endswith(model.names.heads[0])]
    if any(source.glob("*.safetensors")):
        heads += [head for head in formats.missing_heads(source, model) if head not in heads]
    given = adapter.modules_to_save or []
    return dataclasses.replace(
        adapter, modules_to_save=[*given, *(head for head in heads if head not in given)]
    )


def _with_accuracy(settings: EvalConfig) -> EvalConfig:
    if settings.metrics != EvalConfig().metrics:
        return settings
    return dataclasses.replace(settings, metrics=["accuracy"])


def find_stops(config: Config, model: Model, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end an answer: EOS of the model's files and of the tokenizer, and what
    the chat template puts after an answer. A classifier has none.

    Raises:
        UserError: generation_config.json or the template cannot be read.
    """
    if model.labels:
        return frozenset()
    own, template = formats.stop_tokens(model.directory), config.data.chat_template
    data.template_text(tokenizer, template)
    try:
        return data.stop_tokens(tokenizer, template, own, config.data.chat_template_kwargs)
    except UserError:  # the template refuses a plain question, but may accept the rows
        return data.stop_tokens(tokenizer, data.PLAIN, own)
