"""Records of .csv, .tsv, .parquet and .arrow files, and of directories that `datasets` saved."""

import gzip
import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lora_jax.data import (
    TokenRow,
    read,
    records,
    source_files,
)
from lora_jax.errors import UserError

from .data_files import (
    ANSWER,
    ASK,
    NESTED,
    PAIR,
    damaged,
    error_of,
    table_files,
    wheres,
    write,
)

pytestmark = pytest.mark.usefixtures("quiet_datasets")


def test_csv_and_tsv(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(
        b"\xef\xbb\xbfprompt,completion,system,note\r\n"
        b'"say ""a, b""\nnow",\xc3\xa9,,x\r\n'
        b"\r\n"
        b"q,a,s,\r\n"
    )
    first, second = read(path).rows
    assert (first.where, second.where) == ("t.csv:2", "t.csv:5")
    assert [m["content"] for m in first.messages] == ['say "a, b"\nnow', "é"]
    assert [m["content"] for m in second.messages] == ["s", "q", "a"]
    tsv = tmp_path / "t.tsv"
    tsv.write_text("instruction\tinput\toutput\nq\t\ta, b\n")
    [row] = read(tsv).rows
    assert [m["content"] for m in row.messages] == ["q", "a, b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,answer\nq,a\n", "t.csv:2: a row needs .*; its keys: 'prompt', 'answer'"),
        (b"prompt,completion\nq,a\nq\n", "t.csv:3: 1 fields, and the header has 2"),
        (b"prompt,completion\n\nq,a,b\n", "t.csv:3: 3 fields, and the header has 2"),
        (b"prompt,prompt\nq,a\n", "t.csv:1: the header has a column twice: 'prompt'"),
        (
            b"prompt,completion\nq,a\n\xe9,a\n",
            "t.csv:3: invalid UTF-8 .byte 0xe9, which is 'é' in L",
        ),
        (b"prompt;completion\nq;a\n", "t.csv:1: one column, 'prompt;completion': .* by ';'"),
        (b"prompt\tcompletion\nq\ta\n", r"t.csv:1: one column, .*separated by '\\t'"),
        (b"pr\xffompt,completion\nq,a\n", r"t.csv:1: invalid UTF-8 \(byte 0xff, "),
        (b'prompt,completion\n"q"x,a\n', "t.csv:2: invalid CSV: ',' expected after '\"'"),
        (b'prompt,completion\nq,a\n"q,a\nq,a\n', 't.csv:3: a field that begins here with " is'),
        (b'"prompt,completion\nq,a\n', "t.csv:1: invalid CSV: unexpected end of data"),
    ],
)
def test_malformed_tables(tmp_path, content, message):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{message}"):
        read(path)


def test_a_column_may_have_the_own_separator_in_its_name(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('"one, two"\nq\n')
    assert [record for _, record, _ in records(path)] == [{"one, two": "q"}]


def test_bad_lines_of_a_table_are_dropped_but_not_the_rest_of_a_file(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'prompt,completion\n1,a\n"2"x,a\n3\n\xff,a\n5,a\n')
    found = read(path, on_bad_row="drop")
    assert ([row.where for row in found.rows], found.dropped) == (["t.csv:2", "t.csv:6"], 3)
    path.write_bytes(b'prompt,completion\n1,a\n"2,a\n3,a\n')
    assert "is never closed" in error_of(path, on_bad_row="drop")


def test_gzipped_files(tmp_path):
    text = json.dumps(PAIR).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text + b"\n" + text))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b"[" + text + b"]"))
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"prompt,completion\nq,a\n"))
    assert wheres(tmp_path) == ["a.jsonl.gz:1", "a.jsonl.gz:2", "b.json.gz[0]", "c.csv.gz:2"]
    for name, content in (
        ("a.jsonl.gz", b"plain"),
        ("a.jsonl.gz", gzip.compress(text)[:-3]),
        ("c.csv.gz", gzip.compress(text)[:20] + b"xx"),
    ):
        (tmp_path / name).write_bytes(content)
        assert f"{name} cannot be read: " in error_of(tmp_path / name, on_bad_row="drop")


# Tables of Arrow


def test_nulls_of_nested_values_are_absent(tmp_path):
    for path in table_files(tmp_path, pyarrow.Table.from_pylist(NESTED)):
        plain, tools = read(path).rows
        assert (plain.where, tools.where) == (f"{path.name}[0]", f"{path.name}[1]")
        assert plain.messages == (ASK, ANSWER)
        assert tools.messages == tuple(NESTED[1]["messages"])
        assert tools.tools == ({"name": "f"},)


def test_values_of_many_types_that_datasets_keeps_as_json(tmp_path):
    path = write(tmp_path / "r.jsonl", *[PAIR | {"tools": [{"a": 1}, {"b": "x"}]}] * 3)
    held = datasets.load_dataset("json", data_files=str(path), split="train")
    held.to_parquet(tmp_path / "r.parquet")
    assert "json" in str(pyarrow.parquet.read_schema(tmp_path / "r.parquet")).lower()
    assert read(tmp_path / "r.parquet").rows[2].tools == ({"a": 1}, {"b": "x"})


def test_a_table_of_tokens(tmp_path):
    table = pyarrow.Table.from_pylist(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": None}]
    )
    for path in table_files(tmp_path, table):
        first, second = read(path).rows
        assert first == TokenRow((1, 2, 3), (0.0, 1.0, 1.0), f"{path.name}[0]")
        assert second == TokenRow((4, 5), (1.0, 1.0), f"{path.name}[1]")


def test_damaged_and_empty_tables(tmp_path):
    empty = pyarrow.Table.from_pylist([], pyarrow.schema([("text", pyarrow.string())]))
    for path in table_files(tmp_path, empty):
        assert error_of(path) == f"{path.name}:1: the file holds no rows"
    for path in table_files(tmp_path, pyarrow.Table.from_pylist([{"text": "t"}] * 9)):
        whole = path.read_bytes()
        for content in (b"", b"text", whole[:-9], whole[: len(whole) // 2]):
            path.write_bytes(content)
            for on_bad_row in ("error", "drop"):
                text = error_of(path, on_bad_row=on_bad_row)
                assert f"{path} cannot be read: " in text or "holds no rows" in text
                assert len(text.splitlines()) == 1


def test_a_directory_that_datasets_saved(tmp_path):
    held = datasets.Dataset.from_list([{"prompt": str(i), "completion": "a"} for i in range(7)])
    held.select([5, 3]).save_to_disk(tmp_path / "saved")
    rows = read(tmp_path / "saved").rows
    assert [row.where for row in rows] == ["saved[0]", "saved[1]"]
    assert [row.messages[0]["content"] for row in rows] == ["5", "3"]
    assert list(records(str(tmp_path / "saved"), 1)) == [
        ("saved[1]", {"prompt": "3", "completion": "a"}, None)
    ]
    names = {path.name for path in source_files(tmp_path / "saved")}
    assert names > {"state.json", "dataset_info.json"}
    (tmp_path / "saved" / "dataset_info.json").write_text("{")
    assert "saved cannot be read: " in error_of(tmp_path / "saved")
    both = datasets.DatasetDict(train=held, test=held)
    both.save_to_disk(tmp_path / "both")
    assert "name one of its directories test, train" in error_of(tmp_path / "both")
    assert len(read(tmp_path / "both" / "test").rows) == 7


def test_whatever_the_bytes_of_tables_of_arrow(tmp_path):
    rng = random.Random(0)
    table = pyarrow.Table.from_pylist(NESTED + [{"text": "t"}] * 3)
    for path in table_files(tmp_path, table):
        whole = path.read_bytes()
        for _ in range(150):
            path.write_bytes(damaged(rng, whole))
            try:
                read(path, on_bad_row="drop")
            except UserError as error:
                assert str(error).startswith((path.name, str(path)))
