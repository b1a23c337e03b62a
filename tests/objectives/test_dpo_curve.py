"""A run of DPO over an adapter, beside TRL's trainer over the same adapter in PEFT: the benchmark
of the two, at tiny size.
"""

import json
import runpy
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from peft.utils import load_peft_weights

from lora_jax.cli import train_main
from lora_jax.report.journal import read_lines

from ..train.tiny import distance, write_model, write_rows

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "preferences.py"
STEPS = 5
PAIRS = [
    {
        "prompt": f"what is {i} plus {i % 7}",
        "chosen": str(i + i % 7) * (1 + i % 4),
        "rejected": "no idea " + "x" * (i % 9),
    }
    for i in range(23)
]


@pytest.mark.parametrize(("seed", "objective"), [(0, {"beta": 0.3}), (1, {"sft_weight": 0.2})])
def test_five_steps_of_dpo_are_those_of_trl(tmp_path, capsys, monkeypatch, seed, objective):
    """Losses and adapters, with more pairs in some steps than in others."""
    model = write_model(tmp_path / "model", seed=seed, tie_word_embeddings=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(seed)
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    train = {"objective": "dpo", "steps": STEPS, "batch_size": 2, "learning_rate": 1e-3}
    content = {
        "model": str(model),
        "seed": seed,
        "output_dir": str(tmp_path / "run"),
        "adapter": {"path": str(tmp_path / "adapter")},
        "data": {"train": str(write_rows(tmp_path / "pairs.jsonl", PAIRS)), "max_length": 160},
        "objective": objective,
        "train": {**train, "schedule": "linear", "warmup_steps": 2, "weight_decay": 0.01},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    assert train_main(["--config", str(tmp_path / "run.yaml")]) == 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    sft = objective.get("sft_weight", 0)
    ours = [line["loss"] + sft * line.get("sft_loss", 0) for line in lines]

    trainers = []
    names = runpy.run_path(str(BENCHMARK))
    kept = names["open_trainer"]
    names["main"].__globals__["open_trainer"] = lambda *x: trainers.append(kept(*x)) or trainers[0]
    output = ["--output", str(tmp_path / "trl")]
    command = [str(BENCHMARK), "--config", str(tmp_path / "run.yaml"), *output]
    monkeypatch.setattr(sys, "argv", command)
    names["main"]()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    (trainer,) = trainers
    assert said["steps"] == STEPS and said["pairs"] == sum(map(len, trainer.steps))
    assert len({*map(len, trainer.steps)}) > 1
    assert ours == pytest.approx(trainer.losses, abs=1e-5)
    assert trainer.losses[-1] < trainer.losses[0] - 0.01
    found, expected, start = (
        {name: x.numpy() for name, x in load_peft_weights(str(tmp_path / where)).items()}
        for where in ("run/adapter", "trl", "adapter")
    )
    assert found.keys() == expected.keys()
    assert distance(found, expected) <= 1e-5 < distance(start, expected)
