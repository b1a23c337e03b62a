"""Session, data and checks of a run before its weights are loaded, which takes longest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from lora_jax import data, formats, hosts
from lora_jax.config import AdapterConfig, Config
from lora_jax.data import sets
from lora_jax.formats import fingerprint
from lora_jax.report.console import print_notes
from lora_jax.report.progress import Display
from lora_jax.session import Session, continue_adapter, open_session, settle_date
from lora_jax.train import epochs, probe, resume, setup
from lora_jax.train.reference import Given, read_reference


@dataclass(frozen=True)
class Ready:
    """A session with the data that its config names.

    session: steps and dates are settled; ranks too, unless the init of the adapters changes them
    given: the adapter settings before an init or a checkpoint changed their ranks
    fingerprint: digests of base, tokenizer, template and data
    reference: the adapter of `objective.reference`, if that is a directory and the run is new
    """

    session: Session
    given: AdapterConfig
    encoder: sets.Encoder
    train_data: sets.TrainData
    held_out: dict[str, sets.DataSet]
    fingerprint: dict[str, str]
    mesh: Mesh
    reference: Given | None = None

    def choose_probe(self) -> list[data.Example]:
        """Return the examples that a merged model is compared on; none if none will be merged."""
        config = self.session.config
        if not config.export.merged and not config.adapter.trains_everything:
            return []
        return probe.choose(config, self.encoder, self.train_data, self.held_out)


def make_ready(
    config: Config, mesh: Mesh, record: Mapping[str, Any] | None, display: Display
) -> Ready:
    """Read model, tokenizer and data; `record` is that of the checkpoint to resume from.

    Raises:
        UserError: a mistake in config, model, data or adapter files; a difference from `record`.
    """
    console = display.console
    if jax.process_count() > 1:  # hosts may share the cache: the main one fills it
        hosts.from_main(lambda: str(formats.resolve(config.model)))
    session = open_session(config)
    print_notes(console, session.model.notes)
    session.start_digest()
    session = continue_adapter(session)
    given = session.config.adapter
    if record is not None:
        session = session.with_config(resume.with_stored(record, session.config))
        resume.check_config(record, session.config)
    setup.check_training(session)
    reference = read_reference(session) if record is None else None
    setup.check_attention(session.config, session.model, mesh, console)
    session = settle_date(session, console)
    with display.phase("checking the model's files"):
        setup.check_fingerprint(session, record)
    _ = session.stops  # refuses damaged files before anything slow
    encoder = session.make_encoder(console)
    with display.phase("reading the data"):
        train_data, held_out = sets.read_sets(session.config, encoder)
    digests = {"data": train_data.digest(), "held_out": sets.digest(held_out.values())}
    found = session.fingerprint | digests
    if record is not None:
        allowed = session.config.allow_change
        fingerprint.check(record["fingerprint"], found, "the checkpoint", allowed)
    session = session.with_config(epochs.settle(session.config, train_data, encoder, record))
    examined = [*train_data.sets.values(), *held_out.values()]
    setup.check_sizes(session.config, session.model, examined, console)
    setup.check_metrics(session, held_out)
    return Ready(session, given, encoder, train_data, held_out, found, mesh, reference)
