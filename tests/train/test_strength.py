"""Adapters at another strength: `eval --scale` and `export --scale`."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import formats, lora
from lora_jax.cli import main, train_main
from lora_jax.tree import flatten

from .tiny import write_rows

STEPS = ("train.steps=8", "train.learning_rate=2e-2", "eval.samples=0")
METHODS = {
    "lora": ("adapter.use_rslora=true", "adapter.rank_pattern={q_proj: 2}"),
    "a saved norm": ("adapter.modules_to_save=[norm]", "adapter.target_modules=[v_proj]"),
    "pissa": ("adapter.init=pissa",),
    "tokens": ("adapter.trainable_token_indices=[4,9]",),
}


@pytest.fixture(scope="module")
def data(files, tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    general = write_rows(directory / "general.jsonl", [{"text": "one two three"}, {"text": "four"}])
    return [f"data.eval={files / 'rows.jsonl'}", f"data.regression={general}"]


def train(files, data, output, *settings):
    config = ["--config", str(files / "run.yaml"), f"output_dir={output}", *data]
    assert train_main([*config, *STEPS, *settings]) == 0
    return output


@pytest.fixture(scope="module")
def run(files, data, tmp_path_factory):
    return train(files, data, tmp_path_factory.mktemp("run") / "out", "adapter.rank=4")


def export(run, output, *options):
    return main(["export", "--run", str(run), "--output", str(output), *options])


def changes(files, directory, form):
    """What a PEFT directory or a merged model changes of the base, by weight."""
    base = formats.load(files / "model")
    if form == "hf":
        params = formats.load(directory).params
    else:
        adapters, config = formats.read_adapter(directory, base.params, base)
        params = lora.merge(lora.bind(base.params, adapters, config))
    start = flatten(base.params)
    found = {path: np.asarray(leaf) - start[path] for path, leaf in flatten(params).items()}
    assert max(abs(change).max() for change in found.values()) > 1e-2
    return found


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_an_export_has_so_much_of_the_update(files, data, tmp_path, settings):
    run = train(files, data, tmp_path / "run", *settings)
    for form in ("peft", "hf"):
        for name, scale in (("whole", ()), ("part", ("--scale", "0.4"))):
            assert export(run, tmp_path / form / name, "--format", form, *scale) == 0
        whole, part = (changes(files, tmp_path / form / name, form) for name in ("whole", "part"))
        for path, change in whole.items():
            np.testing.assert_allclose(part[path], 0.4 * change, atol=1e-6, err_msg=str(path))
    card = (tmp_path / "peft" / "part" / "README.md").read_text()
    assert "exact match" not in card  # the scores are those of the whole update


def test_one_table_and_a_picture_of_all_strengths(files, data, run, tmp_path, capsys):
    config = ["eval", "--config", str(files / "run.yaml"), *data]
    adapter = ["--adapter", str(run / "adapter")]
    files_ = ["--output", str(tmp_path / "table.json"), "--plot", str(tmp_path / "plot.svg")]
    answers = ["--predictions", str(tmp_path / "answers.jsonl")]
    scales = ["--scale", "0.5", "1", "1.5", "eval.batch_size=2"]
    assert main([*config, *adapter, *files_, *answers, *scales]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["scale"] for row in rows] == [0, 0.5, 1, 1.5]
    assert "scale" in capsys.readouterr().out
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {line["scale"] for line in lines} == {0, 0.5, 1, 1.5}
    losses = [row["task_loss"] for row in rows]
    assert losses[0] > losses[1] > losses[2]
    assert export(run, tmp_path / "half", "--format", "peft", "--scale", "0.5") == 0
    plain = ["--output", str(tmp_path / "plain.json"), "--adapter", str(tmp_path / "half")]
    plain += ["--adapter", str(run / "adapter")]
    assert main([*config, *plain, "eval.batch_size=2", "eval.before=false"]) == 0
    half, whole = json.loads((tmp_path / "plain.json").read_text())
    for row, other in ((rows[1], half), (rows[2], whole)):
        for name in ("task_loss", "regression_loss"):
            assert row[name] == pytest.approx(other[name], rel=1e-5)


def test_a_scaled_export_for_vllm_and_llama_cpp(run, tmp_path):
    assert export(run, tmp_path / "a", "--format", "peft", "--profile", "vllm", "--scale", "2") == 0
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    plain = load_file(run / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == plain.keys()
    assert export(run, tmp_path / "b", "--format", "gguf", "--scale", "0.5") == 0
    assert (tmp_path / "b" / "adapter.gguf").is_file()


def test_what_has_no_strength(files, data, run, tmp_path, capsys):
    for value in ("0", "nan", "inf"):
        assert export(run, tmp_path / "x", "--format", "peft", "--scale", value) == 2
        assert "finite number other than zero" in capsys.readouterr().err
    kinds = {"use_dora=true": "adapter.use_dora=true", "method=prompt": "adapter.method=prompt"}
    for name, settings in kinds.items():
        other = train(files, data, tmp_path / name, settings)
        assert export(other, tmp_path / "x", "--format", "peft", "--scale", "0.5") == 2
        assert f"needs LoRA, and the adapter has {name}" in capsys.readouterr().err
        assert export(other, tmp_path / name / "same", "--format", "peft", "--scale", "1") == 0
    assert not (tmp_path / "x").exists()
    config = ["eval", "--config", str(files / "run.yaml"), *data]
    adapter = ["--adapter", str(run / "adapter")]
    for options, text in {
        ("--scale", "0.5"): "give at least one with --adapter",
        (*adapter, "--scale", "half"): "--scale needs numbers, not half",
        (*adapter, "--scale", "0"): "other than zero",
        (*adapter, "--plot", "x.pdf"): "must end with .svg or .png",
        (*adapter, "data.regression=null", "--plot", "x.svg"): "--plot needs data.regression",
        (*adapter, "eval.before=false", "--plot", "x.svg"): "which eval.before=false leaves out",
        ("eval.before=false",): "nothing to measure: eval.before=false leaves out the base",
    }.items():
        assert main([*config, *options]) == 2
        assert text in capsys.readouterr().err
