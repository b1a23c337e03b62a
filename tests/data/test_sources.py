"""Sources are read as written, and every bad record is named with its file and line."""

import gzip
import json
import os
import random
import re
import tracemalloc
from itertools import islice
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_jax.data import (
    Row,
    Rows,
    TextRow,
    TokenRow,
    is_hub_name,
    read,
    readers,
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


def test_prompt_and_completion_with_extra_keys_and_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "\xc3\xa9", "completion": "x", "source": [1]}\r\n'
        b'\n   \n{"prompt": "b", "completion": ""}'
    )
    first, second = read(path).rows
    assert first.messages == (
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": "x"},
    )
    assert (first.where, second.where) == ("rows.jsonl:1", "rows.jsonl:4")
    assert first.prompt == first.messages[:1]
    assert (first.messages[1]["content"], second.messages[1]["content"]) == ("x", "")


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"data": rows, "version": 1}])
def test_json_lists(tmp_path, wrap):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(wrap([{"messages": [ASK, ANSWER]}] * 2), indent=2))
    assert [row.where for row in read(path).rows] == ["rows.json[0]", "rows.json[1]"]
    assert read(path).rows[0].messages == (ASK, ANSWER)


def test_a_directory_is_read_by_file_name_and_not_below(tmp_path):
    write(tmp_path / "b.jsonl", {"prompt": "3", "completion": "3"})
    (tmp_path / "a.json").write_text('[{"prompt": "1", "completion": "1"}]')
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / "below").mkdir()
    write(tmp_path / "below" / "c.jsonl", {"prompt": "9", "completion": "9"})
    assert [row.where for row in read(tmp_path).rows] == ["a.json[0]", "b.jsonl:1"]


def test_missing_paths(tmp_path):
    write(tmp_path / "train.jsonl", {"prompt": "1", "completion": "1"})
    text = error_of(tmp_path / "trian.jsonl")
    assert "trian.jsonl does not exist. Did you mean 'train.jsonl'?" in text
    endings = ".json, .jsonl, .csv, .tsv, .parquet or .arrow"
    assert f"must end in {endings}, not '.txt'" in error_of(write(tmp_path / "a.txt"))
    assert f"must end in {endings}, not '.gz'" in error_of(write(tmp_path / "a.parquet.gz"))
    (tmp_path / "empty").mkdir()
    assert f"empty holds no {endings} file" in error_of(tmp_path / "empty")
    assert f"no {endings} file matches" in error_of(str(tmp_path / "*.json"))
    assert "a\\x00.json cannot be read: embedded null byte" in error_of("a\0.json")
    assert "~nobody-of-that-name/a.json" in error_of("~nobody-of-that-name/a.json")
    assert "cannot be read: File name too long" in error_of(tmp_path / ("x" * 400 + ".json"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.jsonl", b""),
        ("e.jsonl", b"\n \n"),
        ("e.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("e.json", b" "),
        ("e.json", b"[]"),
        ("e.csv", b""),
        ("e.csv", b"\xef\xbb\xbf\n"),
        ("e.tsv", b"prompt\tcompletion\r\n\r\n"),
    ],
)
def test_files_without_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for on_bad_row in ("error", "drop"):
        text = error_of(tmp_path / name, on_bad_row=on_bad_row)
        assert text == f"{name}:1: the file holds no rows"
    with pytest.raises(UserError, match="the file holds no rows"):
        list(records(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"prompt": "a", "completion": "b"}\n{"prompt": \n',
            "a.jsonl:2: invalid JSON",
        ),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n\n"\xff"\n', "a.jsonl:3: invalid UTF-8"),
        ("a.json", b'[\n{"prompt": "a",\n "completion": }]', "a.json:3: invalid JSON"),
        ("a.json", b'[\n\n"\xff"]', "a.json:3: invalid UTF-8 (byte 0xff, which is 'ÿ'"),
        ("a.json", b'{"prompt": "a"}\n{}', "Then the file's name must end in .jsonl"),
        ("a.json", b'{"rows": []}', "a.json:1: the file must hold a list of objects"),
        ("a.json", b'{"data": 3}', 'or {"data": [...]}, not a number'),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: invalid JSON: nested too deeply"),
        ("a.json", b"[" * 100_000, "a.json:1: invalid JSON: nested too deeply"),
        ("a.jsonl", b"9" * 5000, "a.jsonl:1: invalid JSON: Exceeds the limit"),
        ("a.jsonl", b'"text"', "a.jsonl:1: a row must be an object, not a string"),
        ("a.json", b"[null]", "a.json[0]: a row must be an object, not null"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in error_of(tmp_path / name)


def test_ten_problems_and_the_count_of_the_rest(tmp_path):
    good = {"prompt": "q", "completion": "a"}
    bad = [{f"key{n}": "x"} for n in range(12)]
    lines = error_of(write(tmp_path / "r.jsonl", good, *bad, good)).splitlines()
    assert len(lines) == 11
    assert [line.split(": ")[0] for line in lines[:10]] == [f"r.jsonl:{n}" for n in range(2, 12)]
    assert lines[10] == "... and 2 more problems"
    assert len(error_of(write(tmp_path / "s.jsonl", *bad[:10])).splitlines()) == 10
    assert error_of(write(tmp_path / "t.jsonl", *bad[:11])).endswith("... and 1 more problem")


def test_a_problem_of_many_records_is_told_once(tmp_path):
    records = [*[{"question": "q"}] * 12, {"prompt": 3, "completion": "a"}, {"question": "r"}]
    first, second = error_of(write(tmp_path / "r.jsonl", *records)).splitlines()
    assert first.startswith("r.jsonl:1 and 12 more rows: a row needs 'messages'")
    assert second.startswith("r.jsonl:13: 'prompt' is a number")


FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=5))
def test_well_formed_rows_come_back_as_they_were(tmp_path, pairs):
    path = write(tmp_path / "g.jsonl", *[{"prompt": p, "completion": c} for p, c in pairs])
    assert [tuple(m["content"] for m in r.messages) for r in read(path).rows] == pairs


def test_the_packaged_data_reads_whole():
    folder = Path(__file__).parents[3] / "shared" / "data"
    assert folder.is_dir(), (
        f"{folder} is absent: the data sets of tests and benchmarks belong there"
    )
    expected = {"usaddress_train": 1288, "usaddress_test": 200, "restaurant8k_train": 8198}
    for name, count in (expected | {"general_64": 64, "seed_tasks": 175}).items():
        prompt = "{prompt}\nAsked for: {context}" if "restaurant" in name else None
        assert len(read(folder / f"{name}.jsonl", prompt=prompt).rows) == count


def test_a_path_is_local_and_a_demo_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "data file org/name does not exist" in error_of(Path("org/name"))
    file = write(tmp_path / "demo.jsonl", PAIR)
    monkeypatch.setattr("lora_jax.demo.path", lambda name: {"usaddress": file}[name])
    assert wheres("demo:usaddress") == ["demo.jsonl:1"]
    assert source_files("demo:usaddress") == [file]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wheres("~/demo.jsonl") == ["demo.jsonl:1"]


def test_patterns_name_files_by_their_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.jsonl", "b/x.jsonl", "b/below/y.jsonl"):
        write(tmp_path / "data" / name, PAIR)
    write(tmp_path / "data" / "b" / "notes.txt", PAIR)
    assert wheres("data/*/x.jsonl") == ["data/a/x.jsonl:1", "data/b/x.jsonl:1"]
    assert wheres("data/b/*") == ["data/b/x.jsonl:1"]
    assert source_files("data/**/*.jsonl") == [
        Path("data/a/x.jsonl"),
        Path("data/b/below/y.jsonl"),
        Path("data/b/x.jsonl"),
    ]
    write(tmp_path / "data" / "[1].jsonl", PAIR)  # a file of that name wins
    assert wheres("data/[1].jsonl") == ["[1].jsonl:1"]


def test_every_kind_of_row(tmp_path):
    path = write(tmp_path / "r.jsonl", PAIR, {"text": "t"}, {"input_ids": [1, 2]})
    assert [type(row) for row in read(path).rows] == [Row, TextRow, TokenRow]


def test_named_columns(tmp_path):
    path = write(tmp_path / "r.jsonl", {"question": "q", "answer": 4})
    read_as = {"prompt": "Q: {question}", "completion": "{answer}"}
    [row] = read(path, **read_as).rows
    assert [m["content"] for m in row.messages] == ["Q: q", "4"]
    text = error_of(path, prompt="{q}", completion="{answer}")
    assert text.startswith(
        "r.jsonl:1: data.prompt names {q}; the columns are: 'question', 'answer'"
    )
    # Before anything is read:
    assert "data.completion='{a.b}' has" in error_of("nothing.jsonl", completion="{a.b}")


def test_bad_rows_can_be_dropped_but_not_all_of_them(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"prompt": "q", "completion": "a"}\n{}\n{"\n"\xff"\n{"text": "t"}\n')
    found = read(path, on_bad_row="drop")
    assert [row.where for row in found.rows] == ["r.jsonl:1", "r.jsonl:5"]
    assert found.dropped == 3
    assert len(error_of(path).splitlines()) == 3
    write(path, *[{"input_ids": [1, 2], "labels": [-100, -100]}] * 12)
    assert error_of(path, on_bad_row="drop") == (
        "r.jsonl:1 and 11 more rows: no token after the first is supervised: nothing to learn from"
    )
    # What is damaged as a whole is an error beside good rows too, and stands before bad ones.
    (tmp_path / "s.json").write_text("[")
    write(path, PAIR, {})
    assert error_of(tmp_path, on_bad_row="drop").startswith("s.json:1: invalid JSON")
    text = error_of(tmp_path)
    assert [line.split(": ")[0] for line in text.splitlines()] == ["s.json:1", "r.jsonl:2"]


def test_zero_supervised_tokens_do_not_succeed(tmp_path):
    silent = {"messages": [ASK, ANSWER | {"train": False}]}
    assert "nothing to learn from" in error_of(write(tmp_path / "r.jsonl", silent))


def test_content_of_ten_megabytes(tmp_path):
    long = "é" * 5_000_000
    path = write(tmp_path / "r.jsonl", {"prompt": long, "completion": "a"})
    table = tmp_path / "r.csv"
    table.write_text(f'prompt,completion\n"{long}",a\n', encoding="utf-8")
    for file in (path, table):
        [row] = read(file).rows
        assert row.messages[0]["content"] == long


# One after the other


def test_records_begin_anywhere(tmp_path):
    rows = [{"text": str(i)} for i in range(9)]
    write(tmp_path / "a.jsonl", *rows)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b"\n{\n\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    lines = "".join(f'"{i}"\n' if i % 2 else f'\n"{i}\n"\n' for i in range(9))
    (tmp_path / "c.csv").write_text(f"text\n{lines}")
    (tmp_path / "d.tsv.gz").write_bytes(gzip.compress(b"text\tid\n1\t2\n3\n4\t5\n"))
    table_files(tmp_path, pyarrow.Table.from_pylist(rows))
    every = list(records(tmp_path))
    assert len(every) == 10 + 9 + 9 + 3 + 3 * 9
    assert [problem is None for _, _, problem in every].count(False) == 2
    for start in range(len(every) + 2):
        assert list(records(tmp_path, start)) == every[start:]
    whole = [row.where for row in read(tmp_path, on_bad_row="drop").rows]
    assert whole == [where for where, _, problem in every if problem is None]


def test_records_are_read_as_they_are_asked_for(tmp_path):
    """A file of 40 MB is read in far less; what comes after a damaged place is not yet missed."""
    line = json.dumps({"text": "x" * 20_000}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 2000)
    (tmp_path / "a.csv").write_text("text\n" + f"{'x' * 20_000}\n" * 2000)
    (tmp_path / "z.jsonl").write_text(line + "{")
    for name in ("a.jsonl", "a.csv"):
        tracemalloc.start()
        assert [where for where, *_ in islice(records(tmp_path / name, 1500), 2)] == [
            f"{name}:{1501 + (name == 'a.csv')}",
            f"{name}:{1502 + (name == 'a.csv')}",
        ]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2_000_000
    reading = records(tmp_path / "z.jsonl")
    assert next(reading)[2] is None
    assert "invalid JSON" in (next(reading)[2] or "")


# The hub: `datasets` takes a directory org/name of the working directory for one of the hub.


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set with two configs, `main` with the splits train and test."""
    folder = tmp_path / "org" / "name"
    write(folder / "a.jsonl", *[{"prompt": str(i), "completion": "a"} for i in range(20)])
    write(folder / "b.jsonl", *NESTED)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: a.jsonl\n"
        "  - split: test\n    path: a.jsonl\n- config_name: chat\n  data_files: b.jsonl\n---\n"
    )
    monkeypatch.chdir(tmp_path)


def test_configs_splits_and_slices_of_the_hub(hub):
    rows = read("org/name/main:test").rows
    assert len(rows) == 20
    assert rows[3].where == "org/name/main:test[3]"
    assert rows[3].messages[0]["content"] == "3"
    assert len(read("org/name/main:train[:10%]").rows) == 2
    assert len(read("org/name/main:train+test").rows) == 40
    assert [row.messages[0]["content"] for row in read("org/name/main:train[5:7]").rows] == [
        "5",
        "6",
    ]
    assert len(read("org/name/main:train").rows) == 20
    assert source_files("org/name/main:train") == []
    plain, tools = read("org/name/chat:train").rows
    assert plain.messages == (ASK, ANSWER)
    assert tools.messages == tuple(NESTED[1]["messages"])


@pytest.mark.parametrize("split", ["train", "train+test", "train[10:]"])
def test_the_hub_one_after_the_other(hub, split):
    every = list(records(f"org/name/main:{split}"))
    assert len(every) == {"train": 20, "train+test": 40, "train[10:]": 10}[split]
    assert every[1][0] == f"org/name/main:{split}[1]"
    for start in (1, 9, 45):
        assert list(records(f"org/name/main:{split}", start)) == every[start:]


def test_errors_of_the_hub_name_what_exists(hub):
    for read_it in (read, lambda source: list(records(source))):
        for source, named in (
            ("org/name/main:trian", "'train', 'test'"),
            ("org/name:train[:10%]", "'main', 'chat'"),
            ("org/name/mian:train", "'main', 'chat'"),
            ("org/name/main:train[:x]", "train[:x]"),
        ):
            with pytest.raises(UserError) as caught:
                read_it(source)
            text = str(caught.value)
            assert text.startswith(f"{source!r} is not a local file, and cannot be loaded from the")
            assert named in text
            assert len(text.splitlines()) == 1


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\n(offline)")

    monkeypatch.setattr("datasets.load_dataset", fail)
    message = r"'org/name' is not a local file.*: Couldn't reach 'org/name' on the Hub \(offline\)"
    with pytest.raises(UserError, match=message):
        read("org/name")
    with pytest.raises(UserError, match=message):
        next(records("org/name"))


def test_rows_of_the_hub_of_no_known_form_are_named(monkeypatch):
    held = datasets.Dataset.from_list([{"question": "a"}])
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: held)
    assert error_of("org/name").startswith("org/name[0]: a row needs ")


def test_an_empty_data_set_of_the_hub(monkeypatch):
    held = datasets.Dataset.from_dict({"text": []})
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: held)
    assert error_of("org/name") == "org/name holds no rows"


def test_hub_names(tmp_path, monkeypatch):
    names = [
        "org/name",
        "o-r.g_1/n.a-m_e",
        "org/name:test",
        "org/name/config:test",
        "org/name/en-us",
    ]
    names += ["org/name:train[:10%]", "org/name:train[10:20]+test", "org/name:a.json"]
    for name in names:
        assert is_hub_name(name), name
    files = [
        "name",
        "name:train",
        "a/b.jsonl",
        "a/b.json",
        "a/b.csv.gz",
        "a/b/c.parquet",
        "a/b.tsv",
    ]
    files += [
        "/a/b",
        "./a/b",
        "../a",
        "~/a",
        "a/b/c/d",
        "a/*",
        "a/b[0-9]",
        "org/",
        "org/name:",
        "a b/c",
    ]
    for name in [*files, "demo:usaddress", "", "a/b\0c", "a/" + "b" * 5000 + ".arrow"]:
        assert not is_hub_name(name), name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_name("org/name")
    assert is_hub_name("org/name:train")


# Damaged files


def test_whatever_the_bytes_only_rows_or_a_user_error(tmp_path):
    rng = random.Random(0)
    lines = b"\n".join(json.dumps(row).encode() for row in [PAIR, *NESTED, {"text": "t"}])
    listed = b"[" + lines.replace(b"\n", b",\n") + b"]"
    table = b'prompt,completion\nq,a\n"q ""x"" y","a,\nb"\n'
    kinds = {
        "f.jsonl": lines,
        "f.json": listed,
        "f.csv": table,
        "f.tsv": table.replace(b",", b"\t"),
        "f.csv.gz": gzip.compress(table),
        "f.jsonl.gz": gzip.compress(lines),
    }
    outcomes = {True: 0, False: 0}
    for _ in range(2000):
        name = rng.choice(list(kinds))
        path = tmp_path / name
        path.write_bytes(damaged(rng, kinds[name]) if rng.random() < 0.9 else rng.randbytes(40))
        on_bad_row = rng.choice(["error", "drop"])
        try:
            found = read(path, on_bad_row=on_bad_row)
        except UserError as error:
            for line in str(error).splitlines():
                assert line.startswith((name, str(path), "... and "))
            str(error).encode("utf-8")
            outcomes[False] += 1
        else:
            assert isinstance(found, Rows) and found.rows
            assert found.dropped == 0 or on_bad_row == "drop"
            outcomes[True] += 1
    assert min(outcomes.values()) > 200, outcomes


def test_json_of_rows_has_the_limits_of_all_json(tmp_path):
    row = '{"prompt": "a", "completion": "b", "id": %s}\n'
    for value, problem in (
        ("NaN", "NaN is not a JSON number"),
        ("1e999", "1e999 is too large for a number"),
        ('{"x": 1, "x": 2}', "an object has the key 'x' twice"),
        ("[" * 120 + "]" * 120, "nested too deeply: at most 100 levels are supported"),
        ('"\\ud800"', "a string has the unpaired surrogate"),
    ):
        for name, text in (("a.jsonl", row % value), ("a.json", f"[{row % value}]")):
            (tmp_path / name).write_text(text)
            with pytest.raises(UserError, match=re.escape(f"{name}:1: invalid JSON: {problem}")):
                read(tmp_path / name)
    (tmp_path / "a.jsonl").write_text(row % ("[" * 98 + "]" * 98))
    assert len(read(tmp_path / "a.jsonl").rows) == 1


def test_a_packed_file_that_unfolds_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_LARGEST_LINE", 1000)
    monkeypatch.setattr(readers, "_LARGEST_DOCUMENT", 1000)
    good = {
        "a.jsonl": b'{"prompt": "a", "completion": "b"}\n',
        "a.csv": b"prompt,completion\na,b\n",
    }
    for name, problem in (
        ("a.jsonl", "a.jsonl.gz:2: the line has more than 1,000 bytes"),
        ("a.csv", "a.csv.gz:3: the line has more than 1,000 bytes"),
        ("a.json", "a.json.gz has more than 1,000 bytes"),
    ):
        file = tmp_path / f"{name}.gz"
        file.write_bytes(gzip.compress(good.get(name, b"") + b" " * 1_000_000))
        with pytest.raises(UserError, match=re.escape(problem)):
            read(file)


@pytest.mark.parametrize(
    "name", ["pipe.jsonl", "zero.jsonl", "loop.jsonl", "n" * 300, "nothing.csv"]
)
def test_sources_that_are_no_files(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "nothing.csv").symlink_to("absent")
    with pytest.raises(UserError, match=re.escape(name[:50])):
        read(tmp_path / name)
    with pytest.raises(UserError, match=re.escape(name[:50])):
        read(str(tmp_path / name))
