"""Rows are read as written, and every malformed one is named with its file and line."""

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_jax.config import UserError
from lora_jax.data import read_hub_rows, read_rows, reference

ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(path)
    return str(caught.value)


def test_prompt_and_completion_with_extra_keys_and_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "\xc3\xa9", "completion": "x", "context": [1]}\r\n'
        b'\n   \n{"prompt": "b", "completion": ""}'
    )
    first, second = read_rows(path)
    assert first.messages == (
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": "x"},
    )
    assert (first.where, second.where) == ("rows.jsonl:1", "rows.jsonl:4")
    assert first.prompt == first.messages[:1]
    assert (reference(first), reference(second)) == ("x", "")


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"data": rows, "version": 1}])
def test_json_lists(tmp_path, wrap):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(wrap([{"messages": [ASK, ANSWER]}] * 2), indent=2))
    assert [row.where for row in read_rows(path)] == ["rows.json[0]", "rows.json[1]"]
    assert read_rows(path)[0].messages == (ASK, ANSWER)


def test_messages_win_over_prompt_and_keep_their_other_keys(tmp_path):
    system = {"role": "system", "content": "s"}
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "train": False}
    tool = {"role": "tool", "content": "1", "name": "f"}
    messages = [system, ASK, called, tool, ANSWER, ASK]
    [row] = read_rows(write(tmp_path / "r.jsonl", {"prompt": "other", "messages": messages}))
    assert row.messages == tuple(messages)
    assert row.prompt == (system, ASK, called, tool)
    assert reference(row) == "a"


def test_conversational_prompt_and_completion_supervises_the_completion_only(tmp_path):
    row = {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}
    [read] = read_rows(write(tmp_path / "r.jsonl", row))
    assert read.messages == (ASK, {**ANSWER, "train": False}, ASK, ANSWER)


def test_a_directory_is_read_by_file_name_and_not_below(tmp_path):
    write(tmp_path / "b.jsonl", {"prompt": "3", "completion": "3"})
    (tmp_path / "a.json").write_text('[{"prompt": "1", "completion": "1"}]')
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / "below").mkdir()
    write(tmp_path / "below" / "c.jsonl", {"prompt": "9", "completion": "9"})
    assert [row.where for row in read_rows(tmp_path)] == ["a.json[0]", "b.jsonl:1"]


def test_missing_paths(tmp_path):
    write(tmp_path / "train.jsonl", {"prompt": "1", "completion": "1"})
    text = error_of(tmp_path / "trian.jsonl")
    assert "trian.jsonl does not exist. Did you mean 'train.jsonl'?" in text
    assert "must end in .json or .jsonl, not '.csv'" in error_of(_touch(tmp_path / "a.csv"))
    (tmp_path / "empty").mkdir()
    assert "empty holds no .json or .jsonl file" in error_of(tmp_path / "empty")
    assert "cannot be read: File name too long" in error_of(tmp_path / ("x" * 400 + ".json"))


def _touch(path: Path) -> Path:
    path.write_text("")
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [("e.jsonl", b""), ("e.jsonl", b"\n \n"), ("e.json", b" "), ("e.json", b"[]")],
)
def test_files_without_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert error_of(tmp_path / name) == f"{name}:1: the file holds no rows"


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
        ("a.json", b'[\n\n"\xff"]', "a.json:3: invalid UTF-8 (byte 0xff)"),
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


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a"}, "or 'messages'; its keys: 'question', 'answer'"),
        ({}, "its keys: none"),
        ({"prompt": "q"}, "a row needs 'prompt' and 'completion'"),
        ({"prompt": 1, "completion": "a"}, "'prompt' is a number, not a string"),
        ({"prompt": "q", "completion": None}, "'completion' is null, not a string"),
        ({"prompt": "q", "completion": [ANSWER]}, "'completion' is a list, not a string"),
        ({"prompt": [ASK], "completion": "a"}, "'completion' is a string, not a list of messages"),
        ({"prompt": [ASK], "completion": [ASK]}, "'completion' has no assistant turn"),
        ({"prompt": [], "completion": [ANSWER]}, "'prompt' is empty"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": {}}, "'messages' is an object, not a list of messages"),
        ({"messages": ["hi"]}, "messages[0] is a string, not an object"),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            "has no 'role'; its keys: 'from', 'value'",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0] has no 'content'; its keys: 'role'"),
        ({"messages": [{"role": 3, "content": "x"}]}, "messages[0].role is a number, not a string"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "Did you mean 'assistant'?"),
        ({"messages": [{"role": "\ud800", "content": "x"}]}, "messages[0].role is '\\ud800'"),
        (
            {"messages": [{**ASK, "content": True}]},
            "messages[0].content is a boolean, not a string",
        ),
        ({"messages": [ASK]}, "no assistant turn: nothing to learn from"),
        ({"messages": [ASK, {**ASK, "role": "system"}, ANSWER]}, "messages[1] is a 'system' turn"),
        (
            {"messages": [{**ASK, "role": "system"}, {**ASK, "role": "developer"}, ANSWER]},
            "messages[1] is a 'developer' turn: only the first turn can be one",
        ),
        (
            {"prompt": [ASK], "completion": [{**ASK, "role": "system"}]},
            "completion[0] is a 'system'",
        ),
        ({"messages": [ASK, {**ANSWER, "train": "no"}]}, "train is a string, not true or false"),
        ({"messages": [{**ASK, "train": True}, ANSWER]}, "train is true on a 'user' turn"),
        ({"prompt": "\ud800", "completion": "a"}, "a string holds the unpaired surrogate \\ud800"),
        ({"messages": [{**ASK, "x": ["\udfff"]}, ANSWER]}, "the unpaired surrogate \\udfff"),
    ],
)
def test_malformed_rows(tmp_path, row, message):
    text = error_of(write(tmp_path / "r.jsonl", {"prompt": "q", "completion": "a"}, row))
    assert text.startswith("r.jsonl:2: ")
    assert message in text
    text.encode("utf-8")  # can be printed


def test_ten_problems_and_the_count_of_the_rest(tmp_path):
    good = {"prompt": "q", "completion": "a"}
    lines = error_of(write(tmp_path / "r.jsonl", good, *[{}] * 12, good)).splitlines()
    assert len(lines) == 11
    assert [line.split(": ")[0] for line in lines[:10]] == [f"r.jsonl:{n}" for n in range(2, 12)]
    assert lines[10] == "... and 2 more problems"
    assert len(error_of(write(tmp_path / "s.jsonl", *[{}] * 10)).splitlines()) == 10
    assert error_of(write(tmp_path / "t.jsonl", *[{}] * 11)).endswith("... and 1 more problem")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "prompt", "completion", "role", "content", "train", "data"]
            ),
            inner | st.sampled_from(["user", "assistant", "system", "tool"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()), st.booleans())
def test_whatever_the_bytes_only_rows_or_a_user_error(tmp_path, data, lines):
    path = tmp_path / ("f.jsonl" if lines else "f.json")
    path.write_bytes(data)
    try:
        rows = read_rows(path)
    except UserError as error:
        for line in str(error).splitlines():
            assert line.startswith(path.name)
    else:
        assert rows
        assert all(isinstance(reference(row), str) for row in rows)


@FUZZ
@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=5))
def test_well_formed_rows_come_back_as_they_were(tmp_path, pairs):
    path = write(tmp_path / "g.jsonl", *[{"prompt": p, "completion": c} for p, c in pairs])
    assert [(r.messages[0]["content"], reference(r)) for r in read_rows(path)] == pairs


def test_the_packaged_data_reads_whole():
    folder = Path(__file__).parents[3] / "shared" / "data"
    assert folder.is_dir(), (
        f"{folder} is absent: the data sets of tests and benchmarks belong there"
    )
    expected = {"usaddress_train": 1288, "usaddress_test": 200, "restaurant8k_train": 8198}
    for name, count in (expected | {"general_64": 64, "seed_tasks": 175}).items():
        assert len(read_rows(folder / f"{name}.jsonl")) == count


def test_hub_rows_come_with_name_and_index(monkeypatch):
    records = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda name, split: asked.append((name, split)) or datasets.Dataset.from_list(records),
    )
    rows = read_hub_rows("org/name:validation")
    assert asked == [("org/name", "validation")]
    assert [row.where for row in rows] == ["org/name:validation[0]", "org/name:validation[1]"]
    assert rows[1].messages[1]["content"] == "d"


def test_hub_failure_is_one_clear_error(monkeypatch):
    def fail(name, split):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(UserError, match="'org/name' is no local file.*Couldn't reach"):
        read_hub_rows("org/name")


def test_hub_rows_of_the_wrong_form_are_named(monkeypatch):
    records = datasets.Dataset.from_list([{"text": "a"}])
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: records)
    with pytest.raises(UserError, match=r"org/name\[0\]: a row needs 'prompt' and 'completion'"):
        read_hub_rows("org/name")
