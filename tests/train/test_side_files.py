"""Files that go with every export: tokenizers, named templates, licences, where answers end."""

import ast
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_jax import data
from lora_jax.cli import main, train_main
from lora_jax.errors import UserError
from lora_jax.formats import hub, side_files

from .tiny import CHATML, write_model

TOOLS = "{# tools #}" + CHATML
LEARN = ("train.steps=50", "train.learning_rate=2e-2", "train.save_every=50", "adapter.rank=8")


def tokenizer_files():
    """Every file name of the tokenizers of transformers, from their sources."""
    package = Path(str(importlib.util.find_spec("transformers").submodule_search_locations[0]))
    sources = [*package.glob("tokenization_*.py"), *package.glob("models/*/tokenization_*.py")]
    found = set()
    for source in sources:
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and "VOCAB_FILES_NAMES" in ast.dump(node.targets[0]):
                if isinstance(node.value, ast.Dict):
                    values = [item for item in node.value.values if isinstance(item, ast.Constant)]
                    found |= {item.value for item in values}
    return found


def test_every_file_of_a_tokenizer_is_copied_and_nothing_else(tmp_path):
    names = tokenizer_files()
    assert len(names) > 20 and {"spiece.model", "bpe.codes", "vocab.txt"} <= names
    names |= {"tokenizer.model", "qwen.tiktoken", "tekken.json", "source.spm", "NOTICE.txt"}
    names |= {"added_tokens.json", "special_tokens_map.json", "LICENSE", "USE_POLICY.md"}
    names |= {"chat_template.jinja", "chat_template.json", "additional_chat_templates/rag.jinja"}
    others = {"model.safetensors", "pytorch_model.bin", "README.md", "config.json", "x.gguf"}
    others |= {"generation_config.json", "training_args.bin", "additional_chat_templates/x.txt"}
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    for name in names | others:
        (source / name).write_text(name)
    side_files.copy_side_files(source, target)
    copied = {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()}
    assert copied == names
    assert all((target / name).read_text() == name for name in names)


def test_a_template_of_the_run_takes_the_place_of_all(tmp_path):
    for name in ("chat_template.jinja", "chat_template.json", "additional_chat_templates/a.jinja"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_text("old")
    (tmp_path / "target").mkdir()
    side_files.copy_side_files(tmp_path / "source", tmp_path / "target", "new")
    assert [file.name for file in (tmp_path / "target").iterdir()] == ["chat_template.jinja"]
    assert (tmp_path / "target" / "chat_template.jinja").read_text() == "new"


def test_the_hub_is_asked_for_them(monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.update(options) or "."
    )
    hub.resolve("org/name", weights=False)
    names = {"additional_chat_templates/rag.jinja", "bpe.codes", "q.tiktoken", "LICENSE"}
    names |= {"spiece.model", "config.json", "generation_config.json", "chat_template.jinja"}
    patterns = asked["allow_patterns"]
    found = set(filter_repo_objects([*names, "model.safetensors"], allow_patterns=patterns))
    assert found == names


# Runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model that ends a text with <pad>, and knows nothing of <|im_end|>."""
    directory = write_model(
        tmp_path_factory.mktemp("base") / "model", eos_token_id=0, bos_token_id=None
    )
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<pad>"}))
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    return directory


@pytest.fixture(scope="module")
def run(base, files, tmp_path_factory):
    """A run that learns its rows by heart, with an adapter and a merged model."""
    out = tmp_path_factory.mktemp("run") / "out"
    settings = (f"model={base}", f"output_dir={out}", "export.merged=true", *LEARN)
    assert train_main(["--config", str(files / "run.yaml"), *settings]) == 0
    exported = out.parent / "exported"
    command = ["export", "--run", str(out), "--format", "hf", "--output", str(exported)]
    assert main(command) == 0
    return SimpleNamespace(
        directory=out, adapter=out / "adapter", merged=[out / "merged", exported], base=base
    )


def test_named_templates_go_with_every_export(run):
    for directory in (run.adapter, *run.merged):
        assert AutoTokenizer.from_pretrained(directory).chat_template == {
            "default": CHATML,
            "tool_use": TOOLS,
        }


def test_generate_takes_the_adapter_of_the_run_and_stops(run, capsys):
    command = ["generate", "--model", str(run.base), "--prompt", "three"]
    assert main([*command, "--adapter", str(run.adapter)]) == 0
    assert capsys.readouterr().out == "drei\n"
    assert main(["generate", "--model", str(run.merged[0]), *command[3:]]) == 0
    assert capsys.readouterr().out == "drei\n"


def test_the_merged_model_stops_in_transformers(run):
    prompt = "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    for directory in run.merged:
        assert json.loads((directory / "generation_config.json").read_text()) == {
            "eos_token_id": [0, 2]
        }
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=20, do_sample=False)[0]
        assert tokenizer.decode(out[ids["input_ids"].shape[1] :]) == "drei<|im_end|>"


def test_adapters_name_what_ends_an_answer(run, tmp_path, capsys):
    assert json.loads((run.adapter / "lora_jax.json").read_text())["eos_token_id"] == [0, 2]
    command = ["export", "--run", str(run.directory), "--format", "peft", "--output"]
    for profile in ([], ["--profile", "vllm"]):
        assert main([*command, str(tmp_path / f"adapter{len(profile)}"), *profile]) == 0
        printed = capsys.readouterr().err
        assert "note: answers end with '<|im_end|>' (2), which generation_config.json" in printed
        assert "eos_token_id=[0, 2] to `generate`" in printed and "stop_token_ids=[2]" in printed
    combined = tmp_path / "combined"
    command = ["combine", "--model", str(run.base), "--adapter", str(run.adapter)]
    assert main([*command, "--output", str(combined)]) == 0
    assert json.loads((combined / "lora_jax.json").read_text())["eos_token_id"] == [0, 2]
    assert (combined / "additional_chat_templates" / "tool_use.jinja").read_text() == TOOLS


def test_a_template_of_the_run_leaves_no_stale_ones(base, files, tmp_path):
    """Without one, a row with tools would be rendered by the base's."""
    own = tmp_path / "own.jinja"
    own.write_text("{# mine #}" + CHATML)
    out = tmp_path / "out"
    settings = [f"model={base}", f"output_dir={out}", f"data.chat_template={own}"]
    settings += ["export.merged=true", "train.steps=1"]
    assert train_main(["--config", str(files / "run.yaml"), *settings]) == 0
    for directory in (out / "adapter", out / "merged"):
        assert AutoTokenizer.from_pretrained(directory).chat_template == own.read_text()
    command = ["generate", "--model", str(base), "--prompt", "one", "--max-new-tokens", "1"]
    assert main([*command, "--adapter", str(out / "adapter")]) == 0


# generation_config.json


@pytest.mark.parametrize(
    ("config", "generation", "stops", "written"),
    [
        ({"eos_token_id": 0}, None, {2}, {"eos_token_id": [0, 2]}),
        ({"eos_token_id": 0, "pad_token_id": 1}, None, {0}, None),
        (
            {"eos_token_id": 0, "bos_token_id": 5, "pad_token_id": None},
            None,
            {0, 2},
            {"bos_token_id": 5, "eos_token_id": [0, 2]},
        ),
        ({}, None, {2}, {"eos_token_id": 2}),
        ({}, None, (), None),
        # transformers reads those of the text where the model has none.
        (
            {"eos_token_id": None, "pad_token_id": 1, "text_config": {"eos_token_id": 0}},
            None,
            {0, 2},
            {"eos_token_id": [0, 2], "pad_token_id": 1},
        ),
        # Its own EOS wins over that of config.json; a value that transformers refuses to save.
        (
            {"eos_token_id": 0},
            {"eos_token_id": [9, 7], "do_sample": False, "temperature": 0.6},
            {0, 7},
            {"eos_token_id": [9, 7, 0], "do_sample": False, "temperature": 0.6},
        ),
        ({"eos_token_id": 0}, {"top_k": 3}, {0}, {"top_k": 3, "eos_token_id": 0}),
        ({"eos_token_id": 0}, {"top_k": 3}, (), {"top_k": 3}),
    ],
)
def test_the_generation_config_that_is_written(tmp_path, config, generation, stops, written):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    side_files.write_generation_config(source, target, stops)
    file = target / "generation_config.json"
    assert (json.loads(file.read_text()) if file.is_file() else None) == written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"eos_token_id": 2', "cannot be read: invalid JSON"),
        ("[2]", "it must be a JSON object, not a list"),
        ('{"eos_token_id": "2"}', "eos_token_id='2' must be a token id or a list of them"),
        ('{"eos_token_id": [2, null]}', "eos_token_id=[2, None] must be a token id"),
        ('{"eos_token_id": true}', "eos_token_id=True must be a token id"),
    ],
)
def test_a_damaged_generation_config_is_refused_before_training(
    base, files, tmp_path, capsys, text, expected
):
    model, out = shutil.copytree(base, tmp_path / "model"), tmp_path / "out"
    (model / "generation_config.json").write_text(text)
    command = ["--config", str(files / "run.yaml"), f"model={model}", f"output_dir={out}"]
    assert train_main(command) == 2
    printed = capsys.readouterr().err
    assert "generation_config.json" in printed and expected in printed
    assert "loading" not in printed
    assert not list(out.iterdir())
    with pytest.raises(UserError, match="generation_config"):
        side_files.stop_tokens(model)


def test_plain_text_ends_with_eos_alone(base):
    tokenizer = side_files.load_tokenizer(base)
    assert data.stop_tokens(tokenizer, "none") == {0} and data.stop_tokens(tokenizer) == {0, 2}
