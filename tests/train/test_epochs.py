"""`train.epochs` in place of `train.steps`: settled once, stored, and the same on a resume."""

import json
import math

import pytest

from lora_jax import config as configs
from lora_jax.cli import main, train_main
from lora_jax.data.datasets import TrainData
from lora_jax.errors import UserError
from lora_jax.train import checkpoint, epochs

from .tiny import make_config

STEPS_UNSET = "train.steps=null"  # the file has steps


@pytest.mark.parametrize(
    ("share", "batch", "expected"), [(1, 4, 1), (0.5, 1, 2), (3, 4, 3), (0.1, 1, 1), (1.3, 2, 3)]
)
def test_steps(monkeypatch, share, batch, expected):
    """Four rows an epoch."""
    monkeypatch.setattr(epochs, "rows_of_epoch", lambda *_: 4)
    monkeypatch.setattr(epochs.sets, "make_loader", lambda *_: None)
    config = make_config(f"train.epochs={share}", f"train.batch_size={batch}")
    assert config.train.steps is None
    settled = epochs.settle(config, TrainData({}, {}), None)
    assert settled.train.steps == expected == math.ceil(share * 4 / batch)
    assert settled.train.epochs == share
    assert configs.parse({"model": "m"}).train.steps == 100


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.epochs=0"], "train.epochs=0.0 must be above 0"),
        (["train.epochs=-1"], "train.epochs=-1.0 must be above 0"),
        (["train.epochs=inf"], "inf is not a finite number"),
        (["train.epochs=1e9"], "train.epochs=1e+09 must be at most 1000000"),
        (["train.epochs=1", "train.steps=5"], "set one of them"),
        (["train.epochs=1", "data.train=a", "data.streaming=true"], "needs the number of rows"),
    ],
)
def test_mistakes(overrides, expected):
    with pytest.raises(UserError) as raised:
        make_config(*overrides)
    assert expected in str(raised.value)


def test_both_of_a_config_made_in_python():
    config = configs.Config(model="m", train=configs.TrainConfig(steps=5, epochs=1.0))
    with pytest.raises(UserError, match="train.steps=5 and train.epochs=1 are both set"):
        epochs.settle(config, None, None)


def test_a_run_and_its_resume(files, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["--config", str(files / "run.yaml"), f"output_dir={output}", STEPS_UNSET]
    command += ["data.packing=false", "train.batch_size=2", "eval.generate=false"]
    assert train_main([*command, "train.epochs=0.75", "train.save_every=1"]) == 0
    said = capsys.readouterr().err
    rows = files / "rows.jsonl"
    assert "2 steps of 2 rows x 64 tokens" in said
    assert f"1.00 epochs of {rows} (4 rows)" in said
    assert json.loads((output / "summary.json").read_text())["steps"] == 2
    stored = configs.load(output / "config.yaml")
    assert (stored.train.steps, stored.train.epochs) == (None, 0.75)
    record = checkpoint.read_record(output / "checkpoints")
    assert record["config"]["train"]["steps"] == 2
    # The same again is finished; other epochs are another setting.
    assert train_main([*command, "train.epochs=0.75", "resume=true"]) == 0
    assert "is finished: 2 steps" in capsys.readouterr().err
    assert train_main([*command, "train.epochs=1.5", "resume=true"]) == 2
    assert "train.epochs=1.5, and the checkpoint was made with 0.75" in capsys.readouterr().err
    allowed = [*command, "train.epochs=1.5", "resume=true", "allow_change=[train.epochs]"]
    assert train_main(allowed) == 2
    assert "train.epochs=1.5 are 3 steps of these data, and the" in capsys.readouterr().err
    assert train_main([*allowed, "allow_change=[train.epochs, train.steps]"]) == 0
    assert json.loads((output / "summary.json").read_text())["steps"] == 3


def test_inspect_shows_them(files, capsys):
    command = ["inspect", "--config", str(files / "run.yaml"), STEPS_UNSET, "data.packing=false"]
    assert main([*command, "train.epochs=2.5", "train.batch_size=1"]) == 0
    out = capsys.readouterr().out
    assert "10 steps of 1 row\n" in out and "2.50 epochs" in out


def test_sources_of_several_files(files, tmp_path, capsys):
    second = tmp_path / "more.jsonl"
    second.write_text((files / "rows.jsonl").read_text() * 2)
    sources = f"data.train={{{files / 'rows.jsonl'}: 1, {second}: 3}}"
    command = ["inspect", "--config", str(files / "run.yaml"), STEPS_UNSET, "data.packing=false"]
    assert main([*command, sources, "train.epochs=1", "train.batch_size=1"]) == 0
    out = capsys.readouterr().out
    assert "12 steps of 1 row\n" in out
    assert "0.75 epochs" in out and "1.12 epochs" in out
