"""The recipes for machines that are not here: they are configs, and fit the devices they name."""

from pathlib import Path

import numpy as np
import pytest

from lora_jax import config as configs
from lora_jax import sharding
from lora_jax.cli import train_main

PODS = Path(__file__).parents[2] / "configs/pods"
DEVICES = {"gpus-8b": 8, "slurm-8b": 16, "tpu-8b": 4, "tpu-70b": 16}


def test_every_recipe_is_here():
    assert {file.stem for file in PODS.glob("*.yaml")} == set(DEVICES)


@pytest.mark.parametrize("name", DEVICES)
def test_meshes_and_batches_fit(name):
    config = configs.load(PODS / f"{name}.yaml")
    mesh = sharding.make_mesh(config.mesh, list(np.arange(DEVICES[name])))
    sharding.check_batch(config.train.batch_size, mesh, "train.batch_size")
    sharding.check_batch(config.eval.batch_size, mesh, "eval.batch_size")
    assert mesh.size == DEVICES[name] and config.resume == "auto"
    assert config.output_dir == f"runs/{name}"


def test_slurm_script_runs_the_recipe():
    text = (PODS / "slurm.sh").read_text()
    assert "python train.py --config configs/pods/slurm-8b.yaml" in text
    assert "--nodes=2" in text and "--ntasks-per-node=8" in text


def test_without_the_hub_a_recipe_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ["mesh.fsdp=1", f"output_dir={tmp_path / 'out'}"]
    assert train_main(["--config", str(PODS / "gpus-8b.yaml"), *options]) == 2
    error = capsys.readouterr().err
    assert "model='meta-llama/Llama-3.1-8B' is not a local directory and could not be" in error
    assert "log in with `hf auth login`" in error
