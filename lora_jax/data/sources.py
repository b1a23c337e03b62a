"""Records of files, directories and the Hugging Face hub, and rows made of them.

    read("train.jsonl").rows[0].messages
    read("org/name:train[:10%]", prompt="{question}", completion="{answer}")
    for where, record, problem in records("huge.jsonl", start=5_000_000): ...

A source is the first of these that applies:

    demo:NAME                       packaged data of `lora_jax.demo`
    FILE                            .json, .jsonl, .csv, .tsv (also with .gz), .parquet, .arrow
    DIRECTORY                       all such files directly in it, sorted by name; or one data set
                                    saved there by `datasets`
    org/name[/CONFIG][:SPLIT]       a data set of the hub; SPLIT is `train` by default, and may be a
                                    slice: train[:10%], train[100:200], train+test
    a pattern                       data/*.jsonl, data/**/*.csv

A .json file has a list of objects, or {"data": [..]}. The first line of a .csv or .tsv file names
its columns. A file without records is an error, and so is one that cannot be read to its end. In
tables of Arrow and Parquet, null inside a value means an absent key.

`lora_jax.data.parse` defines the forms of a record.
"""

import glob
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_jax import demo
from lora_jax.config import expand, is_directory, is_file, shown
from lora_jax.config.text import exists, unreadable
from lora_jax.data import keys, readers
from lora_jax.data.named_columns import columns
from lora_jax.data.parse import parse_rows
from lora_jax.data.readers import Record
from lora_jax.data.rows import AnyRow, BadRow, printable
from lora_jax.errors import UserError, nearest

_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
_ENDINGS = f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
_ZIPPED = ("json", "jsonl", "csv", "tsv")
_NO_FILE = rf"(?![^:]*\.({'|'.join(s[1:] for s in _SUFFIXES)}|({'|'.join(_ZIPPED)})\.gz)$)"
_HUB_NAME = re.compile(
    _NO_FILE + r"(?P<repository>[\w-][\w.-]*/\w[\w.-]*)(/(?P<config>[\w-][\w.-]*))?"
    r"(:(?P<split>[\w.+\-\[\]:%()]+))?"
)
_PROBLEMS = 10  # listed in an error; the others are counted


@dataclass(frozen=True)
class Rows:
    """Rows of a source."""

    rows: list[AnyRow]
    dropped: int  # records left out under on_bad_row="drop"


def read(
    source: str | Path,
    *,
    prompt: str | None = None,
    completion: str | None = None,
    ignore_columns: Sequence[str] = (),
    on_bad_row: str = "error",
    parse: Callable[[Any, str], Sequence[AnyRow]] | None = None,
) -> Rows:
    """Read all rows of a source; a `Path` is always a file or directory.

    Args:
        source: a path, `demo:NAME` or a data set of the hub.
        prompt: see `parse_rows`, as for `completion` and `ignore_columns`.
        completion: see `parse_rows`.
        ignore_columns: see `parse_rows`.
        on_bad_row: for records that are not rows and lines that are not records. "error" refuses
            them; "drop" leaves them out and counts them.
        parse: `parse(record, where)`, used instead of `parse_rows`.

    Raises:
        UserError: the source cannot be read; a file without records, or a damaged one; malformed
            `prompt` or `completion`; bad records, or under "drop" only bad records. Ten of them are
            listed with file and line, and the others counted.

    Example:
        >>> from lora_jax import data
        >>> row = data.read(rows).rows[0]  # the path of a .jsonl file
        >>> [message["role"] for message in row.messages]
        ['user', 'assistant']
    """
    for setting, template in (("data.prompt", prompt), ("data.completion", completion)):
        if template is not None:
            columns(template, setting)
    if parse is None:
        parse = partial(
            parse_rows, prompt=prompt, completion=completion, ignore_columns=ignore_columns
        )
    rows: list[AnyRow] = []
    problems: list[tuple[str, str | BadRow]] = []
    damaged: list[str] = []
    try:
        for record in _records(source, 0, stream=False):
            parse_record(record, parse, rows, problems)
    except UserError as error:
        damaged.append(str(error))
    described = keys.describe_problems(problems)
    if on_bad_row != "drop":
        raise_first([*damaged, *described])
    raise_first(damaged)
    if not rows:
        raise_first(described)
    return Rows(rows, len(problems))


def parse_record(
    record: Record,
    parse: Callable[[Any, str], Sequence[AnyRow]],
    rows: list[AnyRow],
    problems: list[tuple[str, str | BadRow]],
) -> None:
    """Append the rows of a record to `rows`, or (where, problem) to `problems`."""
    where, value, problem = record
    if problem is not None:
        problems.append((where, problem))
        return
    try:
        rows.extend(parse(value, where))
    except BadRow as error:
        problems.append((where, error))


def records(source: str | Path, start: int = 0) -> Iterator[Record]:
    """Yield (where, record, problem) for each record of a source after the first `start`.

    `problem` is the reason why there is no record, such as invalid JSON. Records are not checked.
    Only .json files are read at once. Hub data sets are streamed, except for slices of splits,
    which are downloaded first.

    Raises:
        UserError: the source cannot be read; on reaching it, a file without records or a damaged
            one.
    """
    return _records(source, start, stream=True)


def is_hub_name(source: str) -> bool:
    """Return True if `source` is org/name[/CONFIG][:SPLIT] and not a file or directory."""
    return _HUB_NAME.fullmatch(source) is not None and not os.path.exists(source)


def is_data_file(path: Path) -> bool:
    """Return True if a file has the suffix of a supported format."""
    return _suffix(path) != ""


def source_files(source: str | Path) -> list[Path]:
    """Return the files from which a source is read, in order; none for a hub data set.

    Raises:
        UserError: the source cannot be read.
    """
    if isinstance(source, str) and is_hub_name(source):
        return []
    paths = [path for _, path in _files(source)]
    if paths[0].is_dir():  # saved by `datasets`: the data and their metadata
        return sorted(path for path in paths[0].iterdir() if path.is_file())
    return paths


def raise_first(problems: Sequence[str], limit: int = _PROBLEMS) -> None:
    """Raise one `UserError` with the first `limit` problems and a count of the others, if any."""
    if problems:
        rest = len(problems) - limit
        more = [f"... and {rest} more problem{'s' * (rest > 1)}"] if rest > 0 else []
        raise UserError("\n".join([*problems[:limit], *more]))


def _records(source: str | Path, start: int, stream: bool) -> Iterator[Record]:
    if isinstance(source, str) and is_hub_name(source):
        found = _HUB_NAME.fullmatch(source)
        assert found is not None
        named = (found["repository"], found["config"], found["split"] or "train")
        if not (yield from readers.read_hub(source, *named, start, stream)):
            raise UserError(f"{source} holds no rows")
        return
    for name, path in _files(source):
        if path.is_dir():
            held = yield from readers.read_saved(name, path, start)
        else:
            held = yield from _file(name, path, start)
        if not held:
            raise UserError(f"{name}:1: the file holds no rows")
        start = max(0, start - held)


def _files(source: str | Path) -> list[tuple[str, Path]]:
    """Return (name for messages, path) of every file, or of a directory saved by `datasets`."""
    if isinstance(source, str) and source.startswith("demo:"):
        source = demo.path(source.removeprefix("demo:"))
    try:
        path = expand(source)
        if is_directory(path):
            if (path / "dataset_dict.json").exists():
                splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
                raise UserError(f"{path} has several splits: name one of its directories {splits}")
            if (path / "state.json").exists():
                return [(_name(path.name), path)]
            files = [p for p in sorted(path.iterdir()) if _suffix(p) and p.is_file()]
            if not files:
                raise UserError(
                    f"directory {path} holds no {_ENDINGS} file; for files in its subdirectories, "
                    f"use a pattern such as {path}/**/*.parquet"
                )
            return [(_name(file.name), file) for file in files]
        if is_file(path):
            if not _suffix(path):
                raise UserError(f"data file {path} must end in {_ENDINGS}, not {path.suffix!r}")
            return [(_name(path.name), path)]
        if isinstance(source, str) and glob.has_magic(source):
            found = sorted(map(Path, glob.glob(str(path), recursive=True)))
            files = [(_name(str(file)), file) for file in found if _suffix(file) and file.is_file()]
            if not files:
                raise UserError(f"no {_ENDINGS} file matches {source}")
            return files
        if exists(path):
            raise UserError(f"data file {shown(path)} is not a file, but a device, pipe or socket")
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"data file {shown(path)} does not exist.{nearest(path.name, siblings)}")
    except OSError as error:
        raise unreadable(source, error) from error


def _name(path: str) -> str:
    """Return a file name that can be printed, with bytes outside UTF-8 escaped."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def _suffix(path: Path) -> str:
    """Return the suffix that determines the format, or ""."""
    name = path.name.lower()
    zipped = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    known = suffix[1:] in _ZIPPED if zipped else suffix in _SUFFIXES
    return suffix if known else ""


def _file(name: str, path: Path, start: int) -> readers.Reader:
    by_suffix: dict[str, Callable[[str, Path, int], readers.Reader]] = {
        ".json": readers.read_document,
        ".jsonl": readers.read_lines,
        ".csv": partial(readers.read_table, delimiter=","),
        ".tsv": partial(readers.read_table, delimiter="\t"),
        ".parquet": readers.read_parquet,
        ".arrow": readers.read_arrow,
    }
    try:
        return (yield from by_suffix[_suffix(path)](name, path, start))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or printable(str(error))
        raise UserError(f"{path} cannot be read: {reason}") from error
