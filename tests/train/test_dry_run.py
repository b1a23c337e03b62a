"""The dry run reads the first rows, says what it did not check, and writes nothing."""

import json
import os

import pytest

from lora_jax import demo
from lora_jax.cli import train_main

CSV = "question,answer,origin\none,eins,a\ntwo,zwei,b\n"
COLUMNS = ("data.prompt={question}", "data.completion={answer}")


@pytest.fixture
def preview(files, tmp_path, capsys):
    """Run `--dry-run`; returns the status, stdout and stderr."""

    def run(*overrides):
        capsys.readouterr()
        output = tmp_path / "none" / "out"
        command = ["--config", str(files / "run.yaml"), "--dry-run", f"output_dir={output}"]
        status = train_main([*command, *overrides])
        assert not (tmp_path / "none").exists()
        return status, *capsys.readouterr()

    return run


def write(file, text):
    file.write_text(text, encoding="utf-8")
    return file


def test_all_is_well(preview, files):
    status, out, _ = preview()
    assert status == 0
    assert f"data.train {files / 'rows.jsonl'}: 4 rows read\n" in out
    assert "PartitionSpec" not in out and "partition" not in out


def test_partitions_are_shown_on_several_devices(preview):
    _, out, _ = preview("mesh.fsdp=2", "mesh.data=1")
    assert "partition of lora_a; lora_b" in out and "'fsdp'" in out


def test_columns_that_are_not_used_are_named(preview, tmp_path):
    file = write(tmp_path / "rows.csv", CSV)
    status, out, _ = preview(f"data.train={file}", *COLUMNS)
    assert status == 0
    assert f"{file}: 2 rows read; columns not used: 'origin'\n" in out


def test_a_long_file_is_checked_in_part(preview, tmp_path):
    row = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    file = write(tmp_path / "rows.jsonl", row * 30 + "no json\n")
    status, out, _ = preview(f"data.eval={file}")
    assert status == 0
    assert f"data.eval {file}: the first 20 rows read, the rest not checked\n" in out


def test_bad_rows_that_are_dropped_are_counted(preview, tmp_path):
    file = write(tmp_path / "rows.jsonl", '{"prompt": "a", "completion": "b"}\nnot json\n')
    assert "rows.jsonl:2: invalid JSON" in preview(f"data.train={file}")[2]
    assert (
        "2 rows read; 1 bad row to be dropped"
        in preview(f"data.train={file}", "data.on_bad_row=drop")[1]
    )


def test_what_is_elsewhere_is_not_fetched(preview, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_fill", lambda *_: pytest.fail("fetched"))
    status, out, _ = preview("data.train=org/name", "data.eval=demo:usaddress-test")
    assert status == 0
    assert "data.train org/name: not checked, as it is on the hub\n" in out
    assert "data.eval demo:usaddress-test: not checked, as it has not been fetched yet\n" in out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.train=missing.jsonl"], "data file missing.jsonl does not exist"),
        (["data.eval=missing.csv"], "data file missing.csv does not exist"),
        (["data.regression=missing.csv"], "data file missing.csv does not exist"),
        (["data.eval=demo:nothing"], "there is no demo named 'nothing'"),
        (["data.prompt={nothing}", "data.completion=x"], "data.prompt names {nothing}"),
        (["eval.metrics=[blue]"], "'blue' is not one of"),
        (["eval.metrics=accuracy"], "eval.metrics: accuracy is for classifiers"),
        (["data.label=kind"], "data.label='kind' is for classifiers"),
        (["export.max_shard_size=infGB"], "size 'infGB' is not a positive size"),
        (["export.max_shard_size=nanMB"], "size 'nanMB' is not a positive size"),
        (["export.max_shard_size=-1GB"], "size '-1GB' is not a positive size"),
        (["export.max_shard_size=5XB"], "size '5XB' is not a positive size"),
        (["mesh.data=3"], "train.batch_size=4 rows cannot be split over 3 devices"),
        (["output_dir=/dev/null/x"], "'/dev/null' is a file"),
        (["checkpoint_dir=/dev/null/x"], "'/dev/null' is a file"),
    ],
)
def test_what_a_run_would_refuse(preview, overrides, expected):
    status, out, error = preview(*overrides)
    assert status == 2 and expected in error


def test_a_directory_that_cannot_be_written(preview, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    status, _, error = preview()
    assert status == 2 and f"{str(tmp_path)!r} is not writable" in error


def test_a_directory_in_use_is_named(preview, files, tmp_path):
    (tmp_path / "used").mkdir()
    write(tmp_path / "used" / "mine.txt", "mine")
    status, out, _ = preview(f"output_dir={tmp_path / 'used'}")
    assert status == 0
    assert f"warning: a run would be refused: output_dir={str(tmp_path / 'used')!r} already" in out
