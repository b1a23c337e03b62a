"""The arguments of the chat template go with the adapter: its record, `generate`, `eval`."""

import io
import json

import pytest
from rich.console import Console

from lora_jax import config as configs
from lora_jax import data
from lora_jax.audit.compare import compare
from lora_jax.cli import main, train_main
from lora_jax.data import answers

from .tiny import CHATML

MODE = "{{ mode or '' }}" + CHATML


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """The directory of a run whose template reads `mode`, and its settings."""
    directory = tmp_path_factory.mktemp("kwargs")
    (directory / "mode.jinja").write_text(MODE)
    settings = [
        *(f"output_dir={directory / 'out'}", f"data.chat_template={directory / 'mode.jinja'}"),
        *("data.chat_template_kwargs={mode: ''}", "train.steps=1", "eval.generate=false"),
    ]
    assert train_main(["--config", str(files / "run.yaml"), *settings]) == 0
    return directory / "out" / "adapter", settings


@pytest.fixture
def asked(monkeypatch):
    """Collects the arguments with which prompts are rendered."""
    seen, encode_prompt = [], data.encode_prompt

    def spy(row, rendering):
        seen.append(rendering.chat_template_kwargs)
        return encode_prompt(row, rendering)

    monkeypatch.setattr(data, "encode_prompt", spy)
    monkeypatch.setattr(answers, "encode_prompt", spy)
    return seen


def test_generate_takes_the_arguments_of_the_adapter(trained, files, asked, capsys):
    adapter, _ = trained
    assert json.loads((adapter / "lora_jax.json").read_text())["chat_template_kwargs"] == {
        "mode": ""
    }
    command = [
        "generate",
        "--model",
        str(files / "model"),
        "--prompt",
        "one",
        "--max-new-tokens",
        "1",
    ]
    with_adapter = [*command, "--adapter", str(adapter)]
    assert main(with_adapter) == 0
    assert main([*with_adapter, "--chat-template-kwargs", '{"mode": "x"}']) == 0
    assert asked == [{"mode": ""}, {"mode": "x"}]
    capsys.readouterr()
    assert main([*command, "--chat-template-kwargs", '{"mode": "x"}']) == 2
    assert "data.chat_template_kwargs names 'mode'" in capsys.readouterr().err
    for wrong, told in (("{", "is no JSON"), ("[1]", "is no object")):
        with pytest.raises(SystemExit):
            main([*command, "--chat-template-kwargs", wrong])
        assert told in capsys.readouterr().err


def test_eval_uses_those_of_the_config_and_tells_a_difference(trained, files, asked):
    adapter, settings = trained
    for mode, notes in (("", 0), ("x", 1)):
        config = configs.load(
            files / "run.yaml",
            [
                *settings,
                *(
                    f"data.eval={files / 'rows.jsonl'}",
                    f"data.chat_template_kwargs={{mode: '{mode}'}}",
                ),
                *("eval.generate=true", "eval.generate_examples=1", "eval.max_new_tokens=1"),
            ],
        )
        console = Console(file=io.StringIO(), width=300)
        compare(config, [str(adapter)], console)
        assert asked and all(options == {"mode": mode} for options in asked)
        assert console.file.getvalue().count("was trained with data.chat_template_kwargs") == notes
        asked.clear()


def test_a_system_prompt_that_is_missing_is_told(trained, files, tmp_path, caplog):
    """An adapter asked or measured without the system prompt of its training is out of its task."""
    adapter, settings = trained
    output = f"output_dir={tmp_path / 'out'}"
    own = [*settings, output, "data.system_prompt=Be brief: {x}"]
    assert train_main(["--config", str(files / "run.yaml"), *own]) == 0
    made = str(tmp_path / "out" / "adapter")
    command = ["generate", "--model", str(files / "model"), "--prompt", "one"]
    command += ["--max-new-tokens", "1", "--chat-template", str(adapter.parent.parent)]
    command[-1] += "/mode.jinja"
    told = (
        "was trained with data.system_prompt='Be brief: {x}'; --system-prompt gives it to prompts"
    )
    for options, count in (
        (["--adapter", made], 1),
        (["--adapter", made, "--system-prompt", "Be brief: {x}"], 0),
        (["--adapter", str(adapter)], 0),
    ):
        caplog.clear()
        assert main([*command, *options]) == 0
        assert caplog.text.count(told) == count
    for prompt, count in (("Be brief: {x}", 0), ("Other", 1)):
        options = [*settings, f"data.eval={files / 'rows.jsonl'}", f"data.system_prompt={prompt}"]
        console = Console(file=io.StringIO(), width=300)
        compare(configs.load(files / "run.yaml", options), [made], console)
        assert console.file.getvalue().count("was trained with data.system_prompt=") == count
