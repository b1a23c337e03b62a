"""The model card of a run: its scores, settings and versions."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax import data
from lora_jax.config import AdapterConfig, Config, DataConfig, TrainConfig
from lora_jax.formats import card
from lora_jax.models.common import Model
from lora_jax.report.console import name_metric

Results = Mapping[str, Mapping[str, Any] | None]  # task, regression: as in summary.json

_ALWAYS = {
    *("method", "rank", "alpha", "target_modules", "max_length"),
    *("steps", "batch_size", "learning_rate", "schedule", "compute_dtype"),
}
# Specific to this machine, or shown elsewhere in the card.
_NEVER = {
    *("train", "eval", "regression", "path", "system_prompt", "cache", "report_to"),
    *("save_every", "save_total_limit", "log_every", "eval_every", "remat", "loss_chunk"),
    *("micro_batch_size", "attention", "optimizer_memory", "eval_size"),
}
_LABELS = {"task": "held-out data", "regression": "regression set"}


def of_adapter(
    config: Config,
    model: Model,
    rank: int,
    problems: list[str],
    results: Results | None,
    versions: Mapping[str, str],
) -> str:
    """Return the card of an exported adapter; `rank` is the largest of its file,
    `problems` are reasons why vLLM cannot load it.
    """
    return card.adapter_card(
        card.Base(config.model, model.directory),
        card.task_of(model),
        rank,
        problems,
        _sections(config, results, versions),
        config.data.system_prompt,
    )


def of_model(
    config: Config, model: Model, results: Results | None, versions: Mapping[str, str]
) -> str:
    """Return the card of a merged model."""
    return card.model_card(
        card.Base(config.model, model.directory),
        card.task_of(model),
        _sections(config, results, versions),
    )


def _sections(
    config: Config, results: Results | None, versions: Mapping[str, str]
) -> dict[str, str]:
    return {
        "Results": card.table(["", "before", "after"], list(_scores(results))),
        "Training": card.table(["setting", "value"], list(_settings(config))),
        "Versions": card.table(["package", "version"], list(versions.items())),
    }


def _scores(results: Results | None):
    for name, label in _LABELS.items():
        found = (results or {}).get(name) or {}
        for key in (key.removesuffix("_after") for key in found if key.endswith("_after")):
            unit = name_metric(key, found)
            yield f"{label}: {unit}", found[f"{key}_before"], found[f"{key}_after"]


def _settings(config: Config):
    """Yield name and value of the data sources and of settings that differ from their defaults."""
    for name in ("train", "eval", "regression"):
        if (source := getattr(config.data, name)) is not None:
            yield f"data.{name}", _data_name(source)
    if config.adapter.path is not None:
        yield "adapter.path", Path(config.adapter.path).name
    defaults = {"adapter": AdapterConfig(), "data": DataConfig(), "train": TrainConfig()}
    adapter, unread = config.adapter, set()
    if adapter.trains_virtual_tokens or adapter.trains_everything:
        unread = {"rank", "alpha", "target_modules"}
    elif adapter.trains_vera:
        unread = {"alpha"}
    left_out = _NEVER | unread
    for section, default in defaults.items():
        own = getattr(config, section)
        for field in dataclasses.fields(default):
            value, name = getattr(own, field.name), field.name
            if name in left_out or (name not in _ALWAYS and value == getattr(default, name)):
                continue
            yield f"{section}.{name}", Path(value).name if name == "chat_template" else value
    if config.base_dtype is not None:
        yield "base_dtype", config.base_dtype
    yield "seed", config.seed


def _data_name(source: Any) -> Any:
    """Return sources without the directories of this machine."""
    if isinstance(source, Mapping):
        return ", ".join(f"{_data_name(name)} ({weight:g})" for name, weight in source.items())
    public = source.startswith("demo:") or data.is_hub_name(source)
    return source if public else Path(source).name
