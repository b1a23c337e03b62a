"""A run with VeRA over a 4-bit base: counts, files, the report of a merge, the dry run."""

import json

import numpy as np
import pytest
import yaml

from lora_jax import formats, lora
from lora_jax.cli import train_main

from .tiny import write_model, write_rows

RANK, LAYERS, HIDDEN = 12, 2, 32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The config of a run, and what it wrote."""
    directory = tmp_path_factory.mktemp("vera")
    model = write_model(directory / "model")
    rows = str(write_rows(directory / "rows.jsonl"))
    settings = {
        "model": str(model),
        "base_dtype": "nf4",
        "data": {"max_length": 64, "cache": False, "train": rows, "eval": rows},
        "adapter": {"method": "vera", "rank": RANK, "target_modules": ["o_proj", "down_proj"]},
        "train": {"steps": 3, "batch_size": 4, "remat": "none", "learning_rate": 0.05},
        "eval": {"batch_size": 4, "generate": False},
        "export": {"merged": True, "quantized_base": "dequantized"},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(settings))
    output = directory / "out"
    assert train_main(["--config", str(directory / "run.yaml"), f"output_dir={output}"]) == 0
    return directory / "run.yaml", output


def test_counts_norms_and_loss(run):
    _, output = run
    summary = json.loads((output / "summary.json").read_text())
    assert summary["trainable_parameters"] == LAYERS * 2 * (RANK + HIDDEN)
    assert summary["task"]["loss_after"] < summary["task"]["loss_before"]
    norms = [json.loads(line) for line in (output / "norms.jsonl").read_text().splitlines()]
    assert "lambda_d" in str(norms[-1]) and "lora_a" not in str(norms[-1])


def test_the_adapter_and_the_merged_model_are_the_run(run, error):
    _, output = run
    base = formats.load(run[0].parent / "model", dtype="nf4")
    adapters, config = formats.read_adapter(output / "adapter", base.params)
    assert config.trains_vera and config.rank == RANK
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    live = base.apply(lora.bind(base.params, adapters, config), tokens)
    merged = formats.load(output / "merged")
    assert error(merged.apply(merged.params, tokens), live) <= 1e-5
    assert error(base.apply(base.params, tokens), live) > 1e-3


def test_a_dry_run_lists_the_vectors(run, capsys):
    assert train_main(["--config", str(run[0]), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"{LAYERS * 2 * (RANK + HIDDEN):,} trainable parameters" in text
    assert f"{LAYERS * (RANK + HIDDEN):,}" in text
