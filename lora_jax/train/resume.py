"""Checks before a run resumes: every setting that affects the remaining steps must be the same."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from lora_jax.config import PRINTS, Config, options_of
from lora_jax.errors import UserError, raise_all

# Settings that may differ at any time: they do not change what the remaining steps compute, or the
# fingerprint tells if they do (the model, the training data and the chat template by path).
_RESUMABLE = frozenset(key for key, rule in options_of(Config).items() if rule.resumable)

# Settings that `adapters.redistribute` settles.
_RANKS = (
    *("target_modules", "exclude_modules", "layers_to_transform"),
    *("rank_pattern", "alpha_pattern"),
)


def with_stored(record: Mapping[str, Any], config: Config) -> Config:
    """Return the config with the ranks and the date that the run of `record` has settled."""
    return with_date(record, with_ranks(record, config))


def with_ranks(record: Mapping[str, Any], config: Config) -> Config:
    """Return the config with the ranks that init=eva found, if the config's own ranks are those
    that the run of `record` was given.
    """
    given, found = record.get("given_adapter"), record["config"]["adapter"]
    if given is None or any(getattr(config.adapter, name) != given[name] for name in _RANKS):
        return config
    ranks = {name: found[name] for name in _RANKS}
    return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, **ranks))


def with_date(record: Mapping[str, Any], config: Config) -> Config:
    """Return the config with the date that the run of `record` passed to its chat template, unless
    the config sets one.
    """
    stored = record["config"]["data"].get("template_date")
    if config.data.template_date is not None or stored is None:
        return config
    settings = dataclasses.replace(config.data, template_date=stored)
    return dataclasses.replace(config, data=settings)


def check_config(record: Mapping[str, Any], config: Config) -> None:
    """Compare the settings of a checkpoint with the current ones.

    Raises:
        UserError: settings that differ and are not in `allow_change`, all of them listed; fewer
            steps than are done.
    """
    allowed = _allowed(config)
    raise_all(
        [
            f"{key}={now!r}, and the checkpoint was made with {then!r}; keep it, or list {key!r} "
            "in allow_change"
            for key, (now, then) in differences(record, config).items()
            if not _covers(allowed, key)
        ]
    )
    if config.train.steps is not None:
        _check_done(record, config)


def differences(record: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Return the settings that affect the remaining steps and differ from the checkpoint: (now,
    then) by dotted key.
    """
    now = _flat(dataclasses.asdict(config))
    # A setting that did not exist then acted as its default.
    then = _flat(dataclasses.asdict(Config())) | _flat(record["config"])
    if (
        then["data.template_date"] is None
    ):  # not known, or without effect: the digest of the data differs
        then["data.template_date"] = now["data.template_date"]
    if now["train.steps"] is None:  # they follow from train.epochs: `check_steps` compares them
        now["train.steps"] = then["train.steps"]
    return {
        key: (now.get(key), then.get(key))
        for key in sorted({*now, *then})
        if now.get(key) != then.get(key) and key not in _RESUMABLE
    }


def check_steps(record: Mapping[str, Any], config: Config) -> None:
    """Compare the steps of `train.epochs` with those of a checkpoint.

    Raises:
        UserError: they differ, and `train.steps` is not in `allow_change`; fewer than are done.
    """
    steps, then = config.train.total_steps, record["config"]["train"]["steps"]
    if steps != then and not _covers(_allowed(config), "train.steps"):
        raise UserError(
            f"train.epochs={config.train.epochs:g} are {steps} steps of these data, and the "
            f"checkpoint was made for {then}; keep the data, or list 'train.steps' in allow_change"
        )
    _check_done(record, config)


def _check_done(record: Mapping[str, Any], config: Config) -> None:
    if config.train.total_steps < record["step"]:
        raise UserError(
            f"train.steps={config.train.steps}, and the checkpoint is that of step "
            f"{record['step']}: nothing can be taken back"
        )


def _allowed(config: Config) -> list[str]:
    """Return the settings in `allow_change`, without parts of the fingerprint such as `data`."""
    return [name for name in config.allow_change if name not in PRINTS]


def _covers(names: Collection[str], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings by dotted key; a mapping that is a value is not flattened."""
    flat: dict[str, Any] = {}
    sections = {f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}
    for name, value in settings.items():
        if not prefix and name in sections:
            flat |= _flat(value, f"{name}.")
        else:
            flat[prefix + name] = value
    return flat
