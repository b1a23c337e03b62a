"""Adapters as GGUF files: what llama.cpp would add to each weight, and what is refused."""

import gguf
import numpy as np
import pytest

from lora_jax import AdapterConfig, UserError, formats, lora
from lora_jax.formats import Chat
from lora_jax.tree import flatten

from .gguf_models import KINDS, write_llama, write_tiny
from .test_peft import random_adapters

NAMES = {
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}
CONFIGS = {
    "plain": dict(target_modules=["q_proj", "v_proj"]),
    "all": dict(target_modules="all-linear", rank=3, alpha=7.0),
    "rslora, patterns": dict(
        target_modules="all-linear",
        rank=4,
        use_rslora=True,
        rank_pattern={"k_proj": 2, "layers.1.mlp.up_proj": 5},
        alpha_pattern={"o_proj": 3.0},
    ),
    "one layer": dict(target_modules=r".*layers\.1\.self_attn\.k_proj"),
    "pissa": dict(target_modules=["q_proj", "down_proj"], init="pissa", rank=3, alpha=5.0),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    biased = write_llama(directory / "biased", attention_bias=True)
    return {kind: write_tiny(kind, directory / kind) for kind in KINDS} | {"biased": biased}


def read(file):
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def trained(model, **fields):
    """Random adapters of a config, and the weights that they train."""
    config = AdapterConfig(**fields)
    adapters = random_adapters(model.params, config, 0)
    params = lora.residual(model.params, adapters, config)
    return config, adapters, lora.merge(lora.bind(params, adapters, config))


def row_of(model, name, row):
    """The row of our matrix that is a row of the file: for llama, halves of a head take turns."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    if model.hf_config["model_type"] == "gemma3_text" or name not in heads:
        return row
    width = model.config.head_dim
    head, place = divmod(row, width)
    return head * width + place // 2 + (width // 2 if place % 2 else 0)


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_llama_cpp_adds_is_the_update(models, tmp_path, kind, fields):
    model = models[kind]
    config, adapters, merged = trained(model, **fields)
    formats.write_gguf_adapter(tmp_path / "a", adapters, model, config, base_model="me/tiny")
    meta, tensors = read(tmp_path / "a" / "adapter.gguf")
    assert meta["general.architecture"] == ("gemma3" if kind == "gemma3" else "llama")
    assert (meta["general.type"], meta["adapter.type"]) == ("adapter", "lora")
    assert meta["general.base_model.0.name"] == "me/tiny"
    left = dict(tensors)
    before, after = flatten(model.params), flatten(merged)
    for path, weight in before.items():
        own = ".".join(path[2:-1])
        for layer in range(weight.shape[0] if own in NAMES else 0):
            name = NAMES[own]
            update = np.asarray(after[path][layer], np.float64) - np.asarray(weight[layer])
            pair = [left.pop(f"blk.{layer}.{name}.weight.lora_{x}", None) for x in "ab"]
            if pair[0] is None:
                assert not update.any(), f"{own} of layer {layer} is missing"
                continue
            a, b = pair
            assert a.dtype == b.dtype == np.float32 and a.shape[0] == b.shape[1]
            added = meta["adapter.lora.alpha"] / a.shape[0] * b.astype(np.float64) @ a
            rows = [row_of(model, name, row) for row in range(len(added))]
            assert np.abs(update).max() > 1e-3
            np.testing.assert_allclose(added, update.T[rows], rtol=0, atol=2e-6)
    assert not left


def test_factors_are_the_trained_numbers_where_one_alpha_says_it_all(models, tmp_path):
    model = models["llama"]
    config, adapters, _ = trained(model, target_modules=["v_proj"], rank=4, alpha=6.0)
    formats.write_gguf_adapter(tmp_path / "a", adapters, model, config, base_model="base")
    meta, tensors = read(tmp_path / "a" / "adapter.gguf")
    leaves = {path[-1]: np.asarray(leaf) for path, leaf in flatten(adapters).items()}
    assert meta["adapter.lora.alpha"] == 6.0
    for x in "ab":
        stored = tensors[f"blk.1.attn_v.weight.lora_{x}"]
        np.testing.assert_array_equal(stored, leaves[f"lora_{x}"][1].T)


def test_equal_adapters_give_equal_bytes(models, tmp_path):
    model = models["llama"]
    config, adapters, _ = trained(model)
    for name in "ab":
        formats.write_gguf_adapter(tmp_path / name, adapters, model, config, base_model="base")
    first, second = (tmp_path / name / "adapter.gguf" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(UserError, match="already exists and is not empty"):
        formats.write_gguf_adapter(tmp_path / "a", adapters, model, config, base_model="base")


def test_the_modelfile(models, tmp_path):
    model = models["llama"]
    config, adapters, _ = trained(model)
    chat = Chat(stops=[2], template="{{ messages }}", system_prompt='Say "no".')
    target = tmp_path / "a"
    formats.write_gguf_adapter(target, adapters, model, config, base_model="me/tiny", chat=chat)
    assert (target / "Modelfile").read_text() == (
        "# base.gguf is the GGUF file of me/tiny: put it next to this file.\n"
        "FROM ./base.gguf\n"
        "ADAPTER ./adapter.gguf\n"
        'PARAMETER stop "<|im_end|>"\n'
        'SYSTEM """Say "no"."""\n'
    )
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    chat = Chat(system_prompt='three """ quotes')
    with pytest.raises(UserError, match="three quotes"):
        formats.write_gguf_adapter(
            tmp_path / "b", adapters, model, config, base_model="base", chat=chat
        )
    assert not (tmp_path / "b").exists()


REFUSED = {
    "dora": (dict(use_dora=True), "cannot hold use_dora=True; export a GGUF model with --merged"),
    "biases": (dict(bias="all"), "cannot hold bias='all'"),
    "saved modules": (dict(modules_to_save=["norm"]), r"modules_to_save=\['norm'\]"),
    "tokens": (dict(trainable_token_indices=[3]), r"trainable_token_indices=\[3\]"),
    "embedding": (
        dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=False),
        r"adapters of model.embed_tokens \(target_modules=",
    ),
    "head": (
        dict(target_modules=["lm_head"], ensure_weight_tying=False),
        r"adapters of lm_head \(target_modules=",
    ),
    "loftq": (dict(init="loftq"), "init=loftq made up for the error of the quantised base"),
    "vera": (dict(method="vera"), "cannot hold method=vera; export a GGUF model"),
    "prompt": (dict(method="prompt"), r"no virtual tokens \(method=prompt\); use --format peft"),
    "prefix": (dict(method="prefix"), r"no virtual tokens \(method=prefix\)"),
    "full": (dict(method="full"), "cannot hold method=full"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_file_cannot_hold_is_refused(models, tmp_path, fields, message):
    model = models["biased"]
    config = AdapterConfig(**fields)
    with pytest.raises(UserError, match=message):
        formats.write_gguf_adapter(
            tmp_path / "a", lora.shapes(model.params, config), model, config, base_model="base"
        )
    assert not list(tmp_path.iterdir())


def test_all_reasons_are_listed(models, tmp_path):
    config = AdapterConfig(use_dora=True, target_modules=["lm_head"], modules_to_save=["norm"])
    adapters = lora.shapes(models["llama"].params, config)
    with pytest.raises(UserError) as caught:
        formats.write_gguf_adapter(
            tmp_path / "a", adapters, models["llama"], config, base_model="base"
        )
    assert len(str(caught.value).splitlines()) == 3


def test_other_architectures_are_refused(tmp_path):
    fields = dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=8)
    model = write_llama(tmp_path / "m", **fields)
    config = AdapterConfig()
    adapters = lora.shapes(model.params, config)
    with pytest.raises(UserError, match="model_type='qwen3'; supported: llama, mistral, gemma3_te"):
        formats.write_gguf_adapter(tmp_path / "a", adapters, model, config, base_model="base")
    assert not (tmp_path / "a").exists()
