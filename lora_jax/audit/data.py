"""Preview of a run's data: examples as the model sees them, and statistics of all examples.

    report = inspect(config, console)  # trains nothing, loads no weights
    print_report(report, Console())

Of a stream, only the first `data.stream_rows` records are read.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import islice
from os.path import commonprefix
from typing import Any

from rich.console import Console

from lora_jax import data
from lora_jax.audit.preview import Overlap, Packing, Pair, Report, Shown
from lora_jax.audit.preview import plot as plot
from lora_jax.audit.preview import print_report as print_report
from lora_jax.config import Config
from lora_jax.data import sets
from lora_jax.data.sets import DataSet, TrainData
from lora_jax.errors import UserError
from lora_jax.session import open_session, settle_date
from lora_jax.train import epochs, setup, warn


def inspect(config: Config, console: Console, examples: int = 3) -> Report:
    """Read the data of a run and measure them; `examples` of every training source are shown.

    Raises:
        UserError: no training data; a model, tokenizer or data that cannot be read or used; a
            stream whose first records make no example; `examples` below 0.
    """
    if examples < 0:
        raise UserError(f"the number of examples to show must be at least 0, not {examples}")
    sets.training_sources(config)
    session = settle_date(open_session(config, weights=False), console)
    encoder = dataclasses.replace(session.make_encoder(console), vocab_size=None)
    train, held_out = sets.read_sets(session.config, encoder)
    session = session.with_config(epochs.settle(session.config, train, encoder))
    config, model = session.config, session.model
    counts, records = dict(encoder.counts), None
    if train.stream is not None:
        records, train = _first_block(train.stream, encoder)
        counts[next(iter(warn.name_training(train)))] = encoder.counts["block"]
    tests = warn.name_held_out(config, held_out)
    training = [example for one in train.sets.values() for example in one.examples]
    everything = warn.name_training(train) | tests
    measured = warn.measure(everything, counts)
    warnings = warn.find(session, train, held_out, measured)
    try:
        setup.check_sizes(config, model, list(everything.values()), console)
    except UserError as error:  # where a run would stop, the report says what it knows
        warnings.append(str(error))
    return Report(
        config=config,
        records=records,
        shown=[
            shown
            for one in train.sets.values()
            for example in one.examples[:examples]
            for shown in show_all(example, session.tokenizer, model.labels)
        ],
        sets=measured,
        repeats=find_repeats(training),
        overlaps={name: find_overlap(one.examples, training) for name, one in tests.items()},
        packing=_pack(config, train, encoder, records is not None),
        warnings=warnings,
    )


def _first_block(source: str, encoder: sets.Encoder) -> tuple[int, TrainData]:
    """The number of records in the first block of a stream, and their examples."""
    block = list(islice(data.records(source), encoder.config.data.stream_rows))
    examples = encoder.block(block)
    if not examples:
        raise UserError(
            f"none of the first {len(block)} records of {source} makes an example; see "
            "data.max_length and data.on_bad_row"
        )
    return len(block), TrainData({source: DataSet([], examples)}, {source: 1.0})


def show_all(example: data.Example, tokenizer: Any, labels: Sequence[str] = ()) -> list[Shown]:
    """Return an example as text; of a pair both texts, and of an answer with a label the answer."""
    if example.second_start is None:
        return [show(example, tokenizer, labels)]
    first, second = (show(text, tokenizer) for text in example.texts)
    names = {data.CHOSEN: "chosen", data.REJECTED: "rejected"}
    if example.roles[1] == data.OTHER:
        label = "true" if example.roles[0] == data.CHOSEN else "false"
        return [dataclasses.replace(first, where=f"{first.where}, label {label}")]
    return [
        dataclasses.replace(one, where=f"{one.where}, {names[role]}")
        for one, role in zip((first, second), example.roles, strict=True)
    ]


def show(example: data.Example, tokenizer: Any, labels: Sequence[str] = ()) -> Shown:
    """Return an example as text with its special tokens, and the name of its label, if it has one.

    A character whose bytes are split over two pieces is shown in the later one. Unknown token ids
    are shown as <ID>.
    """
    tokens, weights = example.tokens.tolist(), example.loss_weights
    label = [] if example.pair_start is None else [(f" -> {labels[tokens.pop()]}", 1.0)]
    unknown = [name is None for name in tokenizer.convert_ids_to_tokens(tokens)]
    marks = list(zip(weights[: len(tokens)].tolist(), unknown, strict=True))
    edges = [i for i in range(1, len(tokens)) if marks[i] != marks[i - 1]]

    def decode(count: int) -> str:
        return tokenizer.decode(
            tokens[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    # Decode from the start every time: a piece alone may lose a space or half a character.
    whole, pieces, start, done = decode(len(tokens)), [], 0, 0
    for end in [*edges, len(tokens)]:
        weight, is_unknown = marks[end - 1]
        if is_unknown:
            text = "".join(f"<{token}>" for token in tokens[start:end])
        else:
            upto = max(done, len(commonprefix([decode(end), whole])))
            text, done = whole[done:upto], upto
        pieces.append((text, weight))
        start = end
    return Shown(example.where, len(tokens), warn.count_supervised(example), pieces + label)


def find_repeats(examples: Iterable[data.Example]) -> list[Pair]:
    """Return the examples that occurred before, each with the place of the first one."""
    first: dict[bytes, str] = {}
    pairs = []
    for example in examples:
        key = example.tokens.tobytes()
        if key in first:
            pairs.append((example.where, first[key]))
        else:
            first[key] = example.where
    return pairs


def find_overlap(examples: Iterable[data.Example], training: Sequence[data.Example]) -> Overlap:
    """Find examples that are also in `training`, with the same answer or another one.

    A plain text has no prompt, so it matches only as a whole.
    """
    same: dict[bytes, str] = {}
    asked: dict[bytes, str] = {}
    for example in training:
        same.setdefault(example.tokens.tobytes(), example.where)
        asked.setdefault(data.prompt_key(example), example.where)
    identical, same_prompt = [], []
    for example in examples:
        if (key := example.tokens.tobytes()) in same:
            identical.append((example.where, same[key]))
        elif data.has_prompt(example) and (key := data.prompt_key(example)) in asked:
            same_prompt.append((example.where, asked[key]))
    return Overlap(identical, same_prompt)


def _pack(
    config: Config, train: TrainData, encoder: sets.Encoder, streamed: bool
) -> dict[str, Packing]:
    loader = sets.make_loader(config, train, encoder, None, Console(quiet=True))
    if isinstance(loader, data.Mixture):
        loaders, shares = loader.loaders, loader.shares
        position = loader.position(config.train.total_steps)["sources"]
    else:
        assert isinstance(loader, data.Loader)
        loaders, shares = dict.fromkeys(train.sets, loader), dict.fromkeys(train.sets, 1.0)
        position = dict.fromkeys(train.sets, loader.position(config.train.total_steps))
    found = {}
    for name, one in loaders.items():
        epoch, row, rows = position[name]["epoch"], position[name]["row"], one.rows_per_epoch
        length = config.data.max_length if streamed else one.row_length
        supervised = [
            sum(map(warn.count_supervised, one.row(epoch * rows + i))) for i in range(rows)
        ]
        found[name] = Packing(
            share=shares[name],
            rows_per_epoch=rows,
            row_length=length,
            efficiency=one.efficiency * one.row_length / length,
            epochs=epoch + row / rows,
            supervised_tokens=epoch * sum(supervised) + sum(supervised[:row]),
        )
    return found
