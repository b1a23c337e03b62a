"""Exports for programs that read less than PEFT writes."""

import json

import pytest

from lora_jax.cli import main, train_main

OPTIONS = ("eval.generate=false", "eval.samples=0", "data.packing=false", "train.steps=1")


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("profile") / "out"
    own = ("adapter.target_modules=[q_proj,v_proj]", "adapter.rank_pattern={q_proj: 2}")
    command = ["--config", str(files / "run.yaml"), f"output_dir={output}", *OPTIONS, *own]
    assert train_main(command) == 0
    return output


def export(run, output, *options, status=0):
    command = ["export", "--run", str(run), "--output", str(output), *options]
    assert main(command) == status
    file = output / "adapter_config.json"
    return json.loads(file.read_text()) if file.exists() else None


def test_patterns_are_named_without_the_profile_and_folded_in_with_it(run, tmp_path, capsys):
    plain = export(run, tmp_path / "plain", "--format", "peft")
    patterns, ends = capsys.readouterr().err.split("note: ")[1:]
    assert patterns.startswith("SGLang, and vLLM before 0.32, do not read rank_pattern")
    assert ends.startswith("answers end with ")
    assert plain["rank_pattern"] and plain["r"] > 2
    served = export(run, tmp_path / "served", "--format", "peft", "--profile", "vllm")
    assert capsys.readouterr().err.split("note: ")[1:] == [ends]
    assert (served["rank_pattern"], served["r"]) == ({}, plain["r"])


def test_a_merged_model_takes_no_profile(run, tmp_path, capsys):
    assert export(run, tmp_path / "x", "--format", "hf", "--profile", "vllm", status=2) is None
    assert "--profile vllm is for --format peft" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
