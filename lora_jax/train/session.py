"""Reads and checks of a run before its weights are loaded, which takes longest."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lora_jax import data, formats, hosts, targets, tree
from lora_jax.config import AdapterConfig, Config
from lora_jax.data import sets
from lora_jax.formats import fingerprint
from lora_jax.models.common import Model
from lora_jax.report.progress import Display
from lora_jax.train import epochs, probe, resume, setup
from lora_jax.train.model import describe, find_stops, make_encoder, settle_date


@dataclass(frozen=True)
class Session:
    """A config with the model, tokenizer and data that it names.

    config: settled: steps, dates and ranks have their values
    given: the adapter settings before a method or a checkpoint changed their ranks
    model: shapes instead of weights
    loaded: the weights of `adapter.path`
    prints: the fingerprint of base, tokenizer, template and data
    """

    config: Config
    given: AdapterConfig
    source: Path
    model: Model
    loaded: Mapping | None
    found: targets.Trainable
    tokenizer: Any
    encoder: sets.Encoder
    train_data: sets.TrainData
    held_out: dict[str, sets.DataSet]
    prints: dict[str, str]

    @property
    def frozen(self) -> int:
        """Parameters that do not train."""
        return 0 if self.config.adapter.method == "full" else tree.count(self.model.params)

    def choose_probe(self) -> list[data.Example]:
        """Examples that a merged model is compared on; none if no model will be merged."""
        if not self.config.export.merged and self.config.adapter.method != "full":
            return []
        return probe.choose(self.config, self.encoder, self.train_data, self.held_out)


def read(config: Config, mesh: Mesh, record: Mapping[str, Any] | None, display: Display) -> Session:
    """Read model, tokenizer and data; `record` is that of the checkpoint to go on from.

    Raises:
        UserError: a mistake in config, model, data or adapter files; what differs from `record`.
    """
    console = display.console
    hosts.from_main(lambda: str(formats.resolve(config.model)))  # hosts may share the cache
    source = formats.resolve(config.model)
    config, model = describe(config, source)
    for note in model.notes:
        console.print(f"note: {note}")
    base_digest = fingerprint.start(source)
    config, loaded = setup.continue_adapter(config, model)
    given = config.adapter
    if record is not None:
        config = resume.with_date(record, resume.with_ranks(record, config))
        resume.check_config(record, config)
    found = setup.find_trainable(config, model)
    setup.check_attention(config, model, mesh, console)
    tokenizer = formats.load_tokenizer(source)
    config = settle_date(config, tokenizer, console)
    with display.phase("checking the model's files"):
        prints = setup.take_fingerprint(config, base_digest, tokenizer, record)
    find_stops(config, model, tokenizer)  # refuses damaged files before anything slow
    encoder = make_encoder(config, model, tokenizer, prints["tokenizer"], console)
    with display.phase("reading the data"):
        train_data, held_out = sets.read_sets(config, encoder)
    prints |= {"data": train_data.digest(), "held_out": sets.digest(held_out.values())}
    prints["base"] = setup.settle_base(base_digest)
    if record is not None:
        fingerprint.check(record["fingerprint"], prints, "the checkpoint", config.allow_change)
    config = epochs.settle(config, train_data, encoder, record)
    setup.check_sizes(config, model, [*train_data.sets.values(), *held_out.values()], console)
    setup.check_metrics(config, model, tokenizer, held_out)
    return Session(
        config=config,
        given=given,
        source=source,
        model=model,
        loaded=loaded,
        found=found,
        tokenizer=tokenizer,
        encoder=encoder,
        train_data=train_data,
        held_out=held_out,
        prints=prints,
    )
