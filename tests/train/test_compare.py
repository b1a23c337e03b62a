"""`lora-jax eval`: one table of a base and its adapters, with the numbers their runs reported."""

import json

import pytest

from lora_jax.cli import main, train_main

from .tiny import write_model, write_rows

TRAIN = ("train.steps=12", "eval.samples=0")


@pytest.fixture(scope="module")
def data(files, tmp_path_factory):
    """Held-out rows and general text, as overrides."""
    directory = tmp_path_factory.mktemp("data")
    general = write_rows(directory / "general.jsonl", [{"text": "one two three"}, {"text": "four"}])
    return [f"data.eval={files / 'rows.jsonl'}", f"data.regression={general}"]


@pytest.fixture(scope="module")
def runs(files, data, tmp_path_factory):
    """Adapters of rank 4 and 8 and different scale: their run directories and summaries."""
    directory, found = tmp_path_factory.mktemp("compare"), {}
    for name, settings in {
        "small": ("adapter.rank=4", "train.learning_rate=2e-2"),
        "large": ("adapter.rank=8", "adapter.use_rslora=true", "train.learning_rate=3e-3"),
    }.items():
        output = f"output_dir={directory / name}"
        command = ["--config", str(files / "run.yaml"), output, *data, *TRAIN, *settings]
        assert train_main(command) == 0
        found[directory / name] = json.loads((directory / name / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def table(files, data, runs, tmp_path_factory):
    """The rows of the JSON output, for both adapters."""
    file = tmp_path_factory.mktemp("table") / "table.json"
    options = [word for run in runs for word in ("--adapter", str(run / "adapter"))]
    config = ["--config", str(files / "run.yaml"), *data]
    assert main(["eval", *config, *options, "--output", str(file)]) == 0
    return json.loads(file.read_text())


def test_the_first_row_is_the_base(table, runs):
    base = table[0]
    assert base["adapter"] == "base"
    for summary in runs.values():  # before training, adapters change nothing
        assert base["task_loss"] == pytest.approx(summary["task"]["loss_before"], rel=1e-6)
        assert base["regression_loss"] == pytest.approx(
            summary["regression"]["loss_before"], rel=1e-6
        )
        assert base["exact_match"] == summary["task"]["exact_match_before"]


def test_an_adapter_has_the_numbers_of_its_run(table, runs):
    assert [row["adapter"] for row in table[1:]] == [str(run / "adapter") for run in runs]
    for row, summary in zip(table[1:], runs.values(), strict=True):
        assert set(row) == {"adapter", "task_loss", "regression_loss", "exact_match"}
        assert row["task_loss"] == pytest.approx(summary["task"]["loss_after"], rel=1e-5)
        assert row["regression_loss"] == pytest.approx(
            summary["regression"]["loss_after"], rel=1e-5
        )
        assert row["exact_match"] == summary["task"]["exact_match_after"]
    base, small, large = (row["task_loss"] for row in table)
    assert small < 0.8 * large < large < 0.8 * base  # none is taken for another


def test_an_adapter_of_another_base_is_refused_unless_allowed(files, runs, tmp_path, capsys):
    other = write_model(tmp_path / "other", seed=9)
    adapter = str(next(iter(runs)) / "adapter")
    settings = [f"model={other}", f"data.eval={files / 'rows.jsonl'}", "eval.generate=false"]
    command = ["eval", "--config", str(files / "run.yaml"), *settings, "--adapter", adapter]
    capsys.readouterr()
    assert main(command) == 2
    message = capsys.readouterr().err
    assert f"error: base: the base model's weights are not those that {adapter} was" in message
    assert "list 'base' in allow_change" in message and "loading" not in message
    assert main([*command, "--allow-change", "base"]) == 0
    printed = capsys.readouterr().out
    assert "task loss" in printed and "base" in printed and "exact match" not in printed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["data.eval=null"], "nothing to measure on: set data.eval, data.regression or both"),
        (
            ["--adapter", "no/such", "--adapter", "nor/this"],
            "adapter 'no/such' does not exist, or is no directory; give a PEFT adapter directory\n"
            "adapter 'nor/this' does not exist",
        ),
        (["eval.metrics=[blue]"], "blue"),
        (["eval.batch_size=3", "mesh.data=2"], "mesh"),
    ],
)
def test_mistakes_are_told_before_the_model_is_read(files, capsys, options, told):
    capsys.readouterr()
    command = ["eval", "--config", str(files / "run.yaml"), f"data.eval={files / 'rows.jsonl'}"]
    assert main([*command, *options]) == 2
    message = capsys.readouterr().err
    assert told in message and "loading" not in message


def test_an_adapter_directory_named_base_does_not_stand_for_the_base(
    files, data, runs, tmp_path, monkeypatch, capsys
):
    run, summary = next(iter(runs.items()))
    (tmp_path / "base").symlink_to(run / "adapter")
    monkeypatch.chdir(tmp_path)
    settings = [data[0], "eval.generate=false", "--adapter", "base", "--output", "table.json"]
    assert main(["eval", "--config", str(files / "run.yaml"), *settings]) == 0
    losses = [row["task_loss"] for row in json.loads((tmp_path / "table.json").read_text())]
    expected = [summary["task"]["loss_before"], summary["task"]["loss_after"]]
    assert losses == pytest.approx(expected, rel=1e-5)
