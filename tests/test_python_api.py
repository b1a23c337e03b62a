"""The library from Python: hidden states, mistaken arguments, paths as strings, loops."""

import inspect
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterConfig, UserError, combine, formats, lora
from lora_jax import config as configs
from lora_jax.formats import fingerprint
from lora_jax.train import export

from .families import FAMILIES
from .train.tiny import random_adapters, write_model

PAGE = Path(__file__).parents[1] / "docs" / "your-own-loop.md"
CONFIG = AdapterConfig(rank=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("files") / "model")


@pytest.fixture(scope="module")
def model(directory):
    return formats.load(directory)


@pytest.fixture(scope="module")
def trees(model):
    params, adapters = lora.init(jax.random.key(0), model.params, CONFIG)
    return params, random_adapters(adapters)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_hidden_states_are_those_of_transformers(tiny_model, error, family):
    import torch

    source, oracle = tiny_model(family, seed=3, **FAMILIES[family].size)
    model = formats.load(str(source))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 9))
    with torch.no_grad():
        theirs = oracle(torch.tensor(tokens), output_hidden_states=True)
    logits, hidden = model.apply(model.params, tokens, return_hidden=True)
    assert error(hidden, theirs.hidden_states[-1].numpy()) < 1e-5
    assert error(logits, theirs.logits.numpy()) < 1e-5
    assert error(model.apply(model.params, tokens), logits) == 0


def test_virtual_tokens_have_no_hidden_states_of_their_own(model):
    config = AdapterConfig(method="prompt", num_virtual_tokens=3, prompt_init="random")
    params, adapters = lora.init(jax.random.key(0), model.params, config)
    prefix = lora.prefix(adapters, config)
    logits, hidden = model.apply(params, np.arange(5)[None], prefix=prefix, return_hidden=True)
    assert logits.shape[:2] == hidden.shape[:2] == (1, 5)


def test_mistaken_arguments_say_what_was_given(model, trees):
    params, adapters = trees
    tokens, bound = np.arange(4)[None], lora.bind(params, adapters, CONFIG)
    leaf = r"model\.layers\.\S+\.lora_a"
    for call, message in (
        (lambda: lora.merge(adapters), rf"merge takes a bound tree.*bind.*adapters.*{leaf}"),
        (lambda: lora.merge(model), r"merge takes.*got a Model; its parameters are model\.p"),
        (lambda: lora.merge(trees), r"merge takes.*got a tuple; lora\.init returns"),
        (lambda: model.apply(adapters, tokens), rf"runs on parameters.*bind.*adapters.*{leaf}"),
        (lambda: model.apply(tokens, params), r"runs on parameters.*got a.* ndarray"),
        (
            lambda: model.apply(params["model"], tokens),
            r"not the parameters of the model: missing model\.embed",
        ),
        (lambda: lora.bind(adapters, params, CONFIG), r"adapters first and parameters second"),
        (lambda: lora.bind(adapters, adapters, CONFIG), rf"params, adapters and a.*{leaf}"),
        (lambda: lora.bind(params, params, CONFIG), r"do not fit.*missing"),
        (lambda: lora.bind(params, CONFIG, adapters), r"an AdapterConfig in place of adapters"),
        (lambda: lora.bind(params, adapters, {"rank": 4}), r"not an AdapterConfig but a dict"),
        (lambda: lora.bind(model, adapters, CONFIG), r"got a Model; its parameters are"),
        (lambda: lora.init(jax.random.key(0), model, CONFIG), r"init takes a key.*a Model"),
        (lambda: lora.init(model.params, jax.random.key(0), CONFIG), r"init takes a key, params"),
    ):
        with pytest.raises(UserError, match=f"(?s){message}"):
            call()
    assert lora.merge(bound)["model"].keys() == params["model"].keys()


def functions_of_paths():
    """Public functions with an argument that is annotated as a path."""
    for module in (formats, formats.gguf, fingerprint, combine, export, configs):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ or module in (formats, configs)
            if name.startswith("_") or not (own and function.__module__.startswith("lora_jax")):
                continue
            hints = typing.get_type_hints(function)
            for argument in inspect.signature(function).parameters:
                kinds = [hints.get(argument), *typing.get_args(hints.get(argument))]
                if Path in kinds and argument != "place":  # a directory or bucket of our own
                    yield f"{function.__module__}.{name}", argument, str in kinds


def test_public_functions_that_take_a_path_take_a_string():
    found = sorted(set(functions_of_paths()))
    names = {name.rpartition(".")[2] for name, *_ in found}
    assert {"load", "read_adapter", "write_adapter", "write_model", "export_run"} <= names
    assert not [f"{name}({argument})" for name, argument, text in found if not text]


def test_strings_work_as_paths(model, trees, directory, tmp_path, monkeypatch):
    params, adapters = trees
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    source = str(directory)
    formats.write_adapter("a", adapters, params, CONFIG, base_model=source, source=source)
    assert formats.read_adapter("~/a", params)[1].rank == 4
    assert formats.read_fingerprint("a") == formats.read_template_kwargs("a") == {}
    assert formats.read_stops("a") == []
    combine.combine_directories(source, [("a", 0.5), (str(tmp_path / "a"), 0.5)], "both")
    halves, _ = formats.read_adapter("both", params)
    assert max(leaf.shape[-1] for leaf in jax.tree.leaves(halves)) > 0
    formats.write_model("merged", model, lora.merge(lora.bind(params, adapters, CONFIG)), source)
    again = formats.load("merged")
    formats.load_tokenizer("merged")
    assert formats.describe("merged").config == again.config == model.config
    assert formats.missing_heads("merged", model) == ()
    shapes = formats.describe(source)
    read = formats.read_params(source, shapes, None)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, read, model.params))
    assert formats.stop_tokens("merged") == formats.stop_tokens(Path("merged"))
    assert fingerprint.base_digest(source) == fingerprint.base_digest(directory)
    assert configs.read_json("merged/config.json")["model_type"] == "llama"


def test_the_page_on_loops_runs(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 6
    code = "\n".join(blocks).replace("demo:smollm2-135m-instruct", str(directory))
    names = {}
    exec(code, names)
    assert names["losses"][-1] < names["losses"][0]
    assert names["each"].shape == (2,) and np.isfinite(names["each"]).all()
    assert jnp.array_equal(names["ours"], names["again"])
    assert not jnp.array_equal(names["ours"], names["other"])
    for name in ("step", "train_all", "forward"):
        assert names[name]._cache_size() == 1, name
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    assert len(re.findall(r"^\w+_proj .*\[", capsys.readouterr().out, re.M)) == 7
