"""The data of a run: what it trains on, and what it is measured on."""

import dataclasses
import datetime
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lora_jax import data
from lora_jax.cache import cache_directory
from lora_jax.config import ENCODING_KEYS, Config, virtual_tokens
from lora_jax.errors import UserError, counted


@dataclass(frozen=True)
class DataSet:
    """Rows as they were read (none if they came out of the cache) and as the model sees them."""

    rows: list[data.AnyRow]
    examples: list[data.Example]
    system_prompt: str | None = None


def digest(sets: Iterable[DataSet]) -> str:
    """Digest of the examples of some sets, in their order."""
    total = hashlib.sha256()
    for one in sets:
        total.update(f"{len(one.examples)} examples".encode())
        for example in one.examples:
            total.update(len(example.tokens).to_bytes(8, "little"))
            total.update(example.tokens.data)
            total.update(example.loss_weights.data)
    return total.hexdigest()


@dataclass(frozen=True)
class TrainData:
    """Training data of a run: sets by source, each with its weight, or a source to stream."""

    sets: Mapping[str, DataSet]
    weights: Mapping[str, float]
    stream: str | None = None

    def digest(self) -> str:
        """Digest of all examples and weights, wherever their files are; of the files if streamed,
        or of the name of a data set of the hub.
        """
        if self.stream is not None:
            files = data.source_files(self.stream)
            return data.digest_files(files) if files else self.stream
        names = sorted(self.sets)
        shares = repr([float(self.weights[name]) for name in names] if len(names) > 1 else [])
        return hashlib.sha256(
            (shares + digest(self.sets[name] for name in names)).encode()
        ).hexdigest()


@dataclass(frozen=True)
class Encoder:
    """Sources to examples, by the settings of a run. What is cut, dropped or damaged is said.

    counts: what became of the rows, by the `what` of `examples`; under "block" of the last `block`
    """

    config: Config
    tokenizer: Any
    tokenizer_digest: str
    console: Console
    vocab_size: int | None = None  # of the model; None does not check tokens against it
    labels: tuple[str, ...] | None = None  # of a model that classifies
    read: dict[str, data.Rows] = field(default_factory=dict)
    counts: dict[str, data.Counts] = field(default_factory=dict)

    @property
    def places(self) -> int:
        """Tokens at the start of every text that a batch keeps free for virtual ones."""
        adapter = self.config.adapter
        return virtual_tokens(adapter) if adapter.trains_prompt else 0

    @property
    def max_length(self) -> int:
        """Tokens that an example can have of its own."""
        return self.config.data.max_length - self.places

    def for_general_text(self) -> "Encoder":
        """The same for text that has no part in the task, and so neither its system prompt nor its
        columns.
        """
        settings = dataclasses.replace(
            self.config.data, system_prompt=None, prompt=None, completion=None
        )
        config = dataclasses.replace(self.config, data=settings)
        return dataclasses.replace(self, config=config, read={})

    def rows(self, source: str) -> data.Rows:
        """The rows of a source, read once."""
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
        return data.parse_rows(record, where, settings.prompt, settings.completion, ignored)

    def _encode(self, rows: Sequence[Any]) -> tuple[list[data.Example], data.Counts]:
        """Rows as examples; none need be left."""
        settings = self.config.data
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
        """All examples of a source, out of the cache where it has them; says what became of it."""
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
        self.console.print(f"{what}: {describe(counts, self.max_length)}")
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
        }

    def _check_vocabulary(self, examples: Sequence[data.Example]) -> None:
        if self.vocab_size is not None:
            check_vocabulary(examples, self.config.model, self.vocab_size)

    def options(self) -> dict[str, Any]:
        """Arguments of `data.encode_rows`."""
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
        """The examples of some records of a stream; what is dropped is said."""
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
            told = describe(counts, self.max_length)
            self.console.print(f"records from {records[0][0]} on: {told}")
        return examples


def today() -> str:
    """The day on this machine, as YYYY-MM-DD."""
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


def describe(counts: data.Counts, limit: int) -> str:
    """Describe what became of the rows of a source, for people."""
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
    """The sources of `data.train` with their weights.

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
    """The training data, and the held-out sets (`task`, `regression`) that the config names.

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
        return train, _held_out(config, encoder, train)
    sets, task = hold_out(sets, encoder, settings.eval_size, config.seed)
    console.print(f"held out of data.train: {len(task.examples):,} examples")
    train = TrainData(sets, weights)
    return train, {"task": task, **_held_out(config, encoder, train)}


def read_held_out(config: Config, encoder: Encoder) -> dict[str, DataSet]:
    """The held-out sets alone; the training data are read where these depend on them.

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
            examples = _without_overlap(examples, train, drop, encoder.console)
        rows = _rows_of(examples, encoder.rows(settings.eval).rows)
        found["task"] = DataSet(rows, examples, settings.system_prompt)
    if settings.regression is not None:
        general = encoder.for_general_text()
        examples = general.examples(settings.regression, "data.regression")
        rows = _rows_of(examples, general.rows(settings.regression).rows)
        found["regression"] = DataSet(rows, examples)
    return found


def _rows_of(examples: Sequence[data.Example], rows: Sequence[data.AnyRow]) -> list[data.AnyRow]:
    """The rows of one source that became these examples."""
    kept = {example.where for example in examples}
    found = [row for row in rows if row.where in kept]
    if len({row.where for row in found}) < len(kept):
        raise RuntimeError(f"examples without their rows, such as {examples[0].where}")
    return found


def hold_out(
    sets: Mapping[str, DataSet], encoder: Encoder, size: float, seed: int
) -> tuple[dict[str, DataSet], DataSet]:
    """Take `size` of the examples (below 1: a share of them) out of the sets.

    Examples with the same prompt stay together, in whatever sources they stand, so that none is
    asked what was trained on; every source gives its share, as far as that allows, and the choice
    depends on the seed alone.

    Raises:
        UserError: nothing would be left on one of the two sides.
    """
    left, examples, rows = {}, [], []
    total = sum(len(one.examples) for one in sets.values())
    held_out: dict[bytes, bool] = {}  # by prompt, of the sources so far
    wanted = 0.0  # of the sources so far: what one gives too much, the next gives less
    for source, one in sets.items():
        wanted += len(one.examples) * (size if size < 1 else size / total)
        groups: dict[bytes, list[int]] = {}
        for index, example in enumerate(one.examples):
            groups.setdefault(_question(example), []).append(index)
        chosen = {i for key, group in groups.items() if held_out.get(key) for i in group}
        members = [group for key, group in groups.items() if key not in held_out]
        for place in data.order(len(members), seed, 0):
            if len(examples) + len(chosen) >= round(wanted):
                break
            chosen.update(members[place])
        held_out |= {key: group[0] in chosen for key, group in groups.items()}
        held = [one.examples[i] for i in sorted(chosen)]
        examples += held
        kept = [e for i, e in enumerate(one.examples) if i not in chosen]
        if not kept:
            raise UserError(
                f"data.eval_size={size:g} leaves nothing of {source} to train on: it has "
                f"{len(one.examples)} examples"
            )
        left[source] = DataSet([], kept, one.system_prompt)
        rows += _rows_of(held, encoder.rows(source).rows)
    if not examples:
        raise UserError(f"data.eval_size={size:g} of {total} examples holds none out")
    return left, DataSet(rows, examples, encoder.config.data.system_prompt)


def _question(example: data.Example) -> bytes:
    """Return what must not be on both sides: the prompt, or all of a text, which has none."""
    return data.prompt_key(example) if data.has_prompt(example) else example.tokens.tobytes()


def _without_overlap(
    examples: list[data.Example], train: TrainData, drop: bool, console: Console
) -> list[data.Example]:
    """Leave out held-out examples that are in the training data too, with `drop`; a warning of
    the run tells of them otherwise (`warn`).
    """
    if not drop:
        return examples
    seen = {e.tokens.tobytes() for one in train.sets.values() for e in one.examples}
    apart = [example for example in examples if example.tokens.tobytes() not in seen]
    both = len(examples) - len(apart)
    if both and not apart:
        raise UserError(
            f"all {both} rows of data.eval are in data.train too: data.drop_overlap=true leaves "
            "nothing to measure"
        )
    if both:
        console.print(f"data.eval: {both} rows left out, as they are in data.train too")
    return apart


def make_loader(
    config: Config,
    train: TrainData,
    encoder: Encoder,
    position: Mapping[str, Any] | None,
    console: Console,
) -> data.Loader | data.Mixture | data.StreamLoader:
    """The batches of the run; those of a stream go on from `position`."""
    settings, rows = config.data, config.train.batch_size
    options = (rows, settings.max_length, settings.packing, settings.shuffle, config.seed)
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
        )
        return data.StreamLoader(blocks, *options, state=position)
    loaders = {
        name: data.Loader(data.with_places(one.examples, encoder.places), *options)
        for name, one in train.sets.items()
    }
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
