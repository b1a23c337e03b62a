"""Runs that end before their last step, and which of their adapters are exported."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.cli import main, train_main
from lora_jax.report.journal import read_lines
from lora_jax.train import checkpoint

from .tiny import ROWS, write_rows

OPTIONS = ("eval.generate=false", "eval.samples=0", "data.packing=false")


def train(files, output, *overrides, status=0):
    command = ["--config", str(files / "run.yaml"), f"output_dir={output}", *OPTIONS, *overrides]
    assert train_main(command) == status
    return output


def adapter(directory):
    return load_file(directory / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def stopped(files, tmp_path_factory):
    """Trained on answers that are not those of the held-out rows: their loss falls while the form
    is learnt, and rises when the answers are.
    """
    directory = tmp_path_factory.mktemp("stopped")
    turned = [row["completion"] for row in reversed(ROWS)]
    other = [row | {"completion": text} for row, text in zip(ROWS, turned, strict=True)]
    return train(
        files,
        directory / "out",
        f"data.eval={write_rows(directory / 'eval.jsonl', other)}",
        *("train.steps=200", "train.eval_every=4", "train.early_stopping_patience=3"),
        *("train.learning_rate=2e-2", "train.load_best_model_at_end=true"),
        *("train.save_every=1000", "train.save_total_limit=1"),
    )


def test_it_stops_when_evaluations_bring_nothing_better(stopped):
    lines = read_lines(stopped / "metrics.jsonl")
    losses = {line["step"]: line["task_loss"] for line in lines if "task_loss" in line}
    best, last = min(losses, key=losses.__getitem__), lines[-1]["step"]
    assert 4 < best < last < 200, "the data do not show what they should"
    assert last == best + 3 * 4 == max(losses)
    summary = json.loads((stopped / "summary.json").read_text())
    assert (summary["steps"], summary["exported_step"]) == (last, best)
    assert summary["task"]["loss_after"] == losses[best] < losses[last]


def test_the_best_adapters_are_exported_though_later_ones_are_kept(stopped, files, tmp_path):
    place = stopped / "checkpoints"
    best = json.loads((stopped / "summary.json").read_text())["exported_step"]
    steps = checkpoint.list_steps(place)
    assert steps == [best, best + 12]  # the best beside the latest one
    found = {}
    for step in steps:
        record = checkpoint.read_record(place, step)
        run = tmp_path / str(step)
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / str(step)).symlink_to(place / str(step))
        text = (stopped / "config.yaml").read_text()
        assert "load_best_model_at_end: true" in text
        text = text.replace("load_best_model_at_end: true", "load_best_model_at_end: false")
        (run / "config.yaml").write_text(text)
        assert record["step"] == step and record["watch"]["best_step"] == best
        target = ["--format", "peft", "--output", str(run / "exported")]
        assert main(["export", "--run", str(run), *target]) == 0
        found[step] = adapter(run / "exported")
    exported = adapter(stopped / "adapter")
    for name, tensor in exported.items():
        assert np.array_equal(tensor, found[best][name])
    assert any(not np.array_equal(x, found[steps[1]][name]) for name, x in exported.items())
    # The export by hand takes the best one too.
    target = ["--format", "peft", "--output", str(tmp_path / "again")]
    assert main(["export", "--run", str(stopped), *target]) == 0
    again = adapter(tmp_path / "again")
    assert all(np.array_equal(again[name], tensor) for name, tensor in exported.items())


def test_a_run_that_stopped_early_is_finished(stopped, files, capsys):
    before = (stopped / "metrics.jsonl").read_bytes()
    data = f"data.eval={stopped.parent / 'eval.jsonl'}"
    command = ["--config", str(stopped / "config.yaml"), f"output_dir={stopped}", data]
    capsys.readouterr()
    assert train_main([*command, "resume=true"]) == 0
    assert "is finished" in capsys.readouterr().err
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(files, tmp_path, capsys):
    """Two good steps; the third, which wrecks the adapters, is saved before anything shows it."""
    options = ("train.save_every=1", "train.schedule=constant")
    output = train(files, tmp_path / "out", *options, "train.steps=2")
    good = checkpoint.read_record(output / "checkpoints", 2)["leaves"]
    wreck = ("train.steps=6", "train.learning_rate=1e38", "resume=true")
    allowed = "allow_change=[train.steps,train.learning_rate]"
    capsys.readouterr()
    train(files, output, *options, *wreck, allowed, status=2)
    message = capsys.readouterr().err
    assert "error: the loss of step 4 is " in message and "Traceback" not in message
    assert "Lower train.learning_rate, or check the data of step 4" in message
    assert "The last good state is the checkpoint of step 2 (kept: [2])" in message
    assert checkpoint.list_steps(output / "checkpoints") == [2]
    assert checkpoint.read_record(output / "checkpoints", 2)["leaves"] == good
    assert [line["step"] for line in read_lines(output / "metrics.jsonl")] == [1, 2, 3]


def test_a_run_that_diverges_is_stopped(files, tmp_path, capsys):
    """Forty steps on one row, then steps on rows that were never seen."""
    rng = np.random.default_rng(0)
    hard = ["".join(map(chr, rng.integers(65, 91, 30))) for _ in range(100)]
    rows = [ROWS[0]] * 160 + [{"prompt": text, "completion": text[::-1]} for text in hard]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    capsys.readouterr()
    output = train(
        files,
        tmp_path / "out",
        *(f"data.train={source}", "data.shuffle=false", "train.steps=65", "train.save_every=40"),
        *("train.learning_rate=2e-2", "train.divergence=2"),
        status=2,
    )
    message = capsys.readouterr().err
    losses = [line["loss"] for line in read_lines(output / "metrics.jsonl")]
    told = re.search(
        r"error: the run diverges: steps (\d+)-(\d+) have a mean loss of ([\d.]+), steps "
        r"(\d+)-(\d+) had ([\d.]+)\. .*train\.divergence \(2; null: never stop\)",
        message,
    )
    assert told, message
    first, last, mean, low, high, lowest = map(float, told.groups())
    assert (first, low) == (last - 19, high - 19) and high == 40 < last <= 60
    assert abs(lowest - np.mean(losses[20:40])) < 1e-3 * lowest
    assert mean > max(2 * lowest, lowest + 1) and len(losses) == last - 1
    assert "The last good state is the checkpoint of step 40 (kept: [40])" in message
