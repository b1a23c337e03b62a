"""Every setting that changes the encoded examples is part of the key of the token cache."""

import dataclasses
import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from lora_jax import config as configs
from lora_jax import formats
from lora_jax.config import ENCODING_KEYS, DataConfig, options_of
from lora_jax.config.options import encoding_keys, option
from lora_jax.data import sets
from lora_jax.errors import UserError

from ..train.tiny import CHATML, write_rows, write_tokenizer

TEMPLATE = "{{ strftime_now('%Y') }}{% if shout %}{{ '!' }}{% endif %}" + CHATML
CHAT = [
    {"prompt": "one", "completion": "eins", "persona": "a"},
    {"prompt": "two", "completion": "zwei" * 20, "persona": "b"},  # above max_length
    {"prompt": 3, "completion": "drei", "persona": "c"},  # a bad row
]
LABELLED = [
    {"first": "one", "second": "eins", "kind": "p", "other": "q"},
    {"first": "two", "second": "zwei", "kind": "q", "other": "q"},
]
COMMON = ["data.max_length=80", "data.template_date=2020-01-01"]
COLUMNS = ["data.prompt={prompt}", "data.completion={completion}"]
# What the examples of each scenario are made with, and which rows it reads.
SCENARIOS = {
    "chat": ("chat", [*COMMON, "data.ignore_columns=[persona]", "data.on_bad_row=drop"]),
    "columns": ("chat", [*COMMON, *COLUMNS, "data.on_bad_row=drop"]),
    "labels": (
        "labelled",
        ["data.labels=[p, q]", "data.text=[first]", "data.label=kind", "data.on_bad_row=drop"],
    ),
}
# Another value for every setting of the section `data`.
OTHER = {
    "train": "elsewhere.jsonl",
    "eval": "held-out.jsonl",
    "eval_size": 1.0,
    "regression": "general.jsonl",
    "drop_overlap": True,
    "prompt": "{persona}",
    "completion": "{persona}",
    "text": ["second"],
    "label": "other",
    "labels": ["q", "p"],
    "ignore_columns": ["other"],
    "system_prompt": "Translate.",
    "chat_template": "none",
    "chat_template_kwargs": {"shout": True},
    "template_date": "2021-01-01",
    "max_length": 70,
    "too_long": "drop",
    "packing": False,
    "share_prompts": True,
    "replay": "general.jsonl",
    "replay_share": 0.5,
    "shuffle": False,
    "streaming": True,
    "stream_rows": 7,
    "on_bad_row": "error",
    "cache": False,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sources")
    write_tokenizer(directory, TEMPLATE)
    return SimpleNamespace(
        tokenizer=formats.load_tokenizer(directory),
        chat=str(write_rows(directory / "chat.jsonl", CHAT)),
        labelled=str(write_rows(directory / "labelled.jsonl", LABELLED)),
    )


@pytest.fixture
def encode(files, tmp_path, monkeypatch):
    """`encode(config, kind)`: the examples of a source, or the error, and if they were built."""
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))

    def run(config, kind):
        labels = tuple(config.data.labels) if kind == "labelled" else None
        console = Console(file=io.StringIO())
        encoder = sets.Encoder(config, files.tokenizer, "tokenizer", console, labels=labels)
        try:
            found = encoder.examples(getattr(files, kind), "source")
        except UserError as error:
            return str(error), True
        as_lists = [(e.where, e.tokens.tolist(), e.loss_weights.tolist()) for e in found]
        return as_lists, bool(encoder.read)

    return run


def change(config, name, value):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **{name: value}))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(DataConfig)])
def test_a_setting_is_in_the_key_exactly_if_it_changes_examples(encode, name):
    """Examples come out of a cache that was filled with another value of the setting."""
    differ = []
    for kind, overrides in SCENARIOS.values():
        before = configs.parse({"model": "tiny"}, overrides)
        after = change(before, name, OTHER[name])
        assert getattr(before.data, name) != OTHER[name]
        built, is_new = encode(before, kind)
        assert is_new and encode(before, kind) == (built, False)
        truth, _ = encode(change(after, "cache", False), kind)
        found, is_new = encode(after, kind)
        assert found == truth, f"data.{name}: stale examples"
        assert is_new == (name in ENCODING_KEYS or name == "cache")
        differ.append(truth != built)
    assert any(differ) == options_of(DataConfig)[name].changes_encoding


def test_virtual_tokens_leave_fewer_tokens_to_an_example(encode):
    kind, overrides = SCENARIOS["chat"]
    for method in ([], ["num_virtual_tokens=3"], ["num_virtual_tokens=9"]):
        adapter = [f"adapter.{one}" for one in (method and ["method=prompt", *method])]
        config = configs.parse({"model": "tiny"}, [*overrides, *adapter])
        truth, _ = encode(change(config, "cache", False), kind)
        assert encode(config, kind) == (truth, True)


def test_an_encoder_reads_no_section_of_the_config_that_is_not_in_the_key(encode):
    read = set()

    class Recorder:
        def __init__(self, config):
            self.config = config

        def __getattr__(self, name):
            read.add(name)
            return getattr(self.config, name)

    for kind, overrides in SCENARIOS.values():
        encode(Recorder(configs.parse({"model": "tiny"}, overrides)), kind)
    # Of the adapter the number of virtual tokens, of the training the form of rows that its
    # objective takes; the model's name is for messages.
    assert read <= {"data", "adapter", "train", "model"}


def test_a_setting_that_does_not_say_if_it_changes_examples_is_an_error():
    @dataclasses.dataclass
    class Section:
        old: int = option(1, changes_encoding=True)
        new: int = option(1)
        plain: int = 1

    with pytest.raises(TypeError, match="Section: state changes_encoding of new, plain"):
        encoding_keys(Section)
