"""Readers of files and data sets: a generator of records for each format.

    for where, record, problem in read_lines("train.jsonl", path, start=0): ...

Each skips the first `start` records, yields the others, and returns the number of all. `name` is
the name of the file in messages.
"""

import csv
import gzip
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lora_jax.config.text import BOM, BadJSON, other_encoding, parse_json
from lora_jax.data.rows import kind, printable
from lora_jax.errors import UserError

_LARGEST_LINE = 64 << 20  # bytes of one record; a book has about 1 MB
_LARGEST_DOCUMENT = 1 << 30  # bytes of an unpacked .json file, which is read at once
_NULL_BYTES = "the text has null bytes, as UTF-16 has; save it as UTF-8"

# (where, the record or None, its problem or None)
Record = tuple[str, Any, str | None]
Reader = Generator[Record, None, int]


# Text


def read_lines(name: str, path: Path, start: int) -> Reader:
    held = 0
    with _open(path) as file:
        for number, line in enumerate(_lines(name, file), start=1):
            if number == 1:
                line = _without_mark(name, line)
            if not line.strip():
                continue
            held += 1
            if held > start:
                yield f"{name}:{number}", *_parse(line)[:2]
    return held


def read_document(name: str, path: Path, start: int) -> Reader:
    with _open(path) as file:
        data = _without_mark(name, file.read(_LARGEST_DOCUMENT + 1))
    if len(data) > _LARGEST_DOCUMENT:
        raise UserError(
            f"{name} has more than {_LARGEST_DOCUMENT:,} bytes, and a .json file is read at once; "
            "write one object per line, into a .jsonl file"
        )
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
    """Return (value, problem or None, line of the problem from 1); never raise."""
    try:
        return parse_json(data.decode("utf-8")), None, 1
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return None, _not_utf8(data[error.start]), line
    except BadJSON as error:
        if b"\0" in data:
            return None, _NULL_BYTES, data.count(b"\n", 0, data.index(b"\0")) + 1
        place = "" if error.column is None else f" at column {error.column}"
        return None, f"invalid JSON: {error.problem}{place}", error.line or 1


def _not_utf8(byte: int) -> str:
    return f"invalid UTF-8 (byte 0x{byte:02x}, which is {chr(byte)!r} in Latin-1): save it as UTF-8"


def read_table(name: str, path: Path, start: int, delimiter: str) -> Reader:
    held = 0
    header: list[str] | None = None
    with _open(path) as binary:
        _without_mark(name, binary.read(4))
    with _open_text(path) as file:
        reader = csv.reader(_lines(name, file), delimiter=delimiter, strict=True)
        while True:
            where = f"{name}:{reader.line_num + 1}"
            fields, problem = _fields(reader)
            if fields is None:
                return held
            if header is None:
                repeated = [repr(field) for field, count in Counter(fields).items() if count > 1]
                if not problem and repeated:
                    problem = f"the header has a column twice: {printable(', '.join(repeated))}"
                others = [mark for mark in ",;\t|" if mark != delimiter and mark in "".join(fields)]
                if not problem and len(fields) == 1 and others:
                    problem = (
                        f"one column, {printable(repr(fields[0]))}: the fields are separated by "
                        f"{others[0]!r}; save it with commas as .csv, or with tabs as .tsv"
                    )
                if problem:
                    raise UserError(f"{where}: {problem}")
                header = fields or None  # an empty line is none
                continue
            if problem and "unexpected end of data" in problem:
                # An unclosed quote swallows the rest of the file: not just a bad record.
                raise UserError(f'{where}: a field that begins here with " is never closed')
            if not problem and not fields:
                continue
            held += 1
            if held <= start:
                continue
            if not problem and len(fields) != len(header):
                problem = f"{len(fields)} fields, and the header has {len(header)}"
            yield where, None if problem else dict(zip(header, fields, strict=True)), problem


def _fields(reader: Any) -> tuple[list[str] | None, str | None]:
    """Return (fields, problem) of the next record; fields are None at the end of the file."""
    # The limit is global to the process, so it is raised only while a record is read.
    limit = csv.field_size_limit(_LARGEST_LINE)
    try:
        fields = next(reader, None)
    except csv.Error as error:
        return [], f"invalid CSV: {error}"
    finally:
        csv.field_size_limit(limit)
    for field in fields or ():
        if "\0" in field:
            return fields, _NULL_BYTES
        try:
            field.encode("utf-8")
        except UnicodeEncodeError as error:  # a byte decoded by `surrogateescape`
            return fields, _not_utf8(ord(field[error.start]) - 0xDC00)
    return fields, None


def _lines(name: str, file: Any) -> Iterator[Any]:
    """Yield the lines of a text or binary file.

    Raises:
        UserError: a line of more than `_LARGEST_LINE` bytes or characters.
    """
    number = 0
    while line := file.readline(_LARGEST_LINE + 1):
        number += 1
        if len(line) > _LARGEST_LINE:
            raise UserError(
                f"{name}:{number}: the line has more than {_LARGEST_LINE:,} bytes; split the record"
            )
        yield line


def _without_mark(name: str, data: bytes) -> bytes:
    """Return the first bytes of a file without a byte order mark.

    Raises:
        UserError: the mark of another encoding than UTF-8.
    """
    if encoding := other_encoding(data):
        raise UserError(f"{name}:1: the text is {encoding}; save it as UTF-8")
    return data.removeprefix(BOM)


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _open_text(path: Path) -> TextIO:
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")


# Tables of Arrow and Parquet; a null inside a value means an absent key


def read_parquet(name: str, path: Path, start: int) -> Reader:
    import pyarrow.parquet

    with _one_error(path), pyarrow.parquet.ParquetFile(path) as file:
        held = file.metadata.num_rows
        decode = _decoder(file.schema_arrow)
        first, group = 0, 0
        while group < file.num_row_groups:  # skipped groups are not read
            rows = file.metadata.row_group(group).num_rows
            if first + rows > start:
                break
            first, group = first + rows, group + 1
        for batch in file.iter_batches(1024, row_groups=range(group, file.num_row_groups)):
            yield from _records_of(batch, name, first, start, decode)
            first += batch.num_rows
    return held


def read_arrow(name: str, path: Path, start: int) -> Reader:
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
                yield from _records_of(batch.slice(part, 1024), name, held + part, start, decode)
            held += batch.num_rows
    return held


def _records_of(
    batch: Any, name: str, first: int, start: int, decode: Callable[[dict], dict]
) -> Iterator[Record]:
    """Yield the records of an Arrow batch from index `start` on; `first` is its first index."""
    skipped = max(0, start - first)
    batch = batch.slice(skipped)
    batch.validate(full=True)  # otherwise a damaged file could be read out of bounds
    for index, record in enumerate(batch.to_pylist(), start=first + skipped):
        yield f"{name}[{index}]", _without_nulls(decode(record)), None


def _decoder(schema: Any) -> Callable[[dict], dict]:
    """Return a parser of the JSON text that `datasets` writes if values differ in type."""
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
    """Return the record without null keys of inner objects: in tables these are absent."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items() if inner is not None}
        if isinstance(value, list) and {dict, list} & set(map(type, value)):
            return [clean(inner) for inner in value]
        return value

    return {key: clean(value) for key, value in record.items()}


# Data sets of the `datasets` library, whose import takes seconds


def read_saved(name: str, path: Path, start: int) -> Reader:
    """Read a directory of `Dataset.save_to_disk`."""
    import datasets

    try:
        held = datasets.Dataset.load_from_disk(str(path))
        return (yield from _indexed(_after(held, start), name, start))
    except Exception as error:  # a damaged data set may raise anything
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from error


def read_hub(
    source: str, repository: str, config: str | None, split: str, start: int, stream: bool
) -> Reader:
    """Read a split of a data set of the hub; `source` is its name in messages."""
    import datasets

    try:
        if stream and "[" not in split:  # a stream has no slices
            held = datasets.load_dataset(repository, config, split=split, streaming=True)
            rows = held.skip(start)
        else:
            rows = _after(datasets.load_dataset(repository, config, split=split), start)
        return (yield from _indexed(rows, source, start))
    except Exception as error:  # hub, network and format errors have no common base
        raise UserError(
            f"{source!r} is not a local file, and cannot be loaded from the Hugging Face hub as "
            f"org/name[/config][:split]: {_one_line(error)}"
        ) from error


def _after(held: Any, start: int) -> Any:
    return held.select(range(start, len(held))) if start < len(held) else ()


def _indexed(rows: Any, name: str, start: int) -> Reader:
    index = start
    for index, record in enumerate(rows, start=start + 1):
        yield f"{name}[{index - 1}]", _without_nulls(record), None
    return index
