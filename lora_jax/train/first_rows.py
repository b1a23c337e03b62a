"""Preview of a run's data: checks files, rows and columns on the first rows of each source."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from lora_jax import data, demo
from lora_jax.config import Config
from lora_jax.data import sets
from lora_jax.errors import counted

_ROWS = 20
_Parse = Callable[[Any, str], Sequence[data.AnyRow]]


def preview_sources(config: Config, classifies: bool) -> Iterator[str]:
    """Read the first rows of every source, and yield a line on each: what was read, the columns
    that are not used, or why nothing was read.

    Raises:
        UserError: no training data; files that are missing or cannot be read; bad rows.
    """
    settings = config.data
    parse = partial(
        data.parse_rows,
        prompt=settings.prompt,
        completion=settings.completion,
        ignore_columns=settings.ignore_columns,
    )
    general = partial(data.parse_rows, ignore_columns=settings.ignore_columns)
    if config.train.compares_answers:
        parse = sets.answers_parser(config)
    if classifies:
        parse = general = partial(
            data.parse_label_row,
            columns=settings.text,
            label=settings.label,
            ignore_columns=settings.ignore_columns,
        )
    sources: list[tuple[str, str, Any]] = []
    if settings.train is None:
        yield "data.train is not set: a run needs it"
    else:
        sources += [("data.train", source, parse) for source in sets.training_sources(config)]
    if settings.eval is not None:
        sources.append(("data.eval", settings.eval, parse))
    if settings.regression is not None:
        sources.append(("data.regression", settings.regression, general))
    if settings.replay is not None:
        sources.append(("data.replay", settings.replay, general))
    for name, source, reads in sources:
        yield f"{name} {source}: {_look(source, reads, settings.on_bad_row)}"


def _look(source: str, parse: _Parse, on_bad_row: str) -> str:
    if data.is_hub_name(source):
        return "not checked, as it is on the hub"
    if source.startswith("demo:") and not demo.is_cached(source.removeprefix("demo:")):
        return "not checked, as it has not been fetched yet"
    records = list(islice(data.records(source), _ROWS))
    rows, problems, unused = 0, [], {}
    for where, record, problem in records:
        try:
            if problem is not None:
                raise data.BadRow(problem)
            rows += len(_rows(parse(record, where)))
            if isinstance(record, dict):
                unused |= dict.fromkeys(_unused(record, where, parse))
        except data.BadRow as error:
            problems.append((where, error))
    if on_bad_row != "drop" or not rows:
        data.raise_first(data.describe_problems(problems))
    notes = [f"{counted(len(records), 'row')} read" if len(records) < _ROWS else _first()]
    if problems:
        notes.append(f"{counted(len(problems), 'bad row')} to be dropped")
    if unused:
        notes.append(f"columns not used: {', '.join(map(repr, unused))}")
    return "; ".join(notes)


def _first() -> str:
    return f"the first {_ROWS} rows read, the rest not checked"


def _rows(found: Any) -> Sequence[data.AnyRow]:
    """Return a list of rows; a row with a label comes alone."""
    return found if isinstance(found, list | tuple) else [found]


def _unused(record: dict, where: str, parse: _Parse) -> Iterator[str]:
    """Yield the columns without which the record makes the same rows."""
    whole = repr(parse(record, where))
    for column in record:
        rest = {key: value for key, value in record.items() if key != column}
        try:
            if repr(parse(rest, where)) == whole:
                yield str(column)
        except data.BadRow:
            continue
