"""The data of a run: training data, held-out data, and the batches made of them."""

import dataclasses
import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lora_jax import data
from lora_jax.cache import cache_directory
from lora_jax.config import ENCODING_KEYS, Config, virtual_tokens
from lora_jax.data.datasets import DataSet, TrainData, hold_out, rows_of, without_overlap
from lora_jax.data.datasets import digest as digest
from lora_jax.data.replay import add_replay
from lora_jax.errors import UserError, counted


@dataclass(frozen=True)
class Encoder:
    """Turns sources into examples by the settings of a run, and prints what was cut or dropped.

    vocab_size: of the model; None does not check tokens against it
    labels: of a classifier
    counts: rows read, cut and dropped, by the `what` of `examples`; under "block", of the last
        `block`
    """

    config: Config
    tokenizer: Any
    tokenizer_digest: str
    console: Console
    vocab_size: int | None = None
    labels: tuple[str, ...] | None = None
    read: dict[str, data.Rows] = field(default_factory=dict)
    counts: dict[str, data.Counts] = field(default_factory=dict)

    @property
    def places(self) -> int:
        """Tokens that a batch keeps free at the start of every text, for virtual tokens."""
        adapter = self.config.adapter
        return virtual_tokens(adapter) if adapter.trains_prompt else 0

    @property
    def max_length(self) -> int:
        """Tokens that an example can have of its own."""
        return self.config.data.max_length - self.places

    def for_general_text(self) -> "Encoder":
        """Return an encoder for text outside of the task, without its system prompt and columns;
        its rows have one answer, whatever the objective.
        """
        settings = dataclasses.replace(
            self.config.data, system_prompt=None, prompt=None, completion=None
        )
        train = dataclasses.replace(self.config.train, objective="sft")
        config = dataclasses.replace(self.config, data=settings, train=train)
        return dataclasses.replace(self, config=config, read={})

    def rows(self, source: str) -> data.Rows:
        """Return the rows of a source, which is read once."""
        settings = self.config.data
        if source not in self.read:
            self.read[source] = data.read(
                source,
                prompt=settings.prompt,
                completion=settings.completion,
                on_bad_row=settings.on_bad_row,
                parse=self._parse,
            )
        return self.read[source]

    def _parse(self, record: Any, where: str) -> Sequence[data.AnyRow]:
        settings = self.config.data
        ignored = settings.ignore_columns
        if self.labels is not None:
            return [data.parse_label_row(record, where, settings.text, settings.label, ignored)]
        if self.config.train.compares_answers:
            return answers_parser(self.config)(record, where)
        return data.parse_rows(record, where, settings.prompt, settings.completion, ignored)

    def _encode(self, rows: Sequence[Any]) -> tuple[list[data.Example], data.Counts]:
        """Return rows as examples; all may be dropped."""
        settings = self.config.data
        if self.labels is None and rows and self.config.train.compares_answers:
            return data.encode_pairs(rows, **self.options())
        if self.labels is None:
            return data.encode_rows(rows, **self.options())
        return data.encode_labelled(
            rows,
            self.tokenizer,
            self.labels,
            max_length=self.max_length,
            too_long=settings.too_long,
            on_bad_row=settings.on_bad_row,
        )

    def examples(self, source: str, what: str) -> list[data.Example]:
        """Return all examples of a source, from the cache where it has them, and print counts."""
        settings = self.config.data

        def build() -> tuple[list[data.Example], data.Counts]:
            rows = self.rows(source)
            examples, counts = self._encode(rows.rows)
            if not examples:
                length, too_long = self.max_length, settings.too_long
                raise data.nothing_left(len(rows.rows), counts, length, too_long)
            return examples, counts.with_bad(rows.dropped)

        files = data.source_files(source) if settings.cache else []
        if not files:  # a data set of the hub, which `datasets` keeps
            examples, counts = build()
            notes: Sequence[str] = ()
        else:
            key = self._cache_key(source, files)
            cached = data.cached_examples(cache_directory() / "examples", key, build)
            examples, counts, notes = cached.examples, cached.counts, cached.notes
        for note in notes:
            self.console.print(f"note: {note}")
        self._check_vocabulary(examples)
        self.counts[what] = counts
        self.console.print(f"{what}: {describe_counts(counts, self.max_length)}")
        return examples

    def _cache_key(self, source: str, files: Sequence[Path]) -> dict[str, str]:
        """Return everything that the examples of a source depend on."""
        settings = self.config.data
        template = data.template_text(self.tokenizer, settings.chat_template)
        dated = self.labels is None and data.reads_date(template)
        return {
            "source": source,  # examples say where they came from
            "data": data.digest_files(files),
            "tokenizer": self.tokenizer_digest,
            "template": template,
            "date": (settings.template_date or today()) if dated else "",
            "code": data.code_version(),
            "settings": repr({name: getattr(settings, name) for name in ENCODING_KEYS}),
            "room": repr(self.max_length),  # less where virtual tokens take some of it
            "labels": repr(self.labels),
            "answers": _form(self.config),
        }

    def _check_vocabulary(self, examples: Sequence[data.Example]) -> None:
        if self.vocab_size is not None:
            check_vocabulary(examples, self.config.model, self.vocab_size)

    def options(self) -> dict[str, Any]:
        """Return the arguments of `data.encode_rows` and `encode_pairs`."""
        settings = self.config.data
        return {
            "rendering": data.Rendering(
                self.tokenizer,
                system_prompt=settings.system_prompt,
                chat_template=settings.chat_template,
                chat_template_kwargs=settings.chat_template_kwargs,
                template_date=settings.template_date,
            ),
            "max_length": self.max_length,
            "too_long": settings.too_long,
            "on_bad_row": settings.on_bad_row,
        }

    def block(self, records: Sequence[data.Record]) -> list[data.Example]:
        """Return the examples of some records of a stream, and print what was dropped."""
        settings = self.config.data
        rows: list[data.AnyRow] = []
        problems: list[tuple[str, str | data.BadRow]] = []
        for record in records:
            data.parse_record(record, self._parse, rows, problems)
        if settings.on_bad_row != "drop":
            data.raise_first(data.describe_problems(problems))
        examples, counts = self._encode(rows)
        self._check_vocabulary(examples)
        self.counts["block"] = counts = counts.with_bad(len(problems))
        noted = counts.dropped, counts.bad, counts.left_out
        if any((*noted, counts.empty_answers, counts.unended_answers)):
            text = describe_counts(counts, self.max_length)
            self.console.print(f"records from {records[0][0]} on: {text}")
        return examples


def answers_parser(config: Config) -> Callable[[Any, str], Sequence[data.AnyRow]]:
    """Return `parse(record, where)` for the rows of an objective that compares answers."""
    parse = data.parse_judged if _form(config) == "judged" else data.parse_pair
    settings = config.data
    return lambda record, where: [parse(record, where, settings.prompt, settings.ignore_columns)]


def _form(config: Config) -> str:
    """Return the form of the rows that the objective takes."""
    if not config.train.compares_answers:
        return "one"
    return "judged" if config.train.objective == "kto" else "pairs"


def today() -> str:
    """Return the date of this machine, as YYYY-MM-DD."""
    return datetime.date.today().isoformat()


def check_vocabulary(examples: Iterable[data.Example], model: str, vocab_size: int) -> None:
    """Raise, with the rows, for tokens that `model` has no embedding for.

    Raises:
        UserError: tokens of `vocab_size` or above.
    """
    found = ((example.where, _first_unknown(example.tokens, vocab_size)) for example in examples)
    data.raise_first(
        [
            f"{where}: token {token}, and the vocab_size of {model} is {vocab_size}: model and "
            "tokenizer (or the row's own input_ids) do not belong together"
            for where, token in found
            if token is not None
        ]
    )


def _first_unknown(tokens: np.ndarray, vocab_size: int) -> int | None:
    """Return the first token that an embedding of `vocab_size` rows does not have."""
    unknown = tokens[(tokens < 0) | (tokens >= vocab_size)]
    return int(unknown[0]) if unknown.size else None


def describe_counts(counts: data.Counts, limit: int) -> str:
    """Return a line on the rows of a source: read, cut, dropped."""
    share = counts.supervised_tokens / max(1, counts.total_tokens)
    notes = [
        f"{counts.examples:,} examples",
        f"{counts.total_tokens:,} tokens, {share:.0%} supervised",
    ]
    if counts.truncated:
        notes.append(f"{counts.truncated} cut to {limit} tokens (the longest has {counts.longest})")
    if counts.dropped:
        notes.append(f"{counts.dropped} dropped as longer than {limit} tokens")
    if counts.bad:
        notes.append(f"{counts.bad} bad rows dropped")
    if counts.packed:
        notes.append(f"{counts.packed} packed rows taken apart into their sequences")
    if counts.left_out:
        notes.append(f"{counts.left_out} packed sequences without a supervised token left out")
    if counts.unaligned:
        notes.append(f"{counts.unaligned} whose prompt alone splits into other tokens")
    if counts.empty_answers:
        notes.append(f"{counts.empty_answers} with an empty answer, which teach its end alone")
    if counts.unended_answers:
        notes.append(
            f"{counts.unended_answers} with an earlier answer that no end-of-turn token ends"
        )
    return "; ".join(notes)


def training_sources(config: Config) -> Mapping[str, float]:
    """Return the sources of `data.train` with their weights.

    Raises:
        UserError: none is named.
    """
    named = config.data.train
    if named is None:
        raise UserError(
            "data.train is not set: a file of rows, a directory of them, org/name on the hub, or "
            "demo:usaddress"
        )
    return {named: 1.0} if isinstance(named, str) else named


def read_sets(config: Config, encoder: Encoder) -> tuple[TrainData, dict[str, DataSet]]:
    """Return the training data, and the held-out sets (`task`, `regression`) of the config.

    Raises:
        UserError: data that cannot be read or used.
    """
    settings, console = config.data, encoder.console
    weights = training_sources(config)
    if settings.streaming:
        (source,) = weights
        return TrainData({}, weights, stream=source), _held_out(config, encoder, None)
    sets = {
        source: DataSet([], encoder.examples(source, f"data.train {source}")) for source in weights
    }
    if settings.eval_size is None:
        train = TrainData(sets, weights)
        held_out = _held_out(config, encoder, train)
        return _with_replay(config, encoder, train, held_out), held_out
    sets, task = hold_out(
        *(sets, lambda source: encoder.rows(source).rows, settings.eval_size, config.seed),
        system_prompt=settings.system_prompt,
    )
    console.print(f"held out of data.train: {len(task.examples):,} examples")
    train = TrainData(sets, weights)
    held_out = {"task": task, **_held_out(config, encoder, train)}
    return _with_replay(config, encoder, train, held_out), held_out


def _with_replay(
    config: Config, encoder: Encoder, train: TrainData, held_out: Mapping[str, DataSet]
) -> TrainData:
    if config.data.replay is None:
        return train
    source = config.data.replay
    examples = encoder.for_general_text().examples(source, f"data.replay {source}")
    return add_replay(config, train, examples, held_out.get("regression"), encoder.console)


def read_held_out(config: Config, encoder: Encoder) -> dict[str, DataSet]:
    """Return the held-out sets. The training data are read where these depend on them.

    Raises:
        UserError: data that cannot be read or used; none are named.
    """
    settings = config.data
    if settings.eval_size is not None or (settings.drop_overlap and settings.eval is not None):
        return read_sets(config, encoder)[1]
    found = _held_out(config, encoder, None)
    if not found:
        raise UserError("nothing to measure on: set data.eval, data.regression or both")
    return found


def _held_out(config: Config, encoder: Encoder, train: TrainData | None) -> dict[str, DataSet]:
    found, settings = {}, config.data
    if settings.eval is not None:
        examples = encoder.examples(settings.eval, "data.eval")
        if train is not None:
            drop = settings.drop_overlap
            examples = without_overlap(examples, train, drop, encoder.console)
        rows = rows_of(examples, encoder.rows(settings.eval).rows)
        found["task"] = DataSet(rows, examples, settings.system_prompt)
    if settings.regression is not None:
        general = encoder.for_general_text()
        examples = general.examples(settings.regression, "data.regression")
        rows = rows_of(examples, general.rows(settings.regression).rows)
        found["regression"] = DataSet(rows, examples)
    return found


def _describe_sharing(loaders: Iterable[data.Loader]) -> str:
    """Return a line on the tokens that rows hold once for several texts."""
    found = [(one.tokens, sum(len(example.tokens) for example in one.examples)) for one in loaders]
    own, whole = map(sum, zip(*found, strict=True))
    return (
        f"shared prompts: an epoch computes {own:,} of {whole:,} tokens; texts of a row that begin "
        "alike have one start"
    )


def make_loader(
    config: Config,
    train: TrainData,
    encoder: Encoder,
    position: Mapping[str, Any] | None,
    console: Console,
) -> data.Loader | data.Mixture | data.StreamLoader:
    """Return the batches of the run; those of a stream go on from `position`."""
    settings, rows = config.data, config.train.batch_size
    options = (rows, settings.max_length, settings.packing, settings.shuffle, config.seed)
    shares = settings.share_prompts is True
    steps = config.train.steps or 0  # of epochs that are not settled; nothing is printed then
    shape = f"{counted(steps, 'step')} of {counted(rows, 'row')}"
    if train.stream is not None:
        source: str = train.stream
        read: Callable[[int], Iterator[data.Record]] = lambda start: data.records(source, start)  # noqa: E731
        console.print(f"{shape} x {settings.max_length} tokens, streamed from {source}")
        blocks = data.Blocks(
            read,
            lambda records: data.with_places(encoder.block(records), encoder.places),
            settings.stream_rows,
            shares,
        )
        return data.StreamLoader(blocks, *options, state=position)
    loaders = {
        name: data.Loader(data.with_places(one.examples, encoder.places), *options, shares)
        for name, one in train.sets.items()
    }
    if shares:
        console.print(_describe_sharing(loaders.values()))
    if len(loaders) == 1:
        (loader,) = loaders.values()
        source, rows_per_epoch = next(iter(train.sets)), loader.rows_per_epoch
        console.print(
            f"{shape} x {loader.row_length} tokens, {loader.efficiency:.0%} filled: "
            f"{steps * rows / rows_per_epoch:.2f} epochs of {source} "
            f"({counted(rows_per_epoch, 'row')})"
        )
        return loader
    mixture = data.Mixture(loaders, train.weights)
    console.print(f"{shape} x {mixture.row_length} tokens, {mixture.efficiency:.0%} filled")
    for name, one in loaders.items():
        share = mixture.shares[name]
        console.print(
            f"{name}: {share:.1%} of the rows, {share * steps * rows / one.rows_per_epoch:.2f} "
            f"epochs ({counted(one.rows_per_epoch, 'row')})"
        )
    return mixture
