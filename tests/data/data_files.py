"""Files of records for the tests of reading."""

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lora_jax.data import (
    read,
)
from lora_jax.errors import UserError

ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
PAIR = {"prompt": "q", "completion": "a"}


NESTED = [
    {"messages": [ASK, ANSWER], "tools": None},
    {
        "messages": [
            ASK,
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": "1"}}]},
            {"role": "tool", "content": "1"},
            ANSWER | {"train": False},
        ],
        "tools": [{"name": "f", "strict": None}],
    },
]


def write(path: Path, *rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def error_of(source: str | Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(source, **options)
    return str(caught.value)


def wheres(source: str | Path) -> list[str]:
    return [row.where for row in read(source).rows]


def arrow_file(path: Path, table: pyarrow.Table, opened=pyarrow.ipc.new_file, rows=2) -> Path:
    with opened(str(path), table.schema) as file:
        for batch in table.to_batches(max_chunksize=rows):
            file.write_batch(batch)
    return path


def table_files(folder: Path, table: pyarrow.Table, rows: int = 2) -> list[Path]:
    """The table as .parquet, and as both sorts of .arrow, in pieces of so many rows."""
    pyarrow.parquet.write_table(table, folder / "t.parquet", row_group_size=rows)
    return [
        folder / "t.parquet",
        arrow_file(folder / "file.arrow", table, rows=rows),
        arrow_file(folder / "stream.arrow", table, pyarrow.ipc.new_stream, rows),
    ]


def damaged(rng: random.Random, content: bytes) -> bytes:
    """A few bytes changed, cut, doubled or put in."""
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(content) + 1)
        end = at + rng.randrange(6)
        piece = rng.choice(
            [
                b"",
                b"\n",
                b'"',
                b",",
                b"\t",
                b"{",
                b"]",
                b"\xff",
                b"\0",
                b"\r",
                b"null",
                b"\xed\xa0\x80",
            ]
        )
        content = (
            content[:at] + rng.choice([piece, rng.randbytes(2), content[:end]]) + content[end:]
        )
    return content
