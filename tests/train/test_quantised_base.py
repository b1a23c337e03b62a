"""A run over weights that are quantised in their files, and its merged export."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import formats
from lora_jax.cli import train_main

from ..packed import pack

SETTINGS = ("train.steps=2", "adapter.rank=2", "export.merged=true", "train.learning_rate=1e-2")


@pytest.mark.parametrize("kind", ["fp8 blocks", "nf4 nested"])
def test_a_run_and_its_merged_model_are_those_of_the_dequantised_base(
    files, tmp_path, capsys, kind
):
    shutil.copytree(files / "model", tmp_path / "plain")
    pack(tmp_path / "plain", tmp_path / "packed", kind)
    written = {}
    for name in ("plain", "packed"):
        given = ("--config", str(files / "run.yaml"), f"model={tmp_path / name}", *SETTINGS)
        assert train_main([*given, f"output_dir={tmp_path / name}-run"]) == 0
        told = " ".join("".join(capsys.readouterr()).split())
        assert told.count("weights are stored in") == (name == "packed")
        merged = tmp_path / f"{name}-run" / "merged"
        written[name] = load_file(merged / "model.safetensors")
        assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    base = load_file(tmp_path / "plain/model.safetensors")
    assert written["plain"].keys() == written["packed"].keys() == base.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(written["plain"][name], base[name])
    for key, value in written["plain"].items():
        assert value.tobytes() == written["packed"][key].tobytes(), key
    assert formats.load(tmp_path / "packed-run/merged").params
