"""Trials from Optuna: shared by processes, sampled and pruned."""

import json
import subprocess
import sys
import time

import pytest
from rich.console import Console

from lora_jax import config as configs
from lora_jax.errors import UserError
from lora_jax.sweep import results
from lora_jax.sweep.space import parse_space

from .tiny import make_config

pytest.importorskip("optuna")

from lora_jax.sweep import study as studies  # noqa: E402

GRID = {"space": {"adapter.rank": [1, 2, 4], "seed": [0, 1]}}
TPE = {
    "sampler": "tpe",
    "trials": 3,
    "space": {
        "adapter.rank": [1, 4],
        "train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    },
}


def open_two(tmp_path, content, kind="journal"):
    where = str(tmp_path / "study.journal")
    if kind == "sqlite":
        where = f"sqlite:///{tmp_path / 'study.db'}"
    space = parse_space(content)
    return [studies.open_study(make_config(), space, where, "name") for _ in range(2)]


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_processes_divide_the_points_of_a_grid(tmp_path, kind):
    found, sources = [], open_two(tmp_path, GRID, kind)
    while any(asked := [one.ask(2) for one in sources]):
        found += [
            (source, trial) for source, own in zip(sources, asked, strict=True) for trial in own
        ]
    points = [json.dumps(trial.settings) for _, trial in found]
    assert len(points) == len(set(points)) == 6
    for source, trial in found:
        source.tell(trial, results.COMPLETE, 1.0)
    assert not sources[0].waits() and len(list(sources[1].others())) == 6


def test_the_trials_of_a_process_that_died_are_given_out_again(tmp_path, monkeypatch):
    dead, other = open_two(tmp_path, GRID)
    lost = {json.dumps(one.settings) for one in dead.ask(2)}
    rest = other.ask(10)
    assert len(rest) == 4 and other.waits() and not other.ask(10)
    monkeypatch.setattr(studies, "DEAD", -1.0)
    again = other.ask(10)
    assert {json.dumps(one.settings) for one in again} == lost
    for one in (*rest, *again):
        other.tell(one, results.COMPLETE, 1.0)
    assert not other.waits() and not other.ask(1)
    settings = [json.dumps(one.settings) for one in other.others()]
    assert len(settings) == len(set(settings)) == 6


def test_a_process_that_was_asleep_drops_what_others_have_taken_over(tmp_path, monkeypatch):
    asleep, other = open_two(tmp_path, GRID)
    mine = asleep.ask(2)
    monkeypatch.setattr(studies, "DEAD", -1.0)
    again = other.ask(6)
    assert len(again) == 6
    monkeypatch.setattr(studies, "BEAT", 0.01)
    found: set[int] = set()
    with asleep.held():
        while len(found) < 2:
            found |= asleep.lost()
            time.sleep(0.01)
    assert found == {one.number for one in mine}
    assert not asleep.running and not asleep.lost()


def test_a_trial_that_was_taken_over_is_not_pruned(tmp_path, monkeypatch):
    asleep, other = open_two(tmp_path, GRID | {"halving": {"first_step": 1}})
    mine = asleep.ask(2)
    monkeypatch.setattr(studies, "DEAD", -1.0)
    other.ask(6)
    assert asleep.stops(mine, 1, [1.0, 2.0]) == [False, False]
    assert asleep.lost() == {one.number for one in mine}


def test_optuna_samples_within_the_space_and_no_more_than_trials(tmp_path):
    one, other = open_two(tmp_path, TPE)
    found = [*one.ask(2), *other.ask(2)]
    assert len(found) == 3
    for trial in found:
        assert trial.settings["adapter.rank"] in (1, 4)
        assert 1e-4 <= trial.settings["train.learning_rate"] <= 1e-2
        assert trial.config.adapter.rank == trial.settings["adapter.rank"]
    shapes = {trial.config.adapter.rank for trial in one.skeleton()}
    assert shapes == {1, 4}


def test_a_process_that_resumes_takes_up_its_own_trials(tmp_path):
    first, other = open_two(tmp_path, GRID)
    (mine,) = first.ask(1)
    assert not other.adopt(mine.number, "somebody else")
    assert other.adopt(mine.number, first.owner)
    other.tell(mine, results.COMPLETE, 2.0)
    assert not first.adopt(mine.number, other.owner)
    assert [one.task_loss for one in first.others()] == [2.0]


def test_a_storage_that_cannot_be_reached(tmp_path):
    where = f"sqlite:///{tmp_path / 'missing' / 'study.db'}"
    with pytest.raises(UserError, match="cannot be reached"):
        studies.open_study(make_config(), parse_space(GRID), where, "name")


SHARED = """
import sys
from lora_jax import cli
from lora_jax.sweep import study
study.BEAT, study.DEAD = 0.2, 5.0
sys.exit(cli.main(sys.argv[1:]))
"""


def read_trials(output):
    file = output / "sweep.json"
    return json.loads(file.read_text())["trials"] if file.exists() else []


@pytest.mark.slow
def test_a_killed_process_loses_nothing_and_nothing_runs_twice(files, tmp_path):
    """Two commands share a database; the first is killed in the middle of its trials."""
    space = tmp_path / "space.yaml"
    space.write_text("space: {adapter.rank: [1, 2], seed: [0, 1, 2, 3]}\n")
    where = f"sqlite:///{tmp_path / 'study.db'}"

    def start(name):
        command = ["sweep", "--config", files / "run.yaml", "--space", space, "--members", "2"]
        command += ["--storage", where, f"output_dir={tmp_path / name}", "train.steps=40"]
        command += [f"data.eval={files / 'rows.jsonl'}", "eval.generate=false"]
        log = (tmp_path / f"{name}.log").open("w")
        return subprocess.Popen(
            [sys.executable, "-c", SHARED, *map(str, command)], stdout=log, stderr=log
        )

    first = start("a")
    while not any(one["status"] == "running" for one in read_trials(tmp_path / "a")):
        assert first.poll() is None, (tmp_path / "a.log").read_text()
        time.sleep(0.05)
    second = start("b")
    while not (tmp_path / "b" / "metrics.jsonl").exists():
        assert second.poll() is None, (tmp_path / "b.log").read_text()
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert second.wait() == 0, (tmp_path / "b.log").read_text()
    trials = read_trials(tmp_path / "b")
    points = [json.dumps(one["settings"], sort_keys=True) for one in trials]
    assert len(points) == len(set(points)) == 8
    assert {one["status"] for one in trials} == {"complete"}


def test_two_processes_share_a_sweep(files, tmp_path):
    """The second begins when the first has ended, and finds nothing left to do."""
    from lora_jax.sweep.run import SweepOptions, run_sweep

    where, books = f"sqlite:///{tmp_path / 'study.db'}", []
    space = parse_space({"space": {"adapter.rank": [1, 2]}})
    for name in ("a", "b"):
        config = configs.load(
            files / "run.yaml",
            [f"output_dir={tmp_path / name}", f"data.eval={files / 'rows.jsonl'}"]
            + ["eval.generate=false", "train.steps=2"],
        )
        options = SweepOptions(members=2, storage=where)
        books.append(run_sweep(config, space, options, Console(quiet=True)))
    found = [json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("a", "b")]
    losses = [[one["task_loss"] for one in content["trials"]] for content in found]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert [one["adapter"] for one in found[1]["trials"]] == [None, None]
