"""Records from files, directories and the Hugging Face hub, and the rows they become.

    read("train.jsonl").rows[0].messages
    read("org/name:train[:10%]", prompt="{question}", completion="{answer}")
    for where, record, problem in records("huge.jsonl", start=5_000_000): ...

A source is one of, and what stands first wins:

    demo:NAME                       as `lora_jax.demo` has it
    FILE                            .json, .jsonl, .csv, .tsv (also with .gz), .parquet, .arrow
    DIRECTORY                       all such files directly in it, by name; or one data set that
                                    `datasets` saved there
    org/name[/CONFIG][:SPLIT]       of the hub; SPLIT is `train` unless named, and takes slices:
                                    train[:10%], train[100:200], train+test
    a pattern                       data/*.jsonl, data/**/*.csv

A .json file holds a list of objects, or {"data": [..]}. The first line of a .csv or .tsv file names
its columns. A file without records is an error, as is one that cannot be read to its end. In tables
of Arrow and Parquet, null inside a value stands for what is absent.

What a record may be is told by `lora_jax.data.rows`.
"""

import csv
import glob
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lora_jax import demo
from lora_jax.config import UserError, nearest
from lora_jax.data.rows import AnyRow, BadRow, columns, kind, parse_row, printable

_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
_ENDINGS = f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
_ZIPPED = ("json", "jsonl", "csv", "tsv")
_NO_FILE = rf"(?![^:]*\.({'|'.join(s[1:] for s in _SUFFIXES)}|({'|'.join(_ZIPPED)})\.gz)$)"
_HUB_NAME = re.compile(
    _NO_FILE + r"(?P<repository>[\w-][\w.-]*/\w[\w.-]*)(/(?P<config>[\w-][\w.-]*))?"
    r"(:(?P<split>[\w.+\-\[\]:%()]+))?"
)
_PROBLEMS = 10  # shown; the others are counted
_LARGEST_FIELD = 2**31 - 1  # characters in a field of a .csv file

# (where, the record or None, what is wrong or None)
Record = tuple[str, Any, str | None]
_Reader = Generator[Record, None, int]


@dataclass(frozen=True)
class Rows:
    """What `read` found."""

    rows: list[AnyRow]
    dropped: int  # records left out under on_bad_row="drop"


def read(
    source: str | Path,
    *,
    prompt: str | None = None,
    completion: str | None = None,
    on_bad_row: str = "error",
) -> Rows:
    """All rows of a source; a `Path` is a file or directory, whatever its name looks like.

    `prompt` and `completion` name columns, as `parse_row` has them. `on_bad_row`: "error" refuses,
    "drop" leaves out and counts the records that are no rows and the lines that are no records.

    Raises:
        UserError: nothing readable there; a file without records, or damaged; malformed `prompt` or
            `completion`; bad records, or under "drop" nothing else: the first ten, each beginning
            with its file and line, and the number of the others.
    """
    for setting, template in (("prompt", prompt), ("completion", completion)):
        if template is not None:
            columns(template, setting)
    rows: list[AnyRow] = []
    problems: list[str] = []
    damaged: list[str] = []
    try:
        for where, record, problem in _records(source, 0, stream=False):
            if problem is None:
                try:
                    rows.append(parse_row(record, where, prompt, completion))
                except BadRow as error:
                    problem = str(error)
            if problem is not None:
                problems.append(f"{where}: {problem}")
    except UserError as error:
        damaged.append(str(error))
    if on_bad_row != "drop":
        raise_first([*damaged, *problems])
    raise_first(damaged)
    if not rows:
        raise_first(problems)
    return Rows(rows, len(problems))


def records(source: str | Path, start: int = 0) -> Iterator[Record]:
    """(where, record, problem) of a source, one after the other and without the first `start`.

    `problem` says why there is no record, as for a line that is no JSON; a record is not checked.
    Only .json files are read whole. Hub data sets are streamed, but for slices of splits, which
    are fetched first.

    Raises:
        UserError: nothing readable there; on reaching it, a file without records, or damaged.
    """
    return _records(source, start, stream=True)


def is_hub_name(source: str) -> bool:
    """Whether `source` is of the form org/name[/CONFIG][:SPLIT], and no file or directory."""
    return _HUB_NAME.fullmatch(source) is not None and not os.path.exists(source)


def source_files(source: str | Path) -> list[Path]:
    """The files that a source is read from, in order; none for a hub data set.

    Raises:
        UserError: nothing readable there.
    """
    if isinstance(source, str) and is_hub_name(source):
        return []
    paths = [path for _, path in _files(source)]
    if paths[0].is_dir():  # saved by `datasets`: the data and how they are to be read
        return sorted(path for path in paths[0].iterdir() if path.is_file())
    return paths


def raise_first(problems: Sequence[str], limit: int = _PROBLEMS) -> None:
    """Raise the first `limit` problems, if any, in one `UserError` that counts the others."""
    if problems:
        rest = len(problems) - limit
        more = [f"... and {rest} more problem{'s' * (rest > 1)}"] if rest > 0 else []
        raise UserError("\n".join([*problems[:limit], *more]))


def _records(source: str | Path, start: int, stream: bool) -> Iterator[Record]:
    if isinstance(source, str) and is_hub_name(source):
        if not (yield from _hub(source, start, stream)):
            raise UserError(f"{source} holds no rows")
        return
    for name, path in _files(source):
        if path.is_dir():
            held = yield from _saved(name, path, start)
        else:
            held = yield from _file(name, path, start)
        if not held:
            raise UserError(f"{name}:1: the file holds no rows")
        start = max(0, start - held)


def _files(source: str | Path) -> list[tuple[str, Path]]:
    """(name for messages, path) of every file, or of the one directory saved by `datasets`."""
    if isinstance(source, str) and source.startswith("demo:"):
        source = demo.path(source.removeprefix("demo:"))
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            if (path / "dataset_dict.json").exists():
                splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
                raise UserError(
                    f"{path} holds several splits: name one of its directories {splits}"
                )
            if (path / "state.json").exists():
                return [(_name(path.name), path)]
            files = [p for p in sorted(path.iterdir()) if _suffix(p) and p.is_file()]
            if not files:
                raise UserError(
                    f"directory {path} holds no {_ENDINGS} file; {path}/**/*.parquet or the like "
                    "names files below it"
                )
            return [(_name(file.name), file) for file in files]
        if path.is_file():
            if not _suffix(path):
                raise UserError(f"data file {path} must end in {_ENDINGS}, not {path.suffix!r}")
            return [(_name(path.name), path)]
        if isinstance(source, str) and glob.has_magic(source):
            found = sorted(map(Path, glob.glob(str(path), recursive=True)))
            files = [(_name(str(file)), file) for file in found if _suffix(file) and file.is_file()]
            if not files:
                raise UserError(f"no {_ENDINGS} file is named like {source}")
            return files
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"data file {path} does not exist.{nearest(path.name, siblings)}")
    except (OSError, RuntimeError) as error:  # RuntimeError: ~NAME of no user
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{source} cannot be read: {reason}") from error


def _name(path: str) -> str:
    """A file's name as it can be printed: names of bytes that are no UTF-8 hold surrogates."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def _suffix(path: Path) -> str:
    """The ending that tells the format, or the empty string."""
    name = path.name.lower()
    zipped = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    known = suffix[1:] in _ZIPPED if zipped else suffix in _SUFFIXES
    return suffix if known else ""


# One generator per format: the records but for the first `start`. It returns how many the file
# holds, those among them.


def _file(name: str, path: Path, start: int) -> _Reader:
    readers: dict[str, Callable[[str, Path, int], _Reader]] = {
        ".json": _document,
        ".jsonl": _lines,
        ".csv": partial(_table, delimiter=","),
        ".tsv": partial(_table, delimiter="\t"),
        ".parquet": _parquet,
        ".arrow": _arrow,
    }
    try:
        return (yield from readers[_suffix(path)](name, path, start))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or printable(str(error))
        raise UserError(f"{path} cannot be read: {reason}") from error


def _lines(name: str, path: Path, start: int) -> _Reader:
    held = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:  # a byte order mark is an invisible gift of some editors
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            held += 1
            if held > start:
                yield f"{name}:{number}", *_parse(line)[:2]
    return held


def _document(name: str, path: Path, start: int) -> _Reader:
    with _open(path) as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        return 0
    value, problem, line = _parse(data)
    if problem is not None:
        hint = ""
        if "Extra data" in problem:
            hint = " (one object per line? Then the file's name must end in .jsonl)"
        raise UserError(f"{name}:{line}: {problem}{hint}")
    if isinstance(value, dict) and "data" in value:
        value = value["data"]
    if not isinstance(value, list):
        wanted = 'a list of objects or {"data": [...]}'
        raise UserError(f"{name}:1: the file must hold {wanted}, not {kind(value)}")
    for index in range(start, len(value)):
        yield f"{name}[{index}]", value[index], None
    return len(value)


def _parse(data: bytes) -> tuple[Any, str | None, int]:
    """(value, problem or None, the problem's line from 1); never raises."""
    try:
        return json.loads(data.decode("utf-8")), None, 1
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return None, f"invalid UTF-8 (byte 0x{data[error.start]:02x})", line
    except json.JSONDecodeError as error:
        return None, f"invalid JSON: {error.msg} at column {error.colno}", error.lineno
    except RecursionError:
        return None, "invalid JSON: nested too deeply", 1
    except ValueError as error:  # Python refuses integers of thousands of digits
        return None, f"invalid JSON: {error}", 1


def _table(name: str, path: Path, start: int, delimiter: str) -> _Reader:
    held = 0
    header: list[str] | None = None
    with _open_text(path) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        while True:
            where = f"{name}:{reader.line_num + 1}"
            fields, problem = _fields(reader)
            if fields is None:
                return held
            if header is None:
                repeated = [repr(field) for field, count in Counter(fields).items() if count > 1]
                if not problem and repeated:
                    problem = f"the header has a column twice: {printable(', '.join(repeated))}"
                if problem:
                    raise UserError(f"{where}: {problem}")
                header = fields or None  # an empty line is none
                continue
            if problem and "unexpected end of data" in problem:
                # The rest of the file hangs on one quote: more than a bad record.
                raise UserError(f'{where}: a field that begins here with " does not end')
            if not problem and not fields:
                continue
            held += 1
            if held <= start:
                continue
            if not problem and len(fields) != len(header):
                problem = f"{len(fields)} fields, and the header has {len(header)}"
            yield where, None if problem else dict(zip(header, fields, strict=True)), problem


def _fields(reader: Any) -> tuple[list[str] | None, str | None]:
    """(fields, problem) of the next record; None for fields at the end."""
    # The limit is the process's: lifted only while a record is read.
    limit = csv.field_size_limit(_LARGEST_FIELD)
    try:
        fields = next(reader, None)
    except csv.Error as error:
        return [], f"invalid CSV: {error}"
    finally:
        csv.field_size_limit(limit)
    for field in fields or ():
        try:
            field.encode("utf-8")
        except UnicodeEncodeError as error:  # a byte that `surrogateescape` has carried here
            return fields, f"invalid UTF-8 (byte 0x{ord(field[error.start]) - 0xDC00:02x})"
    return fields, None


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _open_text(path: Path) -> TextIO:
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")


def _parquet(name: str, path: Path, start: int) -> _Reader:
    import pyarrow.parquet

    with _one_error(path), pyarrow.parquet.ParquetFile(path) as file:
        held = file.metadata.num_rows
        decode = _decoder(file.schema_arrow)
        first, group = 0, 0
        while group < file.num_row_groups:  # groups that are skipped whole are not read
            rows = file.metadata.row_group(group).num_rows
            if first + rows > start:
                break
            first, group = first + rows, group + 1
        for batch in file.iter_batches(1024, row_groups=range(group, file.num_row_groups)):
            yield from _rows_of(batch, name, first, start, decode)
            first += batch.num_rows
    return held


def _arrow(name: str, path: Path, start: int) -> _Reader:
    import pyarrow

    with _one_error(path), pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = reader = pyarrow.ipc.open_stream(file)
        decode, held = _decoder(reader.schema), 0
        for batch in batches:
            for part in range(0, batch.num_rows, 1024):
                yield from _rows_of(batch.slice(part, 1024), name, held + part, start, decode)
            held += batch.num_rows
    return held


def _rows_of(
    batch: Any, name: str, first: int, start: int, decode: Callable[[dict], dict]
) -> Iterator[Record]:
    """The records of an Arrow batch whose first has the index `first`, but for those before
    `start`.
    """
    skipped = max(0, start - first)
    batch = batch.slice(skipped)
    batch.validate(full=True)  # a damaged file could make Python read outside the batch
    for index, record in enumerate(batch.to_pylist(), start=first + skipped):
        yield f"{name}[{index}]", _without_nulls(decode(record)), None


def _decoder(schema: Any) -> Callable[[dict], dict]:
    """What `datasets` writes as JSON in a string, where values differ in type, becomes values."""
    if "arrow.json" not in str(schema):
        return dict
    from datasets import Features

    return Features.from_arrow_schema(schema).decode_example


@contextmanager
def _one_error(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()) or repr(error))


def _without_nulls(record: dict) -> dict:
    """The record without the keys of its inner objects that are null: to tables that is absent."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items() if inner is not None}
        if isinstance(value, list) and {dict, list} & set(map(type, value)):
            return [clean(inner) for inner in value]
        return value

    return {key: clean(value) for key, value in record.items()}


# Data sets of the `datasets` library, whose import takes seconds


def _saved(name: str, path: Path, start: int) -> _Reader:
    """A directory of `Dataset.save_to_disk`."""
    import datasets

    try:
        held = datasets.Dataset.load_from_disk(str(path))
        return (yield from _indexed(_after(held, start), name, start))
    except Exception as error:  # a damaged one fails in as many ways as it has files
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from error


def _hub(source: str, start: int, stream: bool) -> _Reader:
    import datasets

    found = _HUB_NAME.fullmatch(source)
    assert found is not None
    repository, config, split = found["repository"], found["config"], found["split"] or "train"
    try:
        if stream and "[" not in split:  # a stream has no slices
            held = datasets.load_dataset(repository, config, split=split, streaming=True)
            rows = held.skip(start)
        else:
            rows = _after(datasets.load_dataset(repository, config, split=split), start)
        return (yield from _indexed(rows, source, start))
    except Exception as error:  # hub, network and format errors have no common base
        raise UserError(
            f"{source!r} is no local file, and not to be had from the Hugging Face hub as "
            f"org/name[/config][:split]: {_one_line(error)}"
        ) from error


def _after(held: Any, start: int) -> Any:
    return held.select(range(start, len(held))) if start < len(held) else ()


def _indexed(rows: Any, name: str, start: int) -> _Reader:
    index = start
    for index, record in enumerate(rows, start=start + 1):
        yield f"{name}[{index - 1}]", _without_nulls(record), None
    return index
