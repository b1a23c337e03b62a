"""TensorBoard for real; Weights & Biases and Trackio by stand-ins that record what is called."""

import contextlib
import importlib.machinery
import json
import re
import shutil
import struct
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lora_jax.cli import train_main
from lora_jax.errors import UserError
from lora_jax.report.journal import read_lines
from lora_jax.report.trackers import check_trackers, open_trackers

from .tiny import make_config


class Stand:
    """A package with `init(..., **options)` whose run takes `log(numbers, step=..)`, as both
    packages have it; Weights & Biases' run is left as a context, Trackio's by `finish()`.
    """

    def __init__(self):
        self.calls = []

    def module(self, name):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(init=self.init, finish=lambda: self.calls.append("finish"))
        return module

    def init(self, **options):
        self.calls.append(options)
        return self

    def log(self, numbers, step):
        self.calls.append((step, numbers))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.calls.append("finish")


@pytest.fixture(scope="module")
def stands():
    """The stand-ins of both packages, in place of what may be installed."""
    made = {"wandb": Stand(), "trackio": Stand()}
    with pytest.MonkeyPatch.context() as patch:
        for name, stand in made.items():
            patch.setitem(sys.modules, name, stand.module(name))
        yield made


def read_events(file: Path) -> list[Event]:
    """The events of a file, each as length (8 bytes), checksum (4), content, checksum (4)."""
    content, events = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def shown(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Curves (step, value) by name, as TensorBoard shows them: a session that starts at a step
    hides what earlier files hold from there on.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(directory.glob("events.out.tfevents.*")):
        for event in read_events(file):
            if event.session_log.status == SessionLog.START:
                curves = {
                    name: [point for point in points if point[0] < event.step]
                    for name, points in curves.items()
                }
            for value in event.summary.value:
                curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves


def step_zero(output):
    """Numbers of the base, which are in no line of metrics.jsonl."""
    task = json.loads((output / "summary.json").read_text())["task"]
    return {"task_loss": task["loss_before"]}


def expected_curves(output):
    curves = {name: [(0, float(np.float32(value)))] for name, value in step_zero(output).items()}
    for line in read_lines(output / "metrics.jsonl"):
        for name, value in line.items():
            if name != "step":
                curves.setdefault(name, []).append((line["step"], float(np.float32(value))))
    return curves


@pytest.fixture(scope="module")
def runs(files, stands, tmp_path_factory):
    """A run of four steps, and the same killed after step 4 was logged and before it was saved,
    which went on from step 2: their directories.
    """
    whole = tmp_path_factory.mktemp("trackers") / "whole"
    settings = (
        *("train.steps=4", "train.save_every=2", "train.eval_every=2", "eval.generate=false"),
        *("train.report_to=[tensorboard,wandb,trackio]", f"data.eval={files / 'rows.jsonl'}"),
    )

    def train(output, *more):
        command = ["--config", str(files / "run.yaml"), f"output_dir={output}", *settings, *more]
        assert train_main(command) == 0

    train(whole)
    went_on = whole.with_name("went_on")
    shutil.copytree(whole, went_on)
    shutil.rmtree(went_on / "checkpoints" / "4")
    (went_on / "summary.json").unlink()
    train(went_on, "resume=true")
    return whole, went_on


def test_tensorboard_has_the_numbers_of_metrics_jsonl(runs):
    found = shown(runs[0] / "tensorboard")
    assert found == expected_curves(runs[0])
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in found["task_loss"]] == [0, 2, 4]
    assert set(found) > {"norm_update", "learning_rate", "grad_norm", "supervised_tokens"}


def test_a_run_that_goes_on_shows_each_step_once(runs):
    assert len(list((runs[1] / "tensorboard").iterdir())) == 2
    assert shown(runs[1] / "tensorboard") == expected_curves(runs[1])


def test_wandb_and_trackio_are_called_with_every_line_and_go_on_in_the_same_run(runs, stands):
    lines = [(line.pop("step"), line) for line in read_lines(runs[0] / "metrics.jsonl")]
    again = [(line.pop("step"), line) for line in read_lines(runs[1] / "metrics.jsonl")]
    own = (runs[0] / "run_id.txt").read_text()
    assert (runs[1] / "run_id.txt").read_text() == own
    assert re.fullmatch("whole-[0-9a-f]{8}", own)
    for name, stand in stands.items():
        first, *rest = stand.calls
        sent = [(0, step_zero(runs[0])), *lines, "finish"]
        assert rest[: len(sent)] == sent
        second, *rest = rest[len(sent) :]
        assert rest == [*again[2:], "finish"]
        for options in (first, second):
            config = options.pop("config")
            assert config["train"]["steps"] == 4 and json.dumps(config)
        expected = {"project": "lora_jax", "resume": "allow"}
        if name == "wandb":
            assert first == expected | {"id": own, "name": "whole", "dir": runs[0]}
            assert second == expected | {"id": own, "name": "went_on", "dir": runs[1]}
        else:  # known by its name alone
            assert first == second == expected | {"name": own}


def test_a_run_that_starts_anew_is_another_one(tmp_path, stands):
    config = make_config("train.report_to=[wandb]")
    ids = []
    for first_step in (1, 1, 3):
        with open_trackers(config, tmp_path, first_step):
            ids.append(stands["wandb"].calls[-1]["id"])
    assert ids[0] != ids[1] == ids[2]


def test_without_sinks_nothing_is_written(tmp_path):
    with open_trackers(make_config(), tmp_path, 1) as trackers:
        assert trackers == [] and not list(tmp_path.iterdir())


def test_tensorboard_started_anew_hides_what_was_there(tmp_path):
    config = make_config("train.report_to=[tensorboard]")
    for value in (1.0, 2.0):
        with open_trackers(config, tmp_path, 1) as (send,):
            send(1, {"loss": value})
        time.sleep(1.1)  # files are named by the second
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert shown(tmp_path / "tensorboard") == {"loss": [(1, 2.0)]}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_sink_that_does_not_start_is_one_error_and_the_others_are_closed(
    tmp_path, monkeypatch, name
):
    def refuse(**_):
        raise RuntimeError("no API key")

    for package in ("wandb", "trackio"):
        module = Stand().module(package)
        monkeypatch.setitem(sys.modules, package, module)
    other = Stand()
    kinds = {"wandb": "trackio", "trackio": "wandb"}
    monkeypatch.setitem(sys.modules, kinds[name], other.module(kinds[name]))
    monkeypatch.setattr(sys.modules[name], "init", refuse)
    config = make_config(f"train.report_to=[{kinds[name]}, {name}]")
    with contextlib.ExitStack() as stack, pytest.raises(UserError) as raised:
        stack.enter_context(open_trackers(config, tmp_path, 1))
    assert str(raised.value) == (
        f"train.report_to: {name} cannot be started: no API key. Set it up, or leave it out"
    )
    assert other.calls[-1] == "finish"


def test_missing_packages_are_named_before_anything_is_read(tmp_path, files, monkeypatch, capsys):
    for package in ("wandb", "trackio", "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)
    check_trackers([])
    with pytest.raises(UserError) as raised:
        check_trackers(["wandb", "tensorboard"])
    assert str(raised.value) == (
        "train.report_to=['wandb', 'tensorboard'] needs packages that are not installed; "
        "pip install 'lora_jax[wandb]'; pip install 'lora_jax[tensorboard]'"
    )
    output = tmp_path / "out"
    command = ["--config", str(files / "run.yaml"), f"output_dir={output}", "model=not/there"]
    capsys.readouterr()
    assert train_main([*command, "train.report_to=[trackio]"]) == 2
    assert "error: train.report_to=['trackio'] needs" in capsys.readouterr().err
    assert not output.exists()
