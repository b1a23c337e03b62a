"""Every mistake of a user is one screen of text and status 2, and leaves output_dir as it was."""

import argparse
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import cli
from lora_jax.cli import COMMANDS, main, train_main

from .train.conftest import files as files
from .train.tiny import write_rows, write_tokenizer


@pytest.fixture
def refused(capsys):
    """Run a command that must fail; returns its message."""

    def run(function, *arguments):
        capsys.readouterr()
        status = function([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        message = printed.err[printed.err.index("error: ") :]
        assert status == 2
        assert "Traceback" not in printed.err and printed.out == ""
        assert len(message.splitlines()) <= 20 and max(map(len, message.splitlines())) < 600
        return message

    return run


@pytest.fixture
def train_refused(refused, files, tmp_path):
    """A training that must fail under the overrides given, and leave output_dir free."""

    def run(*overrides, output=tmp_path / "out"):
        settings = (f"output_dir={output}", *overrides)
        message = refused(train_main, "--config", files / "run.yaml", *settings)
        assert not output.is_dir() or not any(output.iterdir())
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        return message

    return run


@pytest.fixture
def model(files, tmp_path):
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(files / "model", tmp_path / "model")


def edit(file, drop=(), **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}))


# Settings

SETTINGS = [
    (["trian.steps=1"], ["unknown key 'trian'", "Did you mean 'train'?"]),
    (["train.learning_rat=1"], ["'train.learning_rat'", "Did you mean 'learning_rate'?"]),
    (["train.steps"], ["key.sub=value"]),
    (["train.steps=many"], ["train.steps", "many"]),
    (["model=no/such/model"], ["model='no/such/model' does not exist"]),
    (["data.train=null"], ["data.train is not set"]),
    (["data.train=missing.jsonl"], ["data file missing.jsonl does not exist"]),
    (["adapter.target_modules=[qproj]"], ["['qproj'] matches no weight", "Did you mean 'q_proj'?"]),
    (["adapter.target_modules=[q_proj, vproj]"], ["['vproj']", "Did you mean 'v_proj'?"]),
    (["adapter.target_modules=(unclosed"], ["not a valid regex"]),
    (["adapter.layers_to_transform=[7]"], ["[7] does not exist", "layers 0 to 1"]),
    (["adapter.rank=33"], ["rank=33 is larger than"]),
    (["adapter.rank_pattern={qproj: 2}"], ["rank_pattern['qproj']", "Did you mean 'q_proj'?"]),
    (["adapter.path=missing"], ["missing", "adapter"]),
    (["mesh.data=3"], ["does not fit 1 device;"]),
    (["export.max_shard_size=big"], ["size 'big' is not a positive size"]),
    (["data.max_length=4"], ["no example is left", "data.max_length=4"]),
    (
        ["data.too_long=error", "data.max_length=20"],
        ["rows.jsonl:", "data.max_length=20"],
    ),
    (["data.chat_template=missing.jinja"], ["'missing.jinja' cannot be read"]),
]


@pytest.mark.parametrize(("overrides", "expected"), SETTINGS, ids=lambda value: str(value[0])[:40])
def test_settings(train_refused, overrides, expected):
    message = train_refused(*overrides)
    assert all(text in message for text in expected), message


def test_verbose_shows_the_traceback(files, capsys):
    assert train_main(["--config", str(files / "run.yaml"), "train.steps=0", "--verbose"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "train.steps=0 must be at least 1" in printed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {learning_rat: 1}", "Did you mean 'learning_rate'?"),
        ("- a list", "must be a mapping"),
        ("a: [1", "is not valid YAML"),
    ],
)
def test_config_files(refused, tmp_path, text, expected):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert expected in refused(train_main, "--config", file)
    assert "does not exist" in refused(train_main, "--config", tmp_path / "missing.yaml")


@pytest.mark.parametrize("arguments", [["train"], ["nothing"], [], ["export", "--run", "x"]])
def test_usage_errors_have_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2 and "usage: " in capsys.readouterr().err


# Data

ROWS = [
    ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', "bad.jsonl:2: invalid JSON"),
    ('{"prompt": "a", "completion": 3}\n', "bad.jsonl:1: 'completion' is a number, not a string"),
    ('{"question": "a"}\n', "bad.jsonl:1: a row needs 'messages', 'conversations', "),
    ("[1]\n", "bad.jsonl:1: a row must be an object"),
    ('{"messages": [{"role": "user", "content": "a"}]}\n', "bad.jsonl:1: no assistant turn"),
    (
        '{"messages": [{"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b", "train": false}]}\n',
        "bad.jsonl:1: every assistant turn has 'train': false",
    ),
    ("", "the file holds no rows"),
]


@pytest.mark.parametrize("field", ["train", "eval"])
@pytest.mark.parametrize(("text", "expected"), ROWS)
def test_rows(train_refused, tmp_path, text, expected, field):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    assert expected in train_refused(f"data.{field}={file}")


# The model's files


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model_type": "gpt_neox"},
            "model_type='gpt_neox' is not supported; these are: arcee, bert, camembert",
        ),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"logit_scale": 2.0}, "logit_scale=2.0 is not understood"),
        ({"vocab_size": "many"}, "vocab_size='many' is not an integer"),
        ({"vocab_size": None}, "vocab_size=None is not an integer"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type='spiral' is not supported"),
        ({"num_hidden_layers": 3}, "missing model.layers.2."),
        ({"num_hidden_layers": 1}, "unexpected model.layers.1."),
        ({"intermediate_size": 64}, "has shape (48, 32), config.json asks for (64, 32)"),
        ({"vocab_size": 200}, "200"),
    ],
)
def test_model_configs(train_refused, model, changes, expected):
    edit(model / "config.json", **changes)
    assert expected in train_refused(f"model={model}")


def test_what_is_read_in_another_way_is_noted(files, model, tmp_path, capsys):
    """Before anything else of the run goes wrong."""
    edit(model / "config.json", attention_dropout=0.1, resid_pdrop=0.0)
    rows = tmp_path / "bad.jsonl"
    rows.write_text("{")
    command = ["--config", str(files / "run.yaml"), f"model={model}"]
    train = [*command, f"output_dir={tmp_path / 'out'}", f"data.train={rows}"]
    evaluate = ["eval", *command, "--adapter", str(tmp_path / "none")]
    for function, arguments in ((train_main, train), (main, evaluate)):
        capsys.readouterr()
        assert function(arguments) == 2
        told = capsys.readouterr().err
        assert told.count("note: config.json asks for noise in training, which is left out: ") == 1
        assert "left out: attention_dropout=0.1; dropout of adapters is adapter.dropout" in told


def drop_tensor(tensors):
    del tensors["model.norm.weight"]


def add_tensor(tensors):
    tensors["model.extra.weight"] = np.zeros(3, np.float32)


def turn_tensor(tensors):
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((32, 16), np.float32)


def retype_tensor(tensors):
    tensors["model.norm.weight"] = np.zeros(32, np.int8)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (drop_tensor, "missing model.norm.weight (32,)"),
        (add_tensor, "unexpected model.extra.weight (3,)"),
        (turn_tensor, "k_proj.weight has shape (32, 16), config.json asks for (16, 32)"),
        (retype_tensor, "model.norm.weight has dtype int8"),
    ],
)
def test_model_tensors(train_refused, model, damage, expected):
    tensors = load_file(model / "model.safetensors")
    damage(tensors)
    save_file(tensors, model / "model.safetensors")
    assert expected in train_refused(f"model={model}")


@pytest.mark.parametrize("size", [0, 4, 100, 90_000])
def test_truncated_model_file(train_refused, model, size):
    os.truncate(model / "model.safetensors", size)
    assert "damaged or cut short" in train_refused(f"model={model}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("config.json", "is a directory without config.json"),
        ("model.safetensors", "has no model.safetensors and no index of shards"),
        ("tokenizer.json", "has no tokenizer that transformers can load"),
    ],
)
def test_missing_model_files(train_refused, model, name, expected):
    (model / name).unlink()
    if name == "tokenizer.json":
        (model / "tokenizer_config.json").unlink()
    assert expected in train_refused(f"model={model}")


def test_damaged_json(train_refused, model):
    (model / "config.json").write_text('{"model_type": ')
    assert "config.json cannot be read" in train_refused(f"model={model}")


def test_missing_chat_template(train_refused, model):
    for file in model.glob("chat_template*"):
        file.unlink()
    write_tokenizer(model, chat_template=None)
    message = train_refused(f"model={model}")
    assert "has no chat template" in message and "data.chat_template" in message


# The output directory


def test_output_dir_is_never_overwritten(files, refused, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("kept")
    command = ("--config", files / "run.yaml", f"output_dir={output}")
    assert "already has a run or other files" in refused(train_main, *command)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    file = output / "mine.txt"
    command = ("--config", files / "run.yaml", f"output_dir={file}")
    assert "is a file; choose a directory" in refused(train_main, *command)
    command = ("--config", files / "run.yaml", f"output_dir={file / 'below'}")
    assert "cannot be made: Not a directory" in refused(train_main, *command)
    assert file.read_text() == "kept"


def test_output_dir_that_may_not_be_written(train_refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is not writable" in train_refused()


# export and generate


def test_export_without_a_run(refused, tmp_path):
    command = ("export", "--run", tmp_path / "none", "--format", "peft", "--output", tmp_path / "x")
    assert "is no run directory" in refused(main, *command)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model", "no/such/model"], "does not exist"),
        (["--adapter", "missing"], "adapter='missing' does not exist"),
        (["--adapter", "MODEL"], "has no adapter_config.json"),
        (["--chat-template", "missing.jinja"], "'missing.jinja' cannot be read"),
    ],
)
def test_generate(refused, files, options, expected):
    options = [str(files / "model") if option == "MODEL" else option for option in options]
    base = [] if "--model" in options else ["--model", files / "model"]
    assert expected in refused(main, "generate", "--prompt", "one", *base, *options)


def test_adapter_files_that_do_not_fit(refused, files, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    command = ("generate", "--prompt", "one", "--model", files / "model", "--adapter", adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_bias": True}))
    assert "not supported: lora_bias=True" in refused(main, *command)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "adapter_model.safetensors is missing" in refused(main, *command)
    save_file({"x": np.zeros(1, np.float32)}, adapter / "adapter_model.safetensors")
    message = refused(main, *command)
    assert "missing base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in message
    assert "unexpected x (1,)" in message


# The dry run


def test_dry_run_needs_config_json_alone(tmp_path, files, capsys):
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(files / "model" / "config.json", model)
    edit(model / "config.json", attention_dropout=0.1)
    file = tmp_path / "dry.yaml"
    file.write_text(f"model: {model}\noutput_dir: {tmp_path / 'out'}\nadapter: {{rank: 4}}\n")
    assert train_main(["--config", str(file), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.{0-1}.self_attn.q_proj" in printed
    assert printed.startswith("note: config.json asks for noise in training, which is left out: ")
    # Two layers of rank 4: q and o 32 -> 32, k and v 32 -> 16, three between 32 and 48.
    trained = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    frozen = 272 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    assert f"{trained:,} trainable parameters || {frozen:,} frozen" in printed
    assert f"{4 * trained:,} bytes" in printed
    assert not (tmp_path / "out").exists()


def test_dry_run_refuses_what_the_run_would(refused, files):
    command = ("--config", files / "run.yaml", "--dry-run", "adapter.target_modules=[qproj]")
    assert "Did you mean 'q_proj'?" in refused(train_main, *command)


def test_rows_are_read_from_a_directory_and_from_json(files, tmp_path, train_refused):
    write_rows(tmp_path / "b.jsonl")
    (tmp_path / "a.json").write_text('{"data": [{"prompt": 1, "completion": "x"}]}')
    assert "a.json[0]: 'prompt' is a number" in train_refused(f"data.train={tmp_path}")


def test_overrides_may_stand_before_between_and_after_options(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_run", lambda options: seen.append(options) or 0)
    for words in (
        "eval a=1 --config c b=2 --adapter x c=3",
        "eval --config c a=1 b=2 --adapter x c=3",
        "eval --config c --adapter x a=1 b=2 c=3",
    ):
        main(words.split())
        assert (seen[-1].config, seen[-1].adapter) == ("c", ["x"])
        assert seen[-1].overrides == ["a=1", "b=2", "c=3"]


def test_settings_that_look_like_options_and_a_config_without_its_option(capsys):
    for function, words, expected in (
        (train_main, "mine.yaml", "mine.yaml is a config file; pass it as --config mine.yaml"),
        (
            main,
            "eval mine.yml a=1 --adapter x",
            "mine.yml is a config file; pass it as --config mine.yml",
        ),
        (train_main, "--config c --steps 3", "settings are given as section.key=value, such as"),
    ):
        with pytest.raises(SystemExit):
            function(words.split())
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "strange"),
    [
        ("eval --config c a=1 --adapter x oops", "oops"),
        ("train --config c a=1 --adaptor x=1 --verbose y=2", "--adaptor"),
        ("generate --model m --prompt p a=1", "a=1"),
    ],
)
def test_arguments_that_nothing_takes_are_refused(words, strange, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    assert f"unrecognized arguments: {strange}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["generate", "--seed", str(2**70)],
            "argument --seed: 1180591620717411303424 must be from 0",
        ),
        (["generate", "--seed", "-1"], "argument --seed: -1 must be from 0 to 9223372036854775807"),
        (["generate", "--seed", "x"], "argument --seed: 'x' is no whole number"),
        (["generate", "--max-new-tokens", "x"], "--max-new-tokens: 'x' is no whole number"),
        (["generate", "--temperature", "x"], "argument --temperature: 'x' is no number"),
        (["combine", "--seed", str(2**63)], "argument --seed: 9223372036854775808 must be from 0"),
        (["combine", "--rank", "1.5"], "argument --rank: '1.5' is no whole number"),
    ],
)
def test_numbers_of_options(arguments, expected, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert expected in capsys.readouterr().err


def test_a_directory_where_a_file_shall_be_written(refused, files, tmp_path):
    config = ("--config", files / "run.yaml")
    for command, option in (("eval", "--output"), ("inspect", "--plot")):
        message = refused(main, command, *config, option, tmp_path)
        assert message == f"error: {option} {tmp_path} is a directory; give a file in it\n"


def test_a_seed_that_is_too_large(train_refused):
    assert f"seed={2**63} must be at most {2**63 - 1}" in train_refused(f"seed={2**63}")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_pages_have_a_sentence_for_every_option_and_examples(name, capsys):
    command, parser = COMMANDS[name], argparse.ArgumentParser()
    command.add_arguments(parser)
    assert not [action.dest for action in parser._actions if not action.help]
    assert ("train.py" if name == "train" else f"lora-jax {name}") in command.EPILOG
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert " ".join(command.EPILOG.split()) in page and command.HELP[1:] in page
