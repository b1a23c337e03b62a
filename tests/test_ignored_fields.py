"""`--ignore-config-fields` of the commands that take a model and no config of a run."""

import pytest

from lora_jax import AdapterConfig, formats
from lora_jax.cli import main

from .formats.test_peft import UNTIED, random_adapters
from .train.tiny import write_tokenizer


@pytest.fixture
def strange(tiny_llama, tmp_path, edit_json):
    """A model with a field that nobody knows, and an adapter of it."""
    directory, _ = tiny_llama(0, **UNTIED | dict(vocab_size=272))
    write_tokenizer(directory)
    model, config = formats.load(directory), AdapterConfig(rank=2)
    adapter = tmp_path / "adapter"
    adapters = random_adapters(model.params, config, 0)
    formats.write_adapter(adapter, adapters, model.params, config, base_model=str(directory))
    edit_json(directory / "config.json", logit_scale=2.0)
    return directory, adapter


@pytest.mark.parametrize("command", ["generate", "combine", "finetuned"])
def test_fields_are_ignored_where_asked_for(strange, command, tmp_path, capsys):
    model, adapter = map(str, strange)
    output = ["--output", str(tmp_path / "out")]
    arguments = {
        "generate": ["generate", "--prompt", "hi", "--max-new-tokens", "1"],
        "combine": ["combine", "--adapter", adapter, *output],
        "finetuned": ["combine", "--finetuned", model, "--rank", "1", *output],
    }[command] + ["--model", model]
    assert main(arguments) == 2
    assert "--ignore-config-fields logit_scale of generate and combine" in capsys.readouterr().err
    # A model that is its own fine-tuned form leaves nothing to extract.
    status = main([*arguments, "--ignore-config-fields", "logit_scale"])
    error = capsys.readouterr().err
    assert "logit_scale" not in error
    assert status == 0 or (command == "finetuned" and "nothing to extract" in error)
