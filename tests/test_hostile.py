"""Hostile directories of adapters and models end in one error at every entry point: nothing in them
is run, stdin is not read, and nothing takes hours or gigabytes.
"""

import io
import json
import re
import shutil

import jax
import pytest

from lora_jax import AdapterConfig, UserError, formats, lora
from lora_jax.cli import main, train_main
from lora_jax.data import sandbox
from lora_jax.formats import tokenizer_files

from .test_cli import edit
from .test_cli import refused as refused
from .train.conftest import files as files

SLOW = r"((\w|\.|[a-z])+)+[!?]"
ADAPTERS = {
    "target_modules": ({"target_modules": SLOW}, "target_modules=.*takes too long"),
    "exclude_modules": ({"exclude_modules": SLOW}, "exclude_modules=.*takes too long"),
    "rank_pattern": ({"rank_pattern": {SLOW: 2}}, "rank_pattern.*takes too long"),
    "alpha_pattern": ({"alpha_pattern": {SLOW: 2}}, "alpha_pattern.*takes too long"),
    "tied regex": ({"target_modules": SLOW, "ensure_weight_tying": True}, "takes too long"),
    "invalid regex": ({"target_modules": "(q_proj"}, "not a valid regex"),
    "long list": ({"target_modules": [f"x{i}" for i in range(200_000)]}, "more entries match"),
    "many patterns": ({"rank_pattern": {f"x{i}": 2 for i in range(20_000)}}, "20,000 entries"),
    "many layers": ({"layers_to_transform": list(range(200_000))}, "does not exist"),
    "many tokens": ({"trainable_token_indices": [1] * 200_000}, "every token once"),
}
SIZES = {
    "num_hidden_layers": 10**9,
    "hidden_size": 10**12,
    "vocab_size": 10**12,
    "num_attention_heads": 10**9,
    "head_dim": 10**9,
    "intermediate_size": 10**18,
    "max_position_embeddings": 10**30,
}
TOKENIZERS = {
    "custom class": {"tokenizer_class": "OwnTokenizer"},
    "no class": {"tokenizer_class": None},
}
AUTO_MAP = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}


class NoInput(io.StringIO):
    """A stdin that says yes, and that nobody may read."""

    def readline(self, *arguments):
        raise AssertionError("stdin was read")

    read = readline


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    monkeypatch.setattr("sys.stdin", NoInput("y\n"))
    monkeypatch.setattr("lora_jax.patterns._SECONDS", 0.05)
    monkeypatch.setattr(sandbox, "_SECONDS", 0.05)
    monkeypatch.setattr(sandbox, "_FAILED", {})


@pytest.fixture(scope="module")
def made(files, tmp_path_factory):
    """A good adapter of the tiny model, with the tokenizer in its directory."""
    model = formats.load(files / "model")
    config = AdapterConfig(rank=2, target_modules=["q_proj"])
    adapters = lora.init(jax.random.key(0), model.params, config)[1]
    target = tmp_path_factory.mktemp("adapters") / "good"
    formats.write_adapter(
        target, adapters, model.params, config, base_model="base", source=files / "model"
    )
    return target


@pytest.fixture
def adapter(made, tmp_path):
    return shutil.copytree(made, tmp_path / "adapter")


@pytest.fixture
def model(files, tmp_path):
    return shutil.copytree(files / "model", tmp_path / "model")


def with_adapter(files, adapter, output):
    """The commands that read an adapter."""
    base = ("--config", files / "run.yaml", f"output_dir={output}")
    return {
        "generate": (main, "generate", "--model", files / "model", "--adapter", adapter)
        + ("--prompt", "one", "--max-new-tokens", "1"),
        "eval": (main, "eval", *base, f"data.eval={files / 'rows.jsonl'}", "--adapter", adapter),
        "combine": (main, "combine", "--model", files / "model", "--adapter", adapter)
        + ("--output", output),
        "train": (train_main, *base, f"adapter.path={adapter}"),
        "dry run": (train_main, *base, "--dry-run", f"adapter.path={adapter}"),
        "plan": (main, "plan", "--no-compile", *base, f"adapter.path={adapter}"),
    }


def with_model(files, model, output):
    """The commands that read a model."""
    base = ("--config", files / "run.yaml", f"output_dir={output}", f"model={model}")
    return {
        "generate": (main, "generate", "--model", model, "--prompt", "one"),
        "inspect": (main, "inspect", *base),
        "eval": (main, "eval", *base, f"data.eval={files / 'rows.jsonl'}"),
        "combine": (main, "combine", "--model", model, "--adapter", "none", "--output", output),
        "train": (train_main, *base),
        "dry run": (train_main, *base, "--dry-run"),
        "plan": (main, "plan", "--no-compile", *base),
    }


def add_code(directory, **fields):
    """Add a tokenizer of its own to a directory, whose module would write `executed`."""
    marker = directory / "executed"
    (directory / "tokenization_own.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    edit(directory / "tokenizer_config.json", auto_map=AUTO_MAP, **fields)
    return marker


@pytest.mark.parametrize("command", ["generate", "eval", "combine", "train", "dry run", "plan"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(refused, files, adapter, tmp_path, name, command):
    fields, message = ADAPTERS[name]
    edit(adapter / "adapter_config.json", **fields)
    printed = refused(*with_adapter(files, adapter, tmp_path / "out")[command])
    assert re.search(message, printed) and str(adapter / "adapter_config.json") in printed


@pytest.mark.parametrize("command", ["generate", "inspect", "combine", "train", "dry run", "plan"])
@pytest.mark.parametrize("field", SIZES)
def test_sizes_of_a_model(refused, files, model, tmp_path, field, command):
    edit(model / "config.json", **{field: SIZES[field]})
    printed = refused(*with_model(files, model, tmp_path / "out")[command])
    assert f"{field}={SIZES[field]} is above" in printed


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("command", ["generate", "inspect", "eval", "train"])
def test_code_of_a_model(refused, files, model, tmp_path, command, kind):
    marker = add_code(model, **TOKENIZERS[kind])
    edit(model / "config.json", auto_map={"AutoConfig": "tokenization_own.OwnTokenizer"})
    printed = refused(*with_model(files, model, tmp_path / "out")[command])
    assert "tokenizer_config.json: auto_map names 'tokenization_own.OwnTokenizer'" in printed
    assert not marker.exists()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_code_of_an_adapter(refused, files, adapter, tmp_path, kind):
    marker = add_code(adapter, **TOKENIZERS[kind])
    printed = refused(*with_adapter(files, adapter, tmp_path / "out")["generate"])
    assert f"{adapter / 'tokenizer_config.json'}: auto_map names" in printed
    assert not marker.exists()


@pytest.mark.parametrize("name", ["AutoTokenizer", "AutoConfig", "AutoProcessor", "AutoModel"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_class_that_is_no_tokenizer(model, name, file):
    marker = add_code(model)
    edit(model / "tokenizer_config.json", drop=["auto_map", "tokenizer_class"])
    own = {"AutoConfig": "tokenization_own.Own", "AutoProcessor": "tokenization_own.OwnTokenizer"}
    edit(model / "config.json", auto_map=own, model_type="own")
    (model / "processor_config.json").write_text(json.dumps({"auto_map": own}))
    edit(model / file, tokenizer_class=name)
    with pytest.raises(UserError, match=f"{file}: tokenizer_class='{name}' is not a tokenizer"):
        formats.load_tokenizer(model)
    assert not marker.exists()


@pytest.mark.parametrize("name", [5, {}, ["x"]])
def test_a_class_that_is_no_name(model, name):
    edit(model / "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(
        UserError, match="tokenizer_config.json: tokenizer_class=.* is not the name of a class"
    ):
        formats.load_tokenizer(model)


def test_ids_of_tokens_have_a_limit(model):
    """`tokenizers` lists all ids up to the largest when it writes: 2**31 ended the process."""
    content = json.loads((model / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab[next(iter(vocab))] = 2**31
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="the id 2,147,483,648; the largest that is supported"):
        formats.load_tokenizer(model)


def test_tokenizers_of_other_directories(model):
    """A RAG model has two tokenizers, which transformers loads without the word of this package."""
    inner = model / "question_encoder_tokenizer"
    shutil.copytree(model, inner)
    shutil.copytree(inner, model / "generator_tokenizer")
    marker = add_code(inner, tokenizer_class="Own")
    edit(model / "tokenizer_config.json", drop=["tokenizer_class"])
    parts = {name: {"model_type": "vit"} for name in ("question_encoder", "generator")}
    edit(model / "config.json", model_type="rag", **parts)
    with pytest.raises(UserError, match="requires you to execute custom code"):
        formats.load_tokenizer(model)
    shutil.rmtree(inner)
    shutil.copytree(model / "generator_tokenizer", inner)
    edit(model / "config.json", **{name: {"model_type": "bert"} for name in parts})
    with pytest.raises(UserError, match="as a RagTokenizer, which is not a tokenizer"):
        formats.load_tokenizer(model)
    assert not marker.exists()


@pytest.mark.parametrize("auto_map", [AUTO_MAP, ["tokenization_own.OwnTokenizer", None]])
def test_a_class_of_transformers_reads_the_files_without_code(model, auto_map, caplog):
    marker = add_code(model, tokenizer_class="PreTrainedTokenizerFast")
    edit(model / "tokenizer_config.json", auto_map=auto_map)
    tokenizer = formats.load_tokenizer(model)
    assert tokenizer.decode(tokenizer("one")["input_ids"]) == "one"
    assert "that code is not run" in caplog.text and not marker.exists()


@pytest.mark.parametrize("auto_map", [{}, {"AutoTokenizer": None}, {"AutoModel": "x"}])
def test_an_auto_map_that_names_no_tokenizer_is_no_code(model, auto_map):
    edit(model / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=None)
    assert formats.load_tokenizer(model)("one")["input_ids"]


TEMPLATE = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("command", ["generate", "inspect", "eval", "train"])
def test_templates_of_a_model(refused, files, model, tmp_path, command):
    (model / "chat_template.jinja").write_text(TEMPLATE)
    printed = refused(*with_model(files, model, tmp_path / "out")[command])
    assert "the chat template was stopped: it takes more than" in printed


def test_templates_of_an_adapter(refused, files, adapter, tmp_path):
    (adapter / "chat_template.jinja").write_text("{{ 'a' * 10**10 }}")
    printed = refused(*with_adapter(files, adapter, tmp_path / "out")["generate"])
    assert "the chat template was stopped: it makes a text or list of" in printed


def test_sizes_of_tokenizers(refused, files, model, tmp_path, monkeypatch):
    command = with_model(files, model, tmp_path / "out")["generate"]
    file = model / "added_tokens.json"
    with file.open("wb") as opened:
        opened.truncate(20_000_000)
    assert f"{file} has 20,000,000 bytes" in refused(*command)
    file.unlink()
    monkeypatch.setattr(tokenizer_files, "_MOST_ADDED", 2)
    assert "the tokenizer adds 3 tokens; at most 2 are supported" in refused(*command)
    edit(model / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.1.0.0.json"])
    assert "names '../tokenizer.1.0.0.json', which is not a file of the directory" in refused(
        *command
    )


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a\\..\\x.safetensors"])
@pytest.mark.parametrize("command", ["generate", "eval", "train"])
def test_indices_that_leave_the_directory(refused, files, model, tmp_path, command, name):
    shutil.move(model / "model.safetensors", tmp_path / "x.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    printed = refused(*with_model(files, model, tmp_path / "out")[command])
    assert "is outside of the directory" in printed
