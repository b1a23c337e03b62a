"""`lora-jax export --format gguf`: adapters and merged models of runs, and refusals."""

import json

import gguf
import jax
import numpy as np
import pytest

from lora_jax import formats
from lora_jax.cli import main, train_main
from lora_jax.formats.gguf import convert
from lora_jax.tree import flatten

from ..formats.gguf_models import with_merge
from .tiny import CHATML, write_model

OPTIONS = ("eval.generate=false", "eval.samples=0", "data.packing=false", "train.steps=1")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = write_model(tmp_path_factory.mktemp("base") / "model")
    with_merge(directory)
    return directory


def train(files, base, output, *options):
    own = (f"model={base}", f"output_dir={output}", *OPTIONS, *options)
    assert train_main(["--config", str(files / "run.yaml"), *own]) == 0
    return output


@pytest.fixture(scope="module")
def run(files, base, tmp_path_factory):
    output = tmp_path_factory.mktemp("gguf") / "out"
    adapter = ("adapter.target_modules=[q_proj,v_proj]", "adapter.rank_pattern={q_proj: 2}")
    prompt = "data.system_prompt=Translate."
    return train(files, base, output, *adapter, prompt, "train.learning_rate=0.1")


def export(run, output, *options, status=0):
    command = ["export", "--run", str(run), "--output", str(output), "--format", "gguf", *options]
    assert main(command) == status
    return output


def test_an_adapter(run, base, tmp_path, capsys):
    first, second = (export(run, tmp_path / name) for name in "ab")
    assert f"written to {first}" in capsys.readouterr().out
    assert sorted(file.name for file in first.iterdir()) == ["Modelfile", "adapter.gguf"]
    assert (first / "adapter.gguf").read_bytes() == (second / "adapter.gguf").read_bytes()
    reader = gguf.GGUFReader(first / "adapter.gguf")
    shapes = {tensor.name: tuple(tensor.data.shape) for tensor in reader.tensors}
    assert shapes["blk.1.attn_q.weight.lora_a"] == (2, 32)
    assert shapes["blk.0.attn_v.weight.lora_b"] == (16, 4) and len(shapes) == 8
    assert any(tensor.data.any() for tensor in reader.tensors if tensor.name.endswith("lora_b"))
    name = reader.fields["general.base_model.0.name"].contents()
    assert name == base.name  # and no path of this machine
    text = (first / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"\nSYSTEM "Translate."\n' in text
    assert str(base.parent) not in text


def test_a_merged_model_is_that_of_the_other_format(run, tmp_path):
    hf = tmp_path / "hf"
    command = ["export", "--run", str(run), "--output", str(hf), "--format", "hf"]
    assert main(command) == 0
    merged = export(run, tmp_path / "gguf", "--merged")
    names = {"Modelfile", "model.gguf", "merge_report.json", "merge_report.png"}
    assert {file.name for file in merged.iterdir()} == names
    assert json.loads((merged / "merge_report.json").read_text()) == json.loads(
        (hf / "merge_report.json").read_text()
    )
    found = formats.load(convert(merged / "model.gguf", tmp_path / "back"))
    jax.tree.map(np.testing.assert_array_equal, found.params, formats.load(hf).params)
    fields = gguf.GGUFReader(merged / "model.gguf").fields
    assert "im_start" in fields["tokenizer.chat_template"].contents()


def test_the_dtype_of_a_merged_model(run, tmp_path):
    merged = export(run, tmp_path / "m", "--merged", "export.dtype=bfloat16")
    kinds = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(merged / "model.gguf").tensors
    }
    assert kinds["blk.0.ffn_up.weight"] == "BF16" and kinds["blk.0.ffn_norm.weight"] == "F32"


def test_a_template_of_the_run(files, base, tmp_path, capsys):
    (tmp_path / "own.jinja").write_text(CHATML + "{# own #}")
    run = train(files, base, tmp_path / "run", f"data.chat_template={tmp_path / 'own.jinja'}")
    adapter = export(run, tmp_path / "a")
    assert "--chat-template-file" in capsys.readouterr().err
    template = (adapter / "chat_template.jinja").read_text()
    assert template.endswith("{# own #}")
    merged = export(run, tmp_path / "m", "--merged")
    fields = gguf.GGUFReader(merged / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == template


def test_what_an_adapter_cannot_hold_a_merge_can(files, base, tmp_path, capsys):
    run = train(files, base, tmp_path / "run", "adapter.use_dora=true")
    export(run, tmp_path / "a", status=2)
    error = capsys.readouterr().err
    assert "cannot hold use_dora=True; export a GGUF model with --merged" in error
    assert not (tmp_path / "a").exists()
    merged = export(run, tmp_path / "m", "--merged")
    assert flatten(formats.load(convert(merged / "model.gguf", tmp_path / "back")).params)


def test_whole_models_and_virtual_tokens(files, base, tmp_path, capsys):
    full = train(files, base, tmp_path / "full", "adapter.method=full", "export.merged=true")
    export(full, tmp_path / "a", status=2)
    assert "it has no adapter; use --format gguf --merged" in capsys.readouterr().err
    export(full, tmp_path / "m", "--merged")
    prompt = train(files, base, tmp_path / "prompt", "adapter.method=prompt")
    capsys.readouterr()
    export(prompt, tmp_path / "p", status=2)
    assert "no virtual tokens (method=prompt); use --format peft" in capsys.readouterr().err
    export(prompt, tmp_path / "p", "--merged", status=2)
    assert "trained virtual tokens (method=prompt)" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_options_that_do_not_fit(run, files, tmp_path, capsys):
    export(run, tmp_path / "x", "--profile", "vllm", status=2)
    assert "--profile vllm is for --format peft" in capsys.readouterr().err
    command = ["export", "--run", str(run), "--output", str(tmp_path / "x")]
    assert main([*command, "--format", "peft", "--merged"]) == 2
    assert "--merged is for --format gguf" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_that_no_gguf_file_has(files, tmp_path, capsys):
    run = train(files, files / "model", tmp_path / "run")
    export(run, tmp_path / "a")  # the adapter needs none
    capsys.readouterr()
    export(run, tmp_path / "m", "--merged", status=2)
    assert "its pre-tokenizer is none of" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
