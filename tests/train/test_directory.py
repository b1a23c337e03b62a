"""Which directories a run takes, what it removes there, and what it never touches."""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from lora_jax import config as configs
from lora_jax import formats
from lora_jax.cli import train_main
from lora_jax.errors import UserError
from lora_jax.train import checkpoint, lock
from lora_jax.train.directory import open_run

from .tiny import make_config, tiny_model

STATE = {"w": {"lora_a": jnp.ones(3)}}


@contextlib.contextmanager
def opened(output, *overrides):
    """A run in its directories: the run and the record that it goes on from."""
    with contextlib.ExitStack() as held:
        yield open_run(make_config(f"output_dir={output}", *overrides), held)


def refused(output, *overrides):
    """The message for directories that are not taken; nothing in or around them may change."""
    before = snapshot(output.parent)
    with pytest.raises(UserError) as caught, opened(output, *overrides):
        pass
    assert snapshot(output.parent) == before
    return str(caught.value)


def snapshot(directory):
    return {
        str(path): "->" + os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else "directory"
        for path in directory.rglob("*")
    }


def save(place, *steps, run=None, config=None):
    """Checkpoints as a run writes them; without `run`, as they were before runs had IDs."""
    record = {"config": {}} if config is None else {"config": config}
    record |= {} if run is None else {"run": run}
    with checkpoint.open_checkpoints(place) as kept:
        for step in steps:
            kept.save(step, STATE, STATE, record)


def begin(output, *overrides, steps=()):
    """A run that was killed, with a log, after it saved `steps`."""
    with opened(output, *overrides) as (run, _):
        run.begin()
        (output / "config.yaml").write_text(configs.dump(make_config(*overrides)))
        (output / "metrics.jsonl").write_text('{"step": 1}\n')
        if steps:
            save(run.place, *steps, run=run.id)
            run.committed()
        return run


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ("here/a", "here/b", "here/a"),
        (None, "here/b", "out/checkpoints"),
        ("here/a", None, "here/a"),
    ],
)
def test_another_checkpoint_dir_does_not_start_anew(tmp_path, before, now, named):
    def option(place):
        return [] if place is None else [f"checkpoint_dir={tmp_path / place}"]

    output = tmp_path / "out"
    begin(output, *option(before), steps=(5,))
    for resume in ("auto", "true"):
        told = refused(output, f"resume={resume}", *option(now))
        assert f" were in {tmp_path / named}" in told
    with opened(output, "resume=auto", *option(before)) as (_, record):
        assert record["step"] == 5
    # Moved checkpoints are those of the run wherever they are.
    place = tmp_path / (before or "out/checkpoints")
    place.rename(tmp_path / "moved")
    with opened(output, "resume=auto", f"checkpoint_dir={tmp_path / 'moved'}") as (run, record):
        assert record["step"] == 5 and run.content["checkpoint_dir"] == str(tmp_path / "moved")
    (output / "checkpoints").mkdir(exist_ok=True)
    assert "its run had some" in refused(output, "resume=auto")


def test_before_the_first_checkpoint_it_may_be_another_one(tmp_path):
    begin(tmp_path / "out", f"checkpoint_dir={tmp_path / 'a'}")
    with opened(tmp_path / "out", "resume=auto", f"checkpoint_dir={tmp_path / 'b'}") as found:
        run, record = found
        assert record is None
        run.clear_logs()
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("resume", ["auto", "false", "true"])
def test_a_foreign_directory_is_left_alone(tmp_path, resume):
    output = tmp_path / "out"
    (output / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "run.json"):
        (output / name).write_text("{}")
    assert "no checkpoint" in refused(output, f"resume={resume}") or resume != "true"
    (output / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
    (output / "checkpoints" / "model.bin").write_text("mine")
    assert "other files (7.orbax" in refused(output, f"resume={resume}")


def test_a_checkpoint_dir_of_other_files_is_refused(tmp_path, monkeypatch):
    output, mine = tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    monkeypatch.setenv("HOME", str(mine))
    monkeypatch.chdir(mine)
    for place in ("/", ".", "'~'", "''", mine, tmp_path):
        for resume in ("auto", "false"):
            told = refused(output, f"checkpoint_dir={place}", f"resume={resume}")
            assert "has other files (" in told and "choose another" in told
    assert "is a file" in refused(output, f"checkpoint_dir={mine / 'thesis.tex'}")
    for place in (output, output / "adapter", output / "plots" / "x"):
        told = refused(output, f"checkpoint_dir={place}")
        assert "leave it out for checkpoints in OUTPUT_DIR/checkpoints" in told
    long, null = f"{tmp_path}/{'x' * 300}", f"{tmp_path}/a\0b"
    for settings in ((output, f"checkpoint_dir={long}"), (long,)):
        with pytest.raises(UserError, match=r"has \d+ bytes"), opened(*settings):
            pass
    config = make_config(f"output_dir={output}")
    for change in ({"output_dir": null}, {"checkpoint_dir": null}):
        with pytest.raises(UserError, match="cannot be used: "), contextlib.ExitStack() as held:
            open_run(dataclasses.replace(config, **change), held)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("name", ["²", "2019", "01", "link", "file"])
def test_what_only_looks_like_a_step_is_refused_by_name(tmp_path, external, name):
    output, other = tmp_path / "out", tmp_path / "other"
    option = [f"checkpoint_dir={other}"] if external else []
    run = begin(output, *option, steps=(5,))
    place = Path(run.place)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "1.jpg").write_text("mine")
    match name:
        case "link":
            (place / "7").symlink_to(shutil.copytree(place / "5", tmp_path / "7"))
            name = "7"
        case "file":
            (place / "7").write_text("mine")
            name = "7"
        case _:
            shutil.copytree(photos, place / name)
    told = refused(output, "resume=true", *option)
    assert f"looks like one: {name}; move it away" in told
    assert checkpoint.list_steps(place)[0] == 5  # other readers do not fail


def test_an_empty_directory_that_a_kill_left_of_a_step_is_no_obstacle(tmp_path):
    run = begin(tmp_path / "out", steps=(5,))
    (Path(run.place) / "3").mkdir()
    with opened(tmp_path / "out", "resume=true") as (_, record):
        assert record["step"] == 5


def test_steps_whose_records_are_damaged_are_never_removed(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "1" / "record" / "metadata").write_text("{}")
    with checkpoint.open_checkpoints(tmp_path, 1) as kept:
        for step in (3, 4):
            kept.save(step, STATE, STATE, {})
    assert checkpoint.list_steps(tmp_path) == [1, 4]


@pytest.mark.parametrize("asked", [None, 9])
def test_a_step_with_the_record_of_another_is_refused(tmp_path, asked):
    save(tmp_path, 3, 5)
    (tmp_path / "5").rename(tmp_path / "9")
    with pytest.raises(UserError, match=r"9 is the checkpoint of step 5, renamed"):
        checkpoint.read_record(tmp_path, asked)
    with pytest.raises(UserError, match="9 is the checkpoint of step 5"):
        checkpoint.restore(tmp_path, STATE, step=9)
    assert checkpoint.read_record(tmp_path, 3)["step"] == 3


def test_two_runs_with_one_checkpoint_dir(tmp_path):
    shared = f"checkpoint_dir={tmp_path / 'c'}"
    with opened(tmp_path / "a", shared) as (run, _):
        told = refused(tmp_path / "b", shared, "resume=auto")
        assert f"checkpoint_dir={str(tmp_path / 'c')!r} is in use by process {os.getpid()}" in told
        run.begin()
    assert "already has a run" in refused(tmp_path / "b", shared)
    first = begin(tmp_path / "a", shared, "resume=auto", steps=(5,))
    begin(tmp_path / "b", steps=(3,))
    told = refused(tmp_path / "b", shared, "resume=auto")
    assert f"has checkpoints of run {first.id}" in told and "leave checkpoint_dir out" in told
    # Where the logs are lost with their machine, the run goes on elsewhere.
    with opened(tmp_path / "new", shared, "resume=auto") as (run, record):
        assert (run.id, record["step"]) == (first.id, 5)
    save(tmp_path / "c", 7, run="another")
    assert "checkpoints of several runs" in refused(tmp_path / "new", shared, "resume=auto")


def test_one_run_at_a_time_and_none_after_a_kill(tmp_path):
    output = tmp_path / "out"
    with opened(output):
        told = refused(output, "resume=auto")
        assert f"output_dir={str(output)!r} is in use by process {os.getpid()} on host" in told
        assert "is in use" in refused(output / "checkpoints")
        assert "is in use" in refused(tmp_path / "b", f"checkpoint_dir={output / 'checkpoints'}")
    assert list(output.iterdir()) == []
    (output / "checkpoints").mkdir()
    for directory in (output, output / "checkpoints"):
        (directory / lock.NAME).write_text(
            json.dumps(
                {
                    **{"token": "0" * 16, "host": "h", "pid": 1, "since": 0.0, "started": "0"},
                    **{"machine": lock._machine(), "namespace": "", "locked": True},
                }
            )
        )
    with opened(output):
        pass
    assert list(output.iterdir()) == []


def test_a_directory_of_before_there_were_ids(tmp_path):
    """The checkpoints and the config next to them prove it; another config does not."""
    output, options = tmp_path / "out", ("seed=3", "train.steps=9")
    config = json.loads(json.dumps(configs.settings.dataclasses.asdict(make_config(*options))))
    save(output / "checkpoints", 5, config=config)
    (output / "config.yaml").write_text(configs.dump(make_config(*options)))
    (output / "metrics.jsonl").write_text('{"step": 1}\n')
    (output / "adapter").mkdir()
    (output / "adapter" / "adapter_model.safetensors").write_text("?")
    assert "already has a run" in refused(output, *options)
    with opened(output, "resume=auto", *options) as (run, record):
        assert record["step"] == 5 and not run.begun
        run.clear_logs()
        run.remove_exports()
        with pytest.raises(UserError, match="adapter has files that this run did not write"):
            run.check_exports(["adapter"])
        run.begin()
    assert (output / "metrics.jsonl").exists() and (output / "adapter").exists()
    with opened(output, "resume=auto", *options) as (run, _):
        assert run.begun
    (output / "run.json").unlink()
    (output / "config.yaml").write_text(configs.dump(make_config("seed=4")))
    assert "and no run.json or config.yaml that says" in refused(output, "resume=true")
    (output / "config.yaml").write_text("{")
    assert "and no run.json or config.yaml that says" in refused(output, "resume=true")
    # A mistyped output_dir with the right checkpoint_dir.
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    place = f"checkpoint_dir={output / 'checkpoints'}"
    assert "has thesis.tex" in refused(tmp_path / "thesis", place, "resume=true")


KINDS = ("link to a directory", "link to a file", "dangling link", "file", "directory")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["adapter", "merged", "plots", "summary.json", "metrics.jsonl", ".summary.json"]
)
def test_links_and_other_kinds_in_the_place_of_outputs(tmp_path, name, kind):
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    begin(output, steps=(5,))
    (output / "metrics.jsonl").unlink()
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("mine")
    path = output / name
    match kind:
        case "link to a directory":
            path.symlink_to(elsewhere)
        case "link to a file":
            path.symlink_to(elsewhere / "thesis.tex")
        case "dangling link":
            path.symlink_to(elsewhere / "nothing")
        case "file":
            path.write_text("mine")
        case "directory":
            path.mkdir()
    if kind == ("file" if "." in name else "directory"):
        with opened(output, "resume=true"):
            return
    told = refused(output, "resume=true")
    assert f"{path} is " in told and "move it away" in told


def test_checkpoints_may_be_on_another_disk(tmp_path):
    output = tmp_path / "out"
    run = begin(output, steps=(5,))
    (output / "checkpoints").rename(tmp_path / "disk")
    (output / "checkpoints").symlink_to(tmp_path / "disk")
    with opened(output, "resume=true") as (again, record):
        assert record["step"] == 5 and again.id == run.id
        assert "is in use" in refused(tmp_path / "b", f"checkpoint_dir={tmp_path / 'disk'}")


def export(run, name, **files):
    with run.exporting(name, make_config()) as target:
        target.mkdir(parents=True)
        for file, text in files.items():
            path = target / file.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def test_only_what_the_run_wrote_is_removed(tmp_path):
    output = tmp_path / "out"
    mine = tmp_path / "mine"
    mine.mkdir()
    with opened(output) as (run, _):
        run.begin()
        export(run, "adapter", config="1", tokens="1", a__b="1")
        (output / "adapter" / "notes.txt").write_text("mine")
        (output / "adapter" / "a" / "notes.txt").write_text("mine")
        for name in (".merged-mine", ".adapter-mine", ".export-mine"):
            (output / name).mkdir()
        before = {path.name for path in output.iterdir()}
        export(run, "adapter", config="2", c__d="2")
        found = {
            path.relative_to(output / "adapter").as_posix(): path.read_text()
            for path in (output / "adapter").rglob("*")
            if path.is_file()
        }
        assert found == {"config": "2", "c/d": "2", "notes.txt": "mine", "a/notes.txt": "mine"}
        # What a kill leaves of an export has the run's ID in its name.
        (output / f".export-{run.id}" / "adapter").mkdir(parents=True)
        run.remove_exports()
        assert {path.name for path in output.iterdir()} == before
        assert not (output / "adapter" / "config").exists()
        assert (output / "adapter" / "a" / "notes.txt").read_text() == "mine"
        shutil.rmtree(output / "adapter")
        export(run, "adapter", config="1", a__b="1")
        shutil.rmtree(output / "adapter" / "a")
        (output / "adapter" / "a").symlink_to(mine)
        (mine / "b").write_text("mine")
        run.remove_exports()
        assert (mine / "b").read_text() == "mine"
        with pytest.raises(UserError, match="a is a link"):
            export(run, "adapter", a__b="2")
        (output / "adapter").rename(tmp_path / "moved")
        (output / "adapter").symlink_to(mine)
        run.remove_exports()
        with pytest.raises(UserError, match="written by another program during the run"):
            export(run, "adapter", b="2")
        (output / "merged").mkdir()
        (output / "merged" / "mine").write_text("mine")
        with pytest.raises(UserError, match="written by another program during the run"):
            export(run, "merged", b="2")
    assert (mine / "b").read_text() == "mine" and (output / "merged" / "mine").exists()
    assert {path.name for path in output.glob(".*")} == {
        *(".merged-mine", ".adapter-mine", ".export-mine")
    }


@pytest.mark.parametrize("file", ["../mine", "/etc/x", "a//b", "", "a\0b", 5])
def test_a_run_json_that_names_files_elsewhere_is_refused(tmp_path, file):
    begin(tmp_path / "out", steps=(5,))
    marker = tmp_path / "out" / "run.json"
    content = json.loads(marker.read_text())
    marker.write_text(json.dumps(content | {"exports": {"adapter": {"files": [file]}}}))
    assert "run.json is damaged: exports.adapter" in refused(tmp_path / "out", "resume=true")


def test_a_save_after_another_run_took_over_is_refused(tmp_path):
    output = tmp_path / "out"
    with opened(output) as (run, _):
        run.begin()
        with checkpoint.open_checkpoints(run.place, None, run.check, run.committed) as kept:
            kept.save(1, STATE, STATE, {})
            kept.wait()
            assert json.loads((output / "run.json").read_text())["saved"] is True
            file = output / lock.NAME
            content = json.loads(file.read_text())
            file.unlink()
            file.write_text(json.dumps(content | {"machine": "another", "host": "elsewhere"}))
            with pytest.raises(UserError, match="on host elsewhere"):
                kept.save(2, STATE, STATE, {})
    assert checkpoint.list_steps(output / "checkpoints") == [1]


def test_a_full_disk_in_an_export_is_one_error_and_leaves_nothing(tmp_path):
    """A file size limit stands for it: safetensors has an error of its own for both."""
    model = tiny_model()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*merged: .*File too large"):
            formats.write_model(tmp_path / "merged", model, model.params, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


# Finished runs


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "out"
    assert train_main(["--config", str(files / "run.yaml"), f"output_dir={output}"]) == 0
    return output


@pytest.fixture
def again(files, finished, tmp_path, capsys):
    """`again(change, *overrides)`: status and console of a resume after a change of its copy."""
    output = tmp_path / "out"

    def run(change, *overrides, resume="auto"):
        if not output.exists():
            shutil.copytree(finished, output)
        change(output)
        capsys.readouterr()
        command = ["--config", str(files / "run.yaml"), f"output_dir={output}", *overrides]
        status = train_main([*command, f"resume={resume}"])
        return status, capsys.readouterr().err

    run.output = output
    return run


def hashes(directory):
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.rglob("*")
        if file.is_file()
    }


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "is missing": lambda output: shutil.rmtree(output / "adapter"),
    "adapter_config.json is missing": lambda output: (
        output / "adapter" / "adapter_config.json"
    ).unlink(),
    "adapter_model.safetensors differs": lambda output: flip(
        output / "adapter" / "adapter_model.safetensors"
    ),
    "tokenizer.json differs": lambda output: (output / "adapter" / "tokenizer.json").write_text(
        "{}"
    ),
}


def test_exports_of_a_finished_run_are_made_again_where_they_are_not_right(again, finished, capsys):
    whole = hashes(finished)
    outputs = json.loads((finished / "summary.json").read_text())["outputs"]
    assert {name: digest["sha256"] for name, digest in outputs.items()} == {
        name: digest for name, digest in whole.items() if name.startswith("adapter/")
    }
    assert outputs["adapter/adapter_config.json"]["bytes"] > 100
    for reason, damage in DAMAGES.items():
        status, told = again(damage)
        assert status == 0 and f"{again.output / 'adapter'} is" in told and reason in told
        assert "it is exported again from the checkpoint of step 2" in told
        assert hashes(again.output) == whole
    status, told = again(lambda output: (output / "adapter" / "mine.txt").write_text("mine"))
    assert status == 0 and "nothing is left to do" in told
    assert hashes(again.output) == whole | {"adapter/mine.txt": hashlib.sha256(b"mine").hexdigest()}


def test_a_finished_run_gets_the_exports_that_are_asked_for_now(again):
    nothing = lambda output: None  # noqa: E731
    status, told = again(nothing, "export.merged=true")
    assert status == 0 and f"{again.output / 'merged'} is missing: it is exported" in told
    summary = json.loads((again.output / "summary.json").read_text())
    assert "merged/model.safetensors" in summary["outputs"] and summary["merge"]["dtype"]
    for _ in range(2):
        status, told = again(nothing, "export.merged=true", "export.dtype=bfloat16")
        assert status == 0
    assert "nothing is left to do" in told
    found = formats.tensors.list_tensors(again.output / "merged").values()
    assert {tensor.dtype.name for tensor in found} == {"bfloat16"}


def test_what_was_not_exported_by_the_run_is_not_replaced(again):
    def mine(output):
        (output / "merged").mkdir()
        (output / "merged" / "model.safetensors").write_text("mine")

    status, told = again(mine, "export.merged=true")
    assert (
        status == 2 and f"{again.output / 'merged'} has files that this run did not write" in told
    )
    assert (again.output / "merged" / "model.safetensors").read_text() == "mine"
    # More steps: found before the first of them.
    status, told = again(
        lambda output: None,
        *("export.merged=true", "train.steps=4", "allow_change=[train.steps]"),
    )
    assert status == 2 and "has files that this run did not write" in told and "step 3" not in told


def test_without_digests_a_line_says_that_nothing_is_checked(again):
    def forget(output):
        file = output / "summary.json"
        content = json.loads(file.read_text())
        del content["outputs"]
        file.write_text(json.dumps(content))

    status, told = again(forget)
    assert status == 0 and "they are not checked" in told
    status, told = again(lambda output: shutil.rmtree(output / "adapter"))
    assert status == 0 and "is missing: it is exported again" in told


def test_a_run_that_goes_on_replaces_its_own_exports(again, finished):
    status, _ = again(
        lambda output: (output / "adapter" / "mine.txt").write_text("mine"),
        *("train.steps=3", "allow_change=[train.steps]", "train.schedule=linear"),
    )
    assert status == 0
    assert (again.output / "adapter" / "mine.txt").read_text() == "mine"
    file = "adapter/adapter_model.safetensors"
    assert (again.output / file).read_bytes() != (finished / file).read_bytes()
