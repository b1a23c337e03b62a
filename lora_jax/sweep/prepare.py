"""Trials made ready for training: their sessions and data, each read once."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from lora_jax.config import Config, ExportConfig, TrainConfig
from lora_jax.config.types import as_setting
from lora_jax.data import sets
from lora_jax.errors import UserError, raise_all
from lora_jax.report.progress import Display
from lora_jax.session import Session, continue_adapter, open_session, settle_date
from lora_jax.sweep.space import Trial
from lora_jax.targets import Trainable
from lora_jax.train import epochs, setup
from lora_jax.train.environment import starts_as_base

_FLOAT32 = "float32"


@dataclass(frozen=True)
class Material:
    """Data of some trials: encoder, training data and held-out data."""

    encoder: sets.Encoder
    train: sets.TrainData
    held_out: Mapping[str, sets.DataSet]


@dataclass(frozen=True)
class Member:
    """A trial with its session and data.

    number: of the trial
    """

    trial: Trial
    session: Session
    material: Material

    @property
    def number(self) -> int:
        return self.trial.number

    @property
    def config(self) -> Config:
        """The config with all settings that follow from model and data."""
        return self.session.config

    @property
    def trainable(self) -> Trainable:
        return self.session.trainable

    @property
    def steps(self) -> int:
        return self.config.train.total_steps

    @cached_property
    def loader(self) -> Any:
        """The batches of the trial."""
        encoder, quiet = self.material.encoder, Console(quiet=True)
        return sets.make_loader(self.config, self.material.train, encoder, None, quiet)

    @cached_property
    def shapes(self) -> dict[str, tuple]:
        """Shape and dtype of every array of its batches."""
        return {name: (x.shape, str(x.dtype)) for name, x in self.loader.batch(0).items()}


@dataclass
class Preparer:
    """Makes members of trials over one model. Sessions and data that trials share are kept."""

    mesh: Mesh
    display: Display
    sessions: dict[str, Session] = field(default_factory=dict)
    materials: dict[str, Material] = field(default_factory=dict)

    def prepare(self, trial: Trial) -> Member:
        """Return the member of a trial.

        Raises:
            UserError: as a run of its config would; settings that a sweep does not support.
        """
        try:
            check_supported(trial.config)
            session = self._open(trial.config)
            setup.check_training(session)
            material = self._read(session)
            encoder = dataclasses.replace(material.encoder, config=session.config)
            settled = epochs.settle(session.config, material.train, encoder)
            session = session.with_config(settled)
            setup.check_metrics(session, material.held_out)
        except UserError as error:
            own = f"trial {trial.number}: "
            lines = (own + line.removeprefix(own) for line in str(error).splitlines())
            raise UserError("\n".join(lines)) from error
        return Member(trial, session, material)

    def _open(self, config: Config) -> Session:
        """Return the session of a config, with what earlier ones have read of its model."""
        session = open_session(config)
        key = repr((config.data.chat_template, session.model.labels))
        if key in self.sessions:
            session = session.with_read(self.sessions[key])
        session.start_digest()
        session = continue_adapter(session)
        quiet = Console(quiet=True)
        setup.check_attention(config, session.model, self.mesh, quiet)
        session = settle_date(session, quiet)
        _ = session.stops  # refuses damaged files before anything slow
        self.sessions.setdefault(key, session)
        return session

    def _read(self, session: Session) -> Material:
        config = session.config
        depends = [config.data, config.train.objective]
        if config.data.eval_size is not None:
            depends.append(config.seed)
        if config.adapter.trains_prompt:
            depends.append(config.adapter.num_virtual_tokens)
        key = repr(depends)
        if key not in self.materials:
            encoder = session.make_encoder(self.display.console)
            train, held_out = sets.read_sets(config, encoder)
            examined = [*train.sets.values(), *held_out.values()]
            setup.check_sizes(config, session.model, examined, self.display.console)
            self.materials[key] = Material(encoder, train, held_out)
        return self.materials[key]


def check_supported(config: Config) -> None:
    """Raise for settings that a sweep does not support.

    Raises:
        UserError: all of them.
    """
    adapter, problems = config.adapter, []
    if adapter.trains_everything:
        problems.append(
            "adapter.method=full trains a copy of the model per member; a sweep trains adapters "
            "over one base: run it alone"
        )
    if config.data.streaming:
        problems.append("data.streaming=true: a sweep reads its data at once; leave it out")
    if config.train.optimizer_memory != "device":
        problems.append(
            "train.optimizer_memory=host: a sweep keeps the optimizer on the device; use device"
        )
    if adapter.init == "loftq" or (adapter.init == "eva" and adapter.eva_rho != 1):
        what = "init=loftq" if adapter.init == "loftq" else f"eva_rho={adapter.eva_rho:g}"
        problems.append(f"adapter.{what} is not supported in a sweep; run it alone")
    if adapter.changes_base and adapter.use_dora:
        problems.append(
            f"adapter.init={adapter.init} with use_dora is not supported in a sweep; run it alone"
        )
    if adapter.changes_base and config.base_dtype not in (None, _FLOAT32):
        problems.append(
            f"adapter.init={adapter.init} changes the base, which the members share: it needs "
            f"base_dtype=float32, not {config.base_dtype}"
        )
    problems += _train_problems(config.train)
    reference = config.objective.reference
    is_base = reference == "base" or (reference == "start" and starts_as_base(adapter))
    if config.train.needs_reference and not is_base:
        problems.append(
            f"objective.reference={reference!r} is another model than the base, and a sweep "
            "compares with the base: set objective.reference=base"
        )
    raise_all(problems)


def _train_problems(train: TrainConfig) -> Iterator[str]:
    if train.load_best_model_at_end:
        yield (
            "train.load_best_model_at_end=true: a sweep exports the adapters of the last step; "
            "set it to false, and in best.yaml to true again"
        )
    if train.report_to:
        yield (
            f"train.report_to={as_setting(train.report_to)}: a sweep writes metrics.jsonl and "
            "sweep.json only; leave it out"
        )
    metric, known = train.metric_for_best_model, train.metrics_without_answers
    if train.early_stopping_patience is not None and metric not in known:
        yield (
            f"train.metric_for_best_model={metric} needs generated answers, and a sweep generates "
            f"none; early stopping can watch {', '.join(known)}"
        )


def find_unused(config: Config) -> list[str]:
    """Return the export settings that a sweep does not use, as `export.merged=true`."""
    usual = ExportConfig()
    return [
        f"export.{name}={as_setting(value)}"
        for name, value in dataclasses.asdict(config.export).items()
        if value != getattr(usual, name)
    ]


def check_here() -> None:
    """Raise on several hosts."""
    if jax.process_count() > 1:
        raise UserError(
            f"a sweep runs on one host, and this one has {jax.process_count()}; start one process"
            ", or several with --storage"
        )
