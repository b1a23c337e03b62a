"""Session: a config and the model that it names, the start of every command.

    session = open_session(config)       # config.json of the model alone
    session = continue_adapter(session)  # the settings and weights of `adapter.path`
    session = settle_date(session, console)
    session.trainable, session.tokenizer, session.fingerprint

The last three are read once, at their first use, so a command reads only what it needs.
"""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lora_jax import data, formats, hosts, quantize, settle, targets, tree
from lora_jax.config import AdapterConfig, Config, expand, options_of
from lora_jax.data import sets
from lora_jax.errors import UserError, raise_all
from lora_jax.formats import fingerprint
from lora_jax.models.common import Model
from lora_jax.targets import Trainable

# Settings that `adapter.path` does not determine.
_OF_TRAINING = [name for name, rule in options_of(AdapterConfig).items() if rule.with_path]
# Parts of a session that do not depend on settings of data and training.
_KEPT = ("tokenizer", "template", "stops", "base_digest", "text_digests")


@dataclass(frozen=True)
class Session:
    """A settled config with its model, and the properties that follow from both.

    config: with all settings that follow from the model
    source: directory of the model
    model: shapes in place of weights
    loaded: the weights of `adapter.path`, after `continue_adapter`
    tokenizer_source: directory of the tokenizer; None: that of the model
    """

    config: Config
    source: Path
    model: Model
    loaded: Mapping | None = None
    tokenizer_source: Path | None = None

    @cached_property
    def trainable(self) -> Trainable:
        """Everything that the config trains of the model.

        Raises:
            UserError: as `targets.find_trainable`, for the base in `base_dtype`.
        """
        config, params = self.config, self.model.params
        if config.base_dtype in quantize.SCHEMES:
            # An init that changes the base does so before it is quantised.
            adapter = dataclasses.replace(config.adapter, init="default")
            quantized = jax.eval_shape(
                lambda params: quantize.quantize_tree(params, str(config.base_dtype)), params
            )
            targets.find_trainable(quantized, adapter)
        return targets.find_trainable(params, config.adapter)

    @property
    def frozen(self) -> int:
        """Number of parameters that do not train."""
        return 0 if self.config.adapter.trains_everything else tree.count(self.model.params)

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the model.

        Raises:
            UserError: as `formats.load_tokenizer`.
        """
        return formats.load_tokenizer(self.tokenizer_source or self.source)

    @cached_property
    def template(self) -> str:
        """Text of the chat template in use.

        Raises:
            UserError: it cannot be read.
        """
        return data.template_text(self.tokenizer, self.config.data.chat_template)

    @cached_property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer, as `settle.find_stops` finds them."""
        return settle.find_stops(self.config, self.model, self.tokenizer)

    @cached_property
    def base_digest(self) -> Future[str]:
        """Digest of the weights, computed in a thread."""
        return fingerprint.start(self.source)

    def start_digest(self) -> None:
        """Begin to compute the digest of the weights in the background, for `fingerprint`."""
        _ = self.base_digest

    @cached_property
    def text_digests(self) -> dict[str, str]:
        """The parts of the fingerprint that need no weights: `tokenizer`, `template`."""
        return fingerprint.take_texts(self.tokenizer, self.template)

    @property
    def fingerprint(self) -> dict[str, str]:
        """Digests of base, tokenizer and template.

        Raises:
            UserError: as `settle_base`.
        """
        self.start_digest()
        texts = self.text_digests
        return {"base": settle_base(self.base_digest), **texts}

    def with_config(self, config: Config) -> "Session":
        """Return this session with other settings, except those of the model or its template."""
        session = dataclasses.replace(self, config=config)
        kept = {*_KEPT, "trainable"} if config.adapter == self.config.adapter else {*_KEPT}
        vars(session).update({name: part for name, part in vars(self).items() if name in kept})
        return session

    def with_read(self, other: "Session") -> "Session":
        """Return this session with what another one over the same model and template has read."""
        session = dataclasses.replace(self)
        vars(session).update({name: part for name, part in vars(other).items() if name in _KEPT})
        return session

    def make_encoder(self, console: Console) -> sets.Encoder:
        """Return the encoder of the data for this model."""
        return sets.Encoder(
            self.config,
            self.tokenizer,
            self.text_digests["tokenizer"],
            console,
            vocab_size=self.model.config.vocab_size,
            labels=self.model.labels or None,
        )


def open_session(config: Config, weights: bool = True) -> Session:
    """Read the model of a config as shapes, and settle the settings that follow from it. A model on
    the hub is downloaded, without its weights if `weights` is False.

    Raises:
        UserError: as `formats.resolve` and `settle.describe_model`.
    """
    source = formats.resolve(config.model, weights)
    config, model = settle.describe_model(config, source)
    return Session(config, source, model)


def continue_adapter(session: Session) -> Session:
    """With `adapter.path`, return the session with that adapter's settings and weights.

    Raises:
        UserError: files that do not fit the model, or settings that contradict the adapter's.
    """
    config, model = session.config, session.model
    if config.adapter.path is None:
        return session
    given, default = config.adapter, AdapterConfig(method=config.adapter.method)
    path = expand(config.adapter.path, "adapter.path")
    if path.suffix == ".safetensors":
        adapters, found = formats.read_loralib(path, model.params, given)
    else:
        adapters, found = formats.read_adapter(path, model.params, model)
    problems = []
    for field in dataclasses.fields(AdapterConfig):
        mine, theirs = getattr(given, field.name), getattr(found, field.name)
        if field.name not in _OF_TRAINING and mine not in (getattr(default, field.name), theirs):
            if not field.name.endswith("_modules"):  # compared by the modules that they select
                problems.append(
                    f"adapter.{field.name}={mine!r} contradicts {given.path}, which has "
                    f"{theirs!r}; leave it out"
                )
    raise_all(problems)
    kept = {name: getattr(given, name) for name in _OF_TRAINING}
    config = dataclasses.replace(config, adapter=dataclasses.replace(found, **kept))
    return dataclasses.replace(session, config=config, loaded=adapters)


def settle_date(session: Session, console: Console) -> Session:
    """Return the session with a fixed date for a chat template that reads the date, so that all
    hosts render the same text, also after midnight.

    Raises:
        UserError: the template cannot be read.
    """
    config, given = session.config, session.config.data.template_date
    if not data.reads_date(session.template):
        if given is not None:
            console.print("note: data.template_date has no effect: the chat template reads no date")
        return session
    date = given or hosts.from_main(sets.today)
    console.print(f"note: the chat template reads the date, and gets data.template_date={date}")
    settings = dataclasses.replace(config.data, template_date=date)
    return session.with_config(dataclasses.replace(config, data=settings))


def settle_base(base: Future[str]) -> str:
    """Return the digest of the base, which is the same on all hosts. Each reads its own files.

    Raises:
        UserError: another host has other weights; as `fingerprint.base_digest`.
    """
    digest = base.result()
    if (main := hosts.from_main(lambda: digest)) != digest:
        raise UserError(
            f"host {jax.process_index()} has other weights of the base than host 0: its files are "
            "damaged or of another version; copy them again"
        )
    return main
