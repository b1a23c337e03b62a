"""Adapters of PEFT with whole embeddings and heads that their config does not name, and with other
prefixes than PEFT's own.
"""

import contextlib
import copy

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lora_jax import adapters as methods
from lora_jax import formats
from lora_jax.config import AdapterConfig
from lora_jax.errors import UserError

EMBED, HEAD = "model.embed_tokens", "lm_head"
TOKENS = np.random.default_rng(5).integers(0, 97, (2, 9))
TOLERANCE = 1e-5


def key(name: str) -> str:
    return f"base_model.model.{name}.weight"


def torch_logits(module) -> np.ndarray:
    with torch.no_grad():
        return module(input_ids=torch.tensor(TOKENS)).logits.numpy()


def live_logits(model, adapters, config) -> np.ndarray:
    return np.asarray(model.apply(methods.bind(model.params, adapters, config), TOKENS))


@pytest.fixture
def saved(tiny_llama, tmp_path):
    """`saved(names, seed=0, targets=["q_proj"], **config)`: a base, its torch model, and a PEFT
    adapter directory that holds the weights of these modules whole, moved by `move`.
    """

    def make(names, seed=0, move=0.3, targets=("q_proj",), family="llama", **config):
        directory, oracle = tiny_llama(seed, family=family, **config)
        module = peft.get_peft_model(
            copy.deepcopy(oracle), peft.LoraConfig(r=3, target_modules=list(targets))
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        module.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        for name in names:
            weight = oracle.get_submodule(name).weight.detach()
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + 7))
            tensors[key(name)] = (weight + move * noise).numpy()
        save_file(tensors, file, metadata={"format": "pt"})
        return directory, oracle, tmp_path / "adapter"

    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", [[EMBED], [HEAD], [EMBED, HEAD]], ids=str)
def test_whole_modules_give_the_logits_of_peft(saved, tmp_path, error, caplog, names, tied):
    for seed in (0, 1):
        directory, oracle, adapter = saved(names, seed, tie_word_embeddings=tied)
        expected = torch_logits(peft.PeftModel.from_pretrained(copy.deepcopy(oracle), adapter))
        model = formats.load(directory)
        adapters, config = formats.read_adapter(adapter, model.params)
        assert config.modules_to_save == ([EMBED] if tied else sorted(names))
        logits = live_logits(model, adapters, config)
        assert error(logits, expected) < TOLERANCE
        assert error(torch_logits(oracle), expected) > 0.1
        again, same = formats.read_adapter(adapter, formats.describe(directory).params, model)
        assert same == config
        jax.tree.map(np.testing.assert_array_equal, again, adapters)
    assert "read as modules_to_save" in caplog.text

    target = tmp_path / "written"
    formats.write_adapter(target, adapters, model.params, config, base_model="base")
    with pytest.warns() if tied else contextlib.nullcontext():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(oracle), target)
    assert error(torch_logits(theirs), expected) < TOLERANCE

    merged = methods.merge(methods.bind(model.params, adapters, config))
    formats.write_model(tmp_path / "merged", model, merged, directory)
    loaded = type(oracle).from_pretrained(tmp_path / "merged")
    assert error(torch_logits(loaded), expected) < TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
def test_what_equals_the_base_is_left_out(saved, caplog, tied):
    directory, _, adapter = saved([EMBED, HEAD], move=0, tie_word_embeddings=tied)
    described = formats.describe(directory)
    for params, base in ((formats.load(directory).params, None), (described.params, described)):
        adapters, config = formats.read_adapter(adapter, params, base)
        assert config.modules_to_save is None
        assert {*adapters} == {"model"} and {*adapters["model"]} == {"layers"}
    assert caplog.text.count("as in the base; left out") == 1


def test_what_peft_saves_after_a_resize_and_over_an_adapted_embedding(tiny_llama, tmp_path, error):
    """The vocabulary is that of the model, whatever its first base had."""
    directory, oracle = tiny_llama(1)
    small, _ = tiny_llama(2, vocab_size=90)
    settings = peft.LoraConfig(r=3, target_modules=["q_proj"])
    module = peft.get_peft_model(copy.deepcopy(oracle), settings)
    module.peft_config["default"].base_model_name_or_path = str(small)
    with pytest.warns(UserWarning, match="has been resized"):
        module.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key(EMBED), key(HEAD)} < {*tensors}
    _, config = formats.read_adapter(tmp_path / "adapter", formats.load(directory).params)
    assert config.modules_to_save is None

    described = formats.describe(small)
    with pytest.raises(UserError) as raised:
        formats.read_adapter(tmp_path / "adapter", described.params, described)
    for name in (EMBED, HEAD):
        assert f"{name} has 97 rows in the adapter, and 90 in the model" in str(raised.value)
    assert "call resize_token_embeddings(97) and save_pretrained" in str(raised.value)

    targets = peft.LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"])
    module = peft.get_peft_model(copy.deepcopy(oracle), targets)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        module.save_pretrained(tmp_path / "adapted")
    formats.read_adapter(tmp_path / "adapted", formats.load(directory).params)
    other, _ = tiny_llama(3)
    described = formats.describe(other)
    with pytest.raises(UserError, match="embed_tokens.base_layer.weight, which .* trained over"):
        formats.read_adapter(tmp_path / "adapted", described.params, described)


def test_two_values_of_a_tied_weight_are_refused(saved):
    directory, _, adapter = saved([EMBED], tie_word_embeddings=True)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    params = formats.load(directory).params
    base = np.asarray(params["model"]["embed_tokens"]["embedding"])
    for value in (tensors[key(EMBED)] + 1, base):
        save_file(tensors | {key(HEAD): value}, file)
        with pytest.raises(UserError, match="two values, lm_head and model.embed_tokens, of one"):
            formats.read_adapter(adapter, params)


def test_training_goes_on_from_whole_modules(saved):
    directory, _, adapter = saved([EMBED])
    model = formats.load(directory)
    adapters, config = formats.read_adapter(adapter, model.params)
    assert isinstance(config, AdapterConfig)
    fresh = methods.shapes(model.params, config)
    assert jax.tree.map(np.shape, adapters) == jax.tree.map(np.shape, fresh)


def bare(name):
    return name.replace("base_model.model.model.", "base_model.model.")


PREFIXES = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module.{name}",
    "of the bare model": bare,
    "none": lambda name: name.removeprefix("base_model.model."),
    "compiled inside": lambda name: name.replace(".model.model.", ".model.model._orig_mod."),
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_other_prefix_is_read(saved, prefix):
    directory, _, adapter = saved([], targets=["q_proj", "lm_head"])
    params = formats.load(directory).params
    expected, _ = formats.read_adapter(adapter, params)
    file = adapter / "adapter_model.safetensors"
    tensors = {PREFIXES[prefix](name): value for name, value in load_file(file).items()}
    assert {*tensors} != {*load_file(file)}
    save_file(tensors, file)
    found, _ = formats.read_adapter(adapter, params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_several_prefixes_are_refused_by_their_names(saved):
    directory, _, adapter = saved([])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    tensors[f"module.{first}"] = tensors.pop(first)
    save_file(tensors, file)
    with pytest.raises(UserError) as raised:
        formats.read_adapter(adapter, formats.describe(directory).params)
    lines = str(raised.value).splitlines()
    assert lines[1].strip().startswith(f"unexpected module.{first}")
    assert lines[2].strip().startswith(f"missing {first}")
