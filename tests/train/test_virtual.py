"""Runs that train virtual tokens: start, errors, files, and what goes on from them."""

import json

import numpy as np
import pytest
import yaml
from rich.console import Console
from safetensors.numpy import load_file

from lora_jax import AdapterConfig, Config, UserError, data, formats
from lora_jax import adapters as methods
from lora_jax.cli import main, train_main
from lora_jax.data.sets import DataSet
from lora_jax.train import setup

from ..families import describe
from .tiny import write_model, write_rows

SETTINGS = {
    "data": {"max_length": 64, "cache": False},
    "train": {"steps": 3, "batch_size": 4, "remat": "none", "learning_rate": 0.05},
    "eval": {"batch_size": 4, "max_new_tokens": 4, "samples": 1},
}
EACH = pytest.mark.parametrize("method", ["prompt", "prefix"])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("virtual")
    model = write_model(directory / "model")
    rows = str(write_rows(directory / "rows.jsonl"))
    settings = SETTINGS | {"model": str(model)}
    settings["data"] = settings["data"] | {"train": rows, "eval": rows}
    (directory / "run.yaml").write_text(yaml.safe_dump(settings))
    return directory / "run.yaml"


def train(config, output, *overrides):
    return train_main(["--config", str(config), f"output_dir={output}", *overrides])


def tensor(directory):
    return load_file(directory / "adapter_model.safetensors")["prompt_embeddings"]


@EACH
def test_a_run_its_files_and_a_run_that_goes_on(config, tmp_path, capsys, method):
    """The number of tokens is that of the text; the loss is that of the exported adapter."""
    text = (f"adapter.method={method}", "adapter.prompt_init=text", "adapter.prompt_text=digits:")
    assert train(config, tmp_path / "a", *text) == 0
    resolved = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert resolved["adapter"]["num_virtual_tokens"] == len("digits:")  # a token per byte
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    width = 32 if method == "prompt" else 2 * 2 * 16
    assert summary["trainable_parameters"] == 7 * width
    assert summary["adapter_bytes"] == 4 * 7 * width
    adapter = tmp_path / "a" / "adapter"
    assert tensor(adapter).shape == (7, width)
    content = json.loads((adapter / "adapter_config.json").read_text())
    assert content["peft_type"] == f"{method.upper()}_TUNING"
    assert "vLLM has no virtual tokens" in capsys.readouterr().err

    output = tmp_path / "table.json"
    command = ["eval", "--config", str(config), "--adapter", str(adapter), "--output", str(output)]
    assert main(command) == 0
    base, own = json.loads(output.read_text())
    assert abs(own["task_loss"] - summary["task"]["loss_after"]) < 1e-5
    assert abs(base["task_loss"] - own["task_loss"]) > 1e-3

    model = resolved["model"]
    prompt = ["--prompt", "one", "--max-new-tokens", "5"]
    capsys.readouterr()
    assert main(["generate", "--model", model, "--adapter", str(adapter), *prompt]) == 0
    live = capsys.readouterr().out
    assert main(["generate", "--model", model, *prompt]) == 0
    assert live != capsys.readouterr().out

    assert train(config, tmp_path / "b", f"adapter.path={adapter}", "train.steps=1") == 0
    first = json.loads((tmp_path / "b" / "summary.json").read_text())["task"]["loss_before"]
    assert abs(first - summary["task"]["loss_after"]) < 1e-5
    moved = np.abs(tensor(tmp_path / "b" / "adapter") - tensor(adapter)).max()
    assert 0 < moved < 0.06


def test_export_of_a_run_writes_the_same_adapter_and_merges_none(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(config, run, "adapter.method=prefix", "adapter.num_virtual_tokens=2") == 0
    command = ["export", "--run", str(run), "--output"]
    assert main([*command, str(tmp_path / "peft"), "--format", "peft"]) == 0
    assert np.array_equal(tensor(tmp_path / "peft"), tensor(run / "adapter"))
    assert main([*command, str(tmp_path / "hf"), "--format", "hf"]) == 2
    assert "cannot be merged into weights; use --format peft" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_virtual_tokens_start_as_the_model_sees_a_text(config, tmp_path):
    options = ("adapter.method=prompt", "adapter.prompt_init=text", "adapter.prompt_text=abc")
    assert train(config, tmp_path / "run", *options, "train.learning_rate=1e-12") == 0
    model = formats.load(config.parent / "model")
    ids = formats.load_tokenizer(config.parent / "model")("abc")["input_ids"]
    table = np.asarray(model.params["model"]["embed_tokens"]["embedding"])
    assert np.allclose(tensor(tmp_path / "run" / "adapter"), table[ids], atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["adapter.method=prefix", "adapter.num_virtual_tokens=256"],
            "adapter.num_virtual_tokens=256 leaves no room for a text: ",
        ),
        (
            ["adapter.method=prompt", "adapter.num_virtual_tokens=63"],
            "leaves no room for a text in data.max_length=64, which counts them",
        ),
        (
            ["adapter.method=prefix", "adapter.prefix_gate=true"],
            "export.peft: prefix_gate=true: PEFT's prefixes have no gate",
        ),
        (
            ["adapter.method=prompt", "export.merged=true"],
            "export.merged=true: adapter.method=prompt trains virtual tokens",
        ),
        (
            ["adapter.method=prompt", "adapter.prompt_init=text"],
            "prompt_text=None: prompt_init=text and prompt_text need each other",
        ),
        (
            ["adapter.method=prefix", "train.attention=splash"],
            "train.attention=splash does not read the keys and values of adapter.method=prefix",
        ),
        (["adapter.method=prompts"], "Did you mean 'prompt'?"),
        (["adapter.method=prompt", "adapter.use_dora=true"], "use_dora=True is for method=lora"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(config, tmp_path, capsys, overrides, message):
    assert train(config, tmp_path / "out", *overrides) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_a_text_needs_a_tokenizer(config, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((config.parent / "model" / name).read_bytes())
    options = ("adapter.method=prefix", "adapter.prompt_init=text", "adapter.prompt_text=a")
    assert train(config, tmp_path / "out", f"model={bare}", *options) == 2
    assert "adapter.prompt_init=text needs a tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "more", "longest"),
    [("prefix", {}, 70), ("prompt", {}, 80), ("prefix", {"prefix_gate": True}, None)],
)
def test_learned_positions_count_them(method, more, longest):
    size = dict(vocab_size=97, n_embd=36, n_layer=3, n_head=6, n_positions=80)
    model = describe("gpt2", **size)
    adapter = AdapterConfig(method=method, num_virtual_tokens=10, **more)
    config = Config(model="tiny", adapter=adapter)
    example = data.Example(np.ones(75, np.int32), np.ones(75, np.float32), "row 3")
    sets = [DataSet([], [example])]
    if longest is None:
        return setup.check_sizes(config, model, sets, Console())
    told = f"row 3: 75 tokens.*positions for 80, 10 of them for virtual.*max_length to {longest} or"
    with pytest.raises(UserError, match=told):
        setup.check_sizes(config, model, sets, Console())


def test_a_gated_prefix_starts_as_the_base(config, tmp_path):
    options = ("adapter.method=prefix", "adapter.prefix_gate=true", "export.peft=false")
    assert train(config, tmp_path / "a", *options, "eval.generate=false") == 0
    assert train(config, tmp_path / "b", "eval.generate=false") == 0  # LoRA: B is zero
    before = [
        json.loads((tmp_path / run / "summary.json").read_text())["task"]["loss_before"]
        for run in "ab"
    ]
    assert before[0] == before[1]
    assert not (tmp_path / "a" / "adapter").exists()
    model = formats.describe(config.parent / "model")
    shapes = methods.shapes(model.params, AdapterConfig(method="prefix", prefix_gate=True))
    assert shapes["prefix_gate"].shape == (2,)
