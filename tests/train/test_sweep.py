"""Sweeps from the config to the exported adapters."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from lora_jax import cli
from lora_jax import config as configs
from lora_jax.errors import UserError
from lora_jax.sweep import fit, training
from lora_jax.sweep.run import SweepOptions, run_sweep
from lora_jax.sweep.space import parse_space
from lora_jax.train import loop

from .tiny import ROWS, SUMS, distance, write_rows

QUIET = Console(quiet=True)
SPACE = {
    "space": {
        "member": [
            {"adapter.rank": 2, "train.learning_rate": 0.01, "seed": 1},
            {"adapter.rank": 4, "train.learning_rate": 0.003, "seed": 2},
            {"adapter.rank": 1, "train.learning_rate": 0.001, "seed": 3},
        ]
    }
}


def settings_of(files, output, *more):
    return configs.load(
        files / "run.yaml",
        [f"output_dir={output}", f"data.eval={files / 'rows.jsonl'}", "eval.generate=false"]
        + ["train.steps=4", *more],
    )


def sweep(files, output, space=SPACE, members=2, best=1, more=()):
    config = settings_of(files, output, *more)
    return run_sweep(config, parse_space(space), SweepOptions(members, best), QUIET)


def read_weights(directory):
    return load_file(directory / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep") / "out"
    sweep(files, output, best=3)
    return output


def test_results_table_best_and_adapters(files, done):
    found = json.loads((done / "sweep.json").read_text())
    trials = found["trials"]
    assert [one["number"] for one in trials] == [0, 1, 2]
    assert {one["status"] for one in trials} == {"complete"}
    assert all(np.isfinite(one["task_loss"]) and one["steps"] == 4 for one in trials)
    assert [one["programs"] for one in found["groups"]] == [1]
    assert trials[0]["settings"] == SPACE["space"]["member"][0]
    best = min(trials, key=lambda one: one["task_loss"])
    assert found["best"][0] == best["number"]
    config = configs.load(done / "best.yaml")
    assert config.adapter.rank == best["settings"]["adapter.rank"]
    names = sorted(path.name for path in (done / "adapters").iterdir())
    assert names == ["trial-0", "trial-1", "trial-2"]
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert {(one["trial"], one["step"]) for one in lines} == {
        (trial, step) for trial in range(3) for step in range(1, 5)
    }


def test_a_trial_equals_the_run_of_its_config(files, done, tmp_path):
    """The third trial takes a place that another one left."""
    number, given = 2, SPACE["space"]["member"][2]
    overrides = [f"{name}={value}" for name, value in given.items()]
    summary = loop.run(settings_of(files, tmp_path / "run", *overrides), QUIET)
    trial = json.loads((done / "sweep.json").read_text())["trials"][number]
    assert abs(trial["task_loss"] - summary["task"]["loss_after"]) <= 1e-5
    alone = read_weights(tmp_path / "run" / "adapter")
    own = read_weights(done / "adapters" / f"trial-{number}")
    assert distance(own, alone) <= 1e-5


class Killed(Exception):
    pass


def test_a_killed_sweep_resumes_bit_for_bit(files, done, tmp_path, monkeypatch):
    output, calls = tmp_path / "out", []
    original = training.Training._round

    def dies(self, places):
        calls.append(1)
        if len(calls) == 6:  # two steps of the third trial
            raise Killed
        return original(self, places)

    monkeypatch.setattr(training.Training, "_round", dies)
    with pytest.raises(Killed):
        sweep(files, output, best=3, more=["train.save_every=1"])
    monkeypatch.undo()
    sweep(files, output, best=3, more=["train.save_every=1", "resume=true"])
    first, second = (json.loads((d / "sweep.json").read_text()) for d in (done, output))
    assert first["trials"] == second["trials"]
    for number in range(3):
        own = [read_weights(d / "adapters" / f"trial-{number}") for d in (done, output)]
        jax.tree.map(np.testing.assert_array_equal, *own)
    lines = [(d / "metrics.jsonl").read_text() for d in (done, output)]
    assert lines[0] == lines[1]


def test_tenants_are_trained_together_and_named_by_their_files(files, tmp_path):
    rows = {"acme": SUMS[:6], "beta": SUMS[6:16]}
    for name, own in rows.items():
        write_rows(tmp_path / f"{name}.jsonl", own)
    space = {
        "space": {
            "tenant": [
                {"data.train": str(tmp_path / "acme.jsonl"), "adapter.rank": 2},
                {"data.train": str(tmp_path / "beta.jsonl"), "adapter.rank": 4},
            ]
        }
    }
    sweep(files, tmp_path / "out", space)
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [one["adapter"] for one in found["trials"]] == ["acme", "beta"]
    assert len(found["groups"]) == 1
    names = sorted(path.name for path in (tmp_path / "out" / "adapters").iterdir())
    assert names == ["acme", "beta"]


def test_a_member_that_diverges_is_reported_and_the_others_go_on(files, tmp_path):
    space = {"space": {"train.learning_rate": [1e30, 1e-3]}}
    sweep(files, tmp_path / "out", space, more=["train.grad_clip=null"])
    trials = json.loads((tmp_path / "out" / "sweep.json").read_text())["trials"]
    assert [one["status"] for one in trials] == ["diverged", "complete"]
    assert "the loss of step" in trials[0]["reason"]


def test_halving_gives_the_places_of_stopped_trials_to_others(files, tmp_path):
    space = {"halving": {"first_step": 2}, "space": {"seed": [0, 1, 2, 3]}}
    sweep(files, tmp_path / "out", space, members=2)
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    statuses = [one["status"] for one in found["trials"]]
    assert statuses.count("stopped") >= 1 and statuses.count("complete") >= 1
    assert {one["steps"] for one in found["trials"] if one["status"] == "stopped"} == {2}
    assert found["groups"][0]["programs"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["adapter.method=full", "export.merged=true"], "trains a copy of the model per member"),
        (["data.streaming=true"], "reads its data at once"),
        (["train.optimizer_memory=host"], "keeps the optimizer on the device"),
        (["adapter.init=pissa", "base_dtype=nf4"], "needs base_dtype=float32"),
        (["adapter.rank=40"], "rank=40 is larger than"),
        (["train.report_to=[tensorboard]"], "writes metrics.jsonl and sweep.json only"),
        (
            ["train.load_best_model_at_end=true", "train.eval_every=1", "train.save_every=1"],
            "exports the adapters of the last step",
        ),
        (
            ["train.early_stopping_patience=1", "train.eval_every=1", "eval.generate=true"]
            + ["train.metric_for_best_model=exact_match", "eval.generate_every=1"],
            "needs generated answers, and a sweep generates none",
        ),
    ],
)
def test_what_a_sweep_does_not_support(files, tmp_path, more, message):
    space = {"space": {"seed": [0, 1]}}
    with pytest.raises(UserError, match=message):
        sweep(files, tmp_path / "out", space, more=more)


def test_a_group_that_does_not_fit(files, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "memory_of", lambda mesh: 1000)
    space = {"space": {"seed": [0, 1]}}
    with pytest.raises(UserError, match="bytes on each device, which has 1,000; lower") as error:
        sweep(files, tmp_path / "out", space)
    assert "2 members of" in str(error.value)
    monkeypatch.setattr(fit, "memory_of", lambda mesh: 10**12)
    sweep(files, tmp_path / "more", space, members=None, more=["train.steps=1"])
    found = json.loads((tmp_path / "more" / "sweep.json").read_text())
    assert found["groups"][0]["members"] == 2


@pytest.mark.slow
def test_numbers_of_an_objective_are_data(files, tmp_path):
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "nein"}
        for row in (*ROWS, *SUMS[:4])
    ]
    rows = write_rows(tmp_path / "pairs.jsonl", pairs)
    more = [f"data.train={rows}", f"data.eval={rows}", "train.objective=dpo"]
    space = {"space": {"objective.beta": [0.1, 0.5]}}
    sweep(files, tmp_path / "out", space, more=more)
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["groups"][0]["programs"] == 1
    for trial in found["trials"]:
        beta = trial["settings"]["objective.beta"]
        config = settings_of(files, tmp_path / str(beta), *more, f"objective.beta={beta}")
        summary = loop.run(config, QUIET)
        assert abs(trial["task_loss"] - summary["task"]["loss_after"]) <= 1e-5
        margin = summary["task"]["margin_after"]
        assert abs(trial["task_margin"] - margin) <= 1e-5 * abs(margin)


def test_rounds_that_are_left_until_all_known_trials_are_done():
    def trial(steps, step=0):
        return SimpleNamespace(member=SimpleNamespace(steps=steps), step=step)

    places = SimpleNamespace(active=[(0, trial(10, 4)), (1, trial(5))])
    waiting = [SimpleNamespace(steps=8), SimpleNamespace(steps=1)]
    assert training._rounds_left(places, []) == 6
    assert training._rounds_left(places, waiting) == 13  # the first takes over after 5 rounds


def test_export_settings_that_a_sweep_leaves_to_the_run_of_best_yaml(files, tmp_path):
    console = Console(record=True, width=200)
    config = settings_of(files, tmp_path / "out", "train.steps=1", "export.merged=true")
    run_sweep(config, parse_space({"space": {"seed": [0, 1]}}), SweepOptions(), console)
    shown = console.export_text()
    assert "export.merged=true is for the run of best.yaml" in shown
    assert "1 adapter in" in shown


def test_another_space_does_not_resume(files, done):
    with pytest.raises(UserError, match="checkpoints of another config or space"):
        sweep(files, done, {"space": {"seed": [0, 1]}}, more=["resume=true"])


def test_the_command(files, tmp_path, capsys):
    space = tmp_path / "space.yaml"
    space.write_text("space: {adapter.rnak: [1]}\n")
    arguments = ["sweep", "--config", str(files / "run.yaml"), "--space", str(space)]
    assert cli.main(arguments) == 2
    assert "Did you mean 'adapter.rank'?" in capsys.readouterr().err
