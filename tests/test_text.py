"""Text files that a user names: one reader, with or without a byte order mark, and its errors."""

import contextlib
import gzip
import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest

from lora_jax import cli, data, formats
from lora_jax import config as configs
from lora_jax.config import expand, is_directory, is_file, read_json, read_text
from lora_jax.config.text import JSON_LIMIT, TEXT_LIMIT, exists
from lora_jax.errors import UserError
from lora_jax.formats import fingerprint

from .train.tiny import CHATML, write_model

MARK = b"\xef\xbb\xbf"


@pytest.fixture
def write(tmp_path):
    """Write bytes to a file of that name, zipped if it ends in .gz."""

    def run(name, content):
        file = tmp_path / name
        file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return file

    return run


@pytest.mark.parametrize("mark", [b"", MARK])
def test_text_and_json_are_read_with_and_without_the_mark(write, mark):
    assert read_text(write("a.txt", mark + "é\r\nb\r".encode())) == "é\nb\n"
    assert read_json(write("a.json", mark + b'{"a": "\xc3\xa9"}')) == {"a": "é"}
    assert read_text(write("empty.txt", mark)) == ""


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntw\xe9", "the text is not UTF-8 (byte 0xe9 in line 2); save it as UTF-8"),
        ("text".encode("utf-16"), "the text is UTF-16; save it as UTF-8"),
        (b"\xfe\xff\x00a", "the text is UTF-16; save it as UTF-8"),
        ("text".encode("utf-32"), "the text is UTF-32; save it as UTF-8"),
        ("{}".encode("utf-16-le"), "the text has null bytes, as UTF-16 has; save it as UTF-8"),
    ],
)
def test_text_that_is_not_utf8(write, content, expected):
    file = write("a.json", content)
    for read in (read_text, read_json):
        with pytest.raises(UserError, match=re.escape(f"{file} cannot be read: {expected}")):
            read(file)
    with pytest.raises(UserError, match=re.escape(f"its name cannot be read: {expected}")):
        read_text(file, "its name")


def test_files_that_are_none(tmp_path):
    for file, reason in ((tmp_path / "no", "No such file"), (tmp_path, "Is a directory")):
        for read in (read_text, read_json):
            with pytest.raises(UserError, match=re.escape(f"{file} cannot be read: {reason}")):
                read(file)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "invalid JSON: Expecting value at line 1, column 1"),
        (b'{"a": 1,\n"b"}', "invalid JSON: Expecting ':' delimiter at line 2, column 4"),
        (b'{"a": ' + b"1" * 5000 + b"}", "invalid JSON: Exceeds the limit"),
        (b"[" * 100_000, "invalid JSON: nested too deeply: at most 100 levels are supported"),
        (
            b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
            "nested too deeply: at most 100 levels are supported",
        ),
        (b'{"a": NaN}', "invalid JSON: NaN is not a JSON number"),
        (b'{"a": [-Infinity]}', "invalid JSON: -Infinity is not a JSON number"),
        (b'{"a": 1e999}', "invalid JSON: 1e999 is too large for a number"),
        (b'{"a": {"b": 1' + b"0" * 400 + b"}}", "00 is too large for an integer"),
        (b'{"a": -' + b"9" * 41 + b"}", "99 is too large for an integer"),
        (b'{"r": 1, "a": 2, "r": 8}', "invalid JSON: an object has the key 'r' twice"),
        (b'{"a": [{"b": 1, "b": 1}]}', "invalid JSON: an object has the key 'b' twice"),
        (b'{"a": "\\ud800"}', "invalid JSON: a string has the unpaired surrogate \\ud800"),
        (b"[1]", "it must be a JSON object, not a list"),
        (b"null", "it must be a JSON object, not null"),
        (b"1.5", "it must be a JSON object, not a number"),
    ],
)
def test_json_that_is_no_object(write, content, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        read_json(write("a.json", content))


def test_json_up_to_its_limits(write):
    deep = b"[" * 99 + b"]" * 99
    content = (
        b'{"a": '
        + deep
        + b', "b": 1000000000000000019884624838656, "c": "\\ud83d\\ude42", "d": 1e308}'
    )
    found = read_json(write("a.json", content))
    assert [found["b"], found["c"], found["d"]] == [int(1e30), "\U0001f642", 1e308]


@pytest.fixture
def special(tmp_path):
    """Paths that are no files, and what is said of each."""
    (tmp_path / "loop").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "loop")
    (tmp_path / "nothing").symlink_to(tmp_path / "no")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as opened, contextlib.chdir(tmp_path):
        opened.bind("socket")
    (tmp_path / "file").write_text("")
    return {
        tmp_path / "zero": "it is a device, not a file",
        tmp_path / "pipe": "it is a pipe; write its text to a file",
        tmp_path / "socket": "it is a socket, not a file",
        tmp_path / "loop": "Too many levels of symbolic links",
        tmp_path / "nothing": "No such file or directory",
        tmp_path / ("n" * 300): "File name too long",
        tmp_path / "a\0b": "embedded null byte",
        tmp_path / "\ud800": "the name is not UTF-8",
        tmp_path / "file" / "inner": "Not a directory",
    }


def test_what_is_no_regular_file_is_not_opened(special):
    for file, reason in special.items():
        for read in (read_text, read_json):
            with pytest.raises(UserError, match=f"cannot be read: {reason}") as raised:
                read(file)
            text = str(raised.value)
            assert text.isprintable() and len(text) < 500 and text.encode("utf-8")


def test_paths_that_cannot_be_followed_are_not_said_to_be_missing(special, tmp_path):
    known = {file.name: file for file in special}
    for name in ("loop", "n" * 300, "a\0b", "\ud800", "nothing"):
        for ask in (is_file, is_directory, exists):
            with pytest.raises(UserError, match="cannot be read: "):
                ask(known[name])
    for name in ("pipe", "socket", "zero"):
        found = [ask(known[name]) for ask in (is_file, is_directory, exists)]
        assert found == [False, False, True]
    assert [ask(tmp_path / "file") for ask in (is_file, is_directory, exists)] == [
        True,
        False,
        True,
    ]
    assert [ask(tmp_path) for ask in (is_file, is_directory, exists)] == [False, True, True]
    for path in (tmp_path / "absent", tmp_path / "file" / "inner"):
        assert not any(ask(path) for ask in (is_file, is_directory, exists))
    with pytest.raises(UserError, match="model='~nobody-of-this-name/x'"):
        expand("~nobody-of-this-name/x", "model")


def test_files_of_text_have_a_largest_size(tmp_path):
    file = tmp_path / "a.json"
    for read, limit in ((read_text, TEXT_LIMIT), (read_json, JSON_LIMIT)):
        for size, reason in (
            (limit, "null bytes"),
            (limit + 1, f"limit for such a file is {limit:,}"),
        ):
            with file.open("wb") as opened:
                opened.truncate(size)  # of null bytes, which take no room
            with pytest.raises(UserError, match=rf"a\.json cannot be read: .*{reason}"):
                read(file)
    with file.open("wb") as opened:
        opened.truncate(1 << 40)
    with pytest.raises(UserError, match="it has 1,099,511,627,776 bytes"):
        read_json(file)


# Every kind of file


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"prompt": "q", "completion": "a"}\r\n'),
        ("a.json", b'[{"prompt": "q", "completion": "a"}]'),
        ("a.csv", b"prompt,completion\r\nq,a\r\n"),
        ("a.csv", b'"prompt","completion"\nq,a\n'),
        ("a.tsv", b"prompt\tcompletion\nq\ta\n"),
    ],
)
def test_data_files(write, name, content, zipped):
    plain, marked = (
        data.read(write(f"{len(mark)}{name}{zipped}", mark + content)) for mark in (b"", MARK)
    )
    assert len(marked.rows) == 1 and marked.rows[0].messages == plain.rows[0].messages
    other = write(name + zipped, content.decode().encode("utf-16"))
    expected = re.escape(f"{name}{zipped}:1: the text is UTF-16; save it as UTF-8")
    for on_bad_row in ("error", "drop"):
        with pytest.raises(UserError, match=expected):
            data.read(other, on_bad_row=on_bad_row)


@pytest.mark.parametrize(
    ("name", "line"),
    [("a.jsonl", 1), ("a.json", 1), ("a.csv", 1), ("a.tsv", 1), ("b.jsonl", 2), ("b.csv", 2)],
)
def test_null_bytes_in_data(write, name, line):
    """UTF-16 without its mark, or one null byte in the last row."""
    rows = {
        ".jsonl": b'{"prompt": "q", "completion": "a"}\n{"prompt": "q", "completion": "a?"}\n',
        ".json": b'[{"prompt": "q", "completion": "a"}]',
        ".csv": b"prompt,completion\nq,a?\n",
        ".tsv": b"prompt\tcompletion\nq\ta\n",
    }
    content = rows[Path(name).suffix]
    if name[0] == "b":
        content = content.replace(b"?", b"\0")
    else:
        content = content.decode().encode("utf-16-le")
    more = " and 2 more rows" if name == "a.jsonl" else ""  # zeros between its lines are rows too
    expected = rf"{name}:{line}{more}: the text has null bytes, as UTF-16 has; save it as UTF-8"
    with pytest.raises(UserError, match=expected):
        data.read(write(name, content))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("chat_template.jinja", CHATML.encode() + b"\0", "null bytes"),
        ("additional_chat_templates/a.jinja", CHATML.encode("utf-16"), "the text is UTF-16"),
        ("tokenizer_config.json", b'{"eos_token": "\xe9"}', "not UTF-8"),
        ("tokenizer.json", b"{", "invalid JSON"),
        ("tokenizer.json", b"[]", "must be a JSON object, not a list"),
    ],
)
def test_a_damaged_file_of_a_tokenizer_is_named(models, tmp_path, name, content, problem):
    directory = shutil.copytree(models[0], tmp_path / "model")
    (directory / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{re.escape(name)} cannot be read: .*{problem}"):
        formats.load_tokenizer(directory)


def test_a_reason_on_the_second_line_is_given(models, tmp_path):
    directory = shutil.copytree(models[0], tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": "x"}))
    with pytest.raises(UserError, match=r"can load: .*eos_token_id.*: .*'x'"):
        formats.load_tokenizer(directory)


def test_a_directory_in_place_of_a_file(tmp_path):
    for name in ("run.yaml", "lora_jax.json"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"run\.yaml cannot be read: Is a directory"):
        configs.load(tmp_path / "run.yaml")
    with pytest.raises(UserError, match=r"lora_jax\.json cannot be read: Is a directory"):
        formats.read_fingerprint(tmp_path)


def test_yaml_files(write):
    content = b"model: m\r\ntrain: {steps: 7}\r\n"
    assert configs.load(write("a.yaml", MARK + content)) == configs.load(write("b.yaml", content))
    for text in (content.decode().encode("utf-16"), b"model: \xe9"):
        with pytest.raises(UserError, match=r"config file .*c\.yaml cannot be read: the text is"):
            configs.load(write("c.yaml", text))


def test_chat_templates(write, monkeypatch):
    file = write("chat.jinja", MARK + CHATML.encode())
    assert data.resolve_template(None, str(file)) == CHATML
    monkeypatch.setenv("HOME", str(file.parent))
    assert data.resolve_template(None, "~/chat.jinja") == CHATML
    with pytest.raises(UserError, match=r"data\.chat_template='.*' cannot be read: Is a directory"):
        data.resolve_template(None, str(file.parent))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model directory without marks, and one with a mark in each of its text files."""
    plain = write_model(tmp_path_factory.mktemp("models") / "plain", eos_token_id=2)
    (plain / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    index = {"weight_map": dict.fromkeys(formats.describe(plain).params, "part.safetensors")}
    (plain / "model.safetensors").rename(plain / "part.safetensors")
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    (plain / "additional_chat_templates").mkdir()
    (plain / "additional_chat_templates" / "tool_use.jinja").write_text(CHATML + "tools")
    marked = shutil.copytree(plain, plain.parent / "marked")
    files = [file for file in marked.rglob("*") if file.suffix in (".json", ".jinja")]
    assert len(files) == 7
    for file in files:
        file.write_bytes(MARK + file.read_bytes())
    return plain, marked


def test_model_directories(models):
    plain, marked = models
    tokenizers = [formats.load_tokenizer(directory) for directory in models]
    prints = [
        fingerprint.take(directory, tokenizer, data.template_text(tokenizer, None))
        for directory, tokenizer in zip(models, tokenizers, strict=True)
    ]
    assert prints[0] == prints[1] and "tool_use" in tokenizers[1].chat_template
    assert tokenizers[1].name_or_path == str(marked)
    assert formats.describe(marked).hf_config == formats.describe(plain).hf_config
    assert formats.stop_tokens(marked) == formats.stop_tokens(plain) == [1, 2]


def test_a_run_with_marks_everywhere(models, tmp_path):
    """Its adapter answers, and its exports are files without marks."""
    plain, marked = models
    rows = b"prompt,completion\none,eins\ntwo,zwei\n"
    (tmp_path / "rows.csv").write_bytes(MARK + rows)
    template = tmp_path / "own.jinja"
    template.write_bytes(MARK + CHATML.encode())
    config = tmp_path / "run.yaml"
    config.write_bytes(
        MARK
        + f"model: {marked}\noutput_dir: {tmp_path / 'out'}\n"
        f"data: {{train: {tmp_path / 'rows.csv'}, max_length: 64}}\n"
        "train: {steps: 1, batch_size: 2}\nexport: {merged: true}\n".encode()
    )
    assert cli.main(["train", "--config", str(config)]) == 0
    out = tmp_path / "out"
    texts = [file for file in out.rglob("*") if file.suffix in (".json", ".jinja")]
    assert len(texts) > 8 and not [file for file in texts if file.read_bytes()[:3] == MARK]
    for name in ("adapter_config.json", "lora_jax.json", "tokenizer.json", "chat_template.jinja"):
        file = out / "adapter" / name
        file.write_bytes(MARK + file.read_bytes())
    ask = ["generate", "--prompt", "one", "--max-new-tokens", "2", "--model"]
    assert cli.main([*ask, str(plain), "--adapter", str(out / "adapter")]) == 0


def test_a_message_keeps_the_start_and_the_end_of_a_long_line():
    message = str(UserError(f"a.json: x={'9' * 100_000}; at most 9\nnext"))
    assert message.startswith("a.json: x=999") and message.endswith("9; at most 9\nnext")
    assert len(message) < 2100
