"""Warnings come from one place, and are given by a run, an inspection and a dry run alike."""

import json

import pytest

from lora_jax.cli import main, train_main
from lora_jax.train import warn

from .tiny import make_config

WARM = "train.warmup_steps=8 is not below train.steps=2: the learning rate only rises, to 0.00025"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.warmup_steps=9"], []),
        (["train.warmup_steps=10"], ["train.warmup_steps=10 is not below train.steps=10"]),
        (["data.eval=e", "train.eval_every=10", "train.save_every=10", "train.log_every=10"], []),
        (["data.eval=e", "train.eval_every=11"], ["train.eval_every=11 is above train.steps=10"]),
        (["train.save_every=11"], ["train.save_every=11 is above train.steps=10"]),
        (["train.log_every=11"], ["train.log_every=11 is above train.steps=10"]),
        (["train.final_rate=0.1"], []),
        (["train.final_rate=0.1", "train.schedule=constant"], ["train.final_rate=0.1 has no eff"]),
        (["data.eval=e", "train.eval_every=3", "train.early_stopping_patience=2"], []),
        (
            ["data.eval=e", "train.eval_every=3", "train.early_stopping_patience=3"],
            ["train.early_stopping_patience=3 has no effect: 10 steps have 3 evaluations"],
        ),
    ],
)
def test_settings(overrides, expected):
    found = list(warn.of_config(make_config("train.steps=10", *overrides)))
    assert len(found) == len(expected)
    assert all(text in warning for text, warning in zip(expected, found, strict=True))


def test_a_run_gives_the_warnings_of_inspect(files, tmp_path, capsys):
    settings = ["--config", str(files / "run.yaml"), "train.warmup_steps=8", "data.max_length=28"]
    assert main(["inspect", *settings]) == 0
    inspected = [
        line.removeprefix("warning: ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("warning: ")
    ]
    assert train_main([*settings, f"output_dir={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().err
    warnings = json.loads((tmp_path / "out" / "summary.json").read_text())["warnings"]
    assert warnings == inspected
    for text in (WARM, "neither data.eval nor", "data.regression is not set", "no stop token"):
        assert any(text in warning for warning in warnings), text
    assert printed.index(f"warning: {WARM}") < printed.index("loading ")
    assert train_main([*settings, "--dry-run"]) == 0
    assert f"warning: {WARM}" in capsys.readouterr().out
