"""PEFT directories of LoRA that are damaged or do not fit, and decisions that a tied head needs."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import AdapterConfig, UserError, formats
from lora_jax.targets import find_targets

from .test_lora import Q0, V1, random_peft_model


@pytest.fixture
def adapter_directory(tiny_llama, tmp_path):
    """A PEFT directory as PEFT writes it, and the shapes of its model."""
    directory, oracle = tiny_llama()
    fields = dict(rank=3, alpha=8.0, target_modules=["q_proj", "v_proj"])
    random_peft_model(oracle, fields, 0).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", formats.describe(directory).params


def drop(tensors):
    del tensors[Q0], tensors[V1]


def add(tensors):
    tensors[Q0.replace("q_proj", "k_proj")] = np.ones((3, 36), np.float32)


def reshape(tensors):
    tensors[Q0] = np.ones((5, 36), np.float32)


def transpose(tensors):
    tensors[V1] = np.ascontiguousarray(tensors[V1].T)


def poison(tensors):
    tensors[V1][2, 1] = np.nan


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (drop, [f"missing {Q0} (3, 36)", f"missing {V1} (16, 3)"]),
        (add, [f"unexpected {Q0.replace('q_proj', 'k_proj')} (3, 36)"]),
        (reshape, [f"{Q0} has shape (5, 36), expected (3, 36)"]),
        (transpose, [f"{V1} has shape (3, 16), expected (16, 3)"]),
        (poison, [f"{V1} holds numbers that are not finite"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(adapter_directory, change, text):
    directory, params = adapter_directory
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    formats.read_adapter(directory, params)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        formats.read_adapter(directory, params)
    for line in (str(file), *text):
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(peft_type="LOHA"), "peft_type='LOHA' is not supported; these are: LORA, PROMPT"),
        (dict(peft_type=None), "peft_type=None is not supported"),
        (dict(use_dora=True), f"missing {Q0.replace('A.weight', 'magnitude_vector')} (48,)"),
        (dict(modules_to_save=["lm_head"]), "missing base_model.model.lm_head.weight (97, 36)"),
        (dict(lora_bias=True), "not supported: lora_bias=True"),
        (dict(init_lora_weights="olora"), "not supported: init_lora_weights='olora'"),
        (dict(init_lora_weights="pissa"), "not supported: init_lora_weights='pissa'"),
        (dict(layers_pattern="h"), "not supported: layers_pattern='h'"),
        (dict(some_new_field=3), "not supported: some_new_field=3"),
        (dict(r=None), "missing: r"),
        (dict(target_modules=None), "missing: target_modules"),
        (dict(lora_alpha="big"), "lora_alpha='big' is not a number"),
        (dict(rank_pattern={"q_proj": 2}), f"{Q0} has shape (3, 36), expected (2, 36)"),
        (dict(rank_pattern={"qproj": 2}), "rank_pattern['qproj'] matches no adapted module"),
        (dict(r=30), "rank=30 is larger than model.layers.0.self_attn.v_proj allows"),
    ],
    ids=str,
)
def test_settings_that_are_not_supported_are_named(adapter_directory, edit_json, changes, text):
    directory, params = adapter_directory
    edit_json(directory / "adapter_config.json", **changes)
    with pytest.raises(UserError) as caught:
        formats.read_adapter(directory, params)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (
            "adapter_config.json",
            None,
            "is no PEFT adapter directory: it has no adapter_config.json",
        ),
        ("adapter_config.json", b'{"peft_type": "LORA",', "adapter_config.json cannot be read"),
        ("adapter_config.json", b"\xff\xfe", "adapter_config.json cannot be read"),
        ("adapter_config.json", b"[]", "it must be a JSON object, not a list"),
        ("adapter_model.safetensors", None, "adapter_model.safetensors is missing"),
        ("adapter_model.safetensors", b"", "is not a readable safetensors file"),
        ("adapter_model.safetensors", 0.5, "is not a readable safetensors file"),
        ("adapter_model.safetensors", 0.99, "is not a readable safetensors file"),
    ],
)
def test_damaged_files_are_named(adapter_directory, name, content, text):
    directory, params = adapter_directory
    file = directory / name
    data = file.read_bytes()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(
            data[: int(len(data) * content)] if isinstance(content, float) else content
        )
    with pytest.raises(UserError) as caught:
        formats.read_adapter(directory, params)
    assert text in str(caught.value)
    assert str(directory) in str(caught.value)


def test_a_tied_head_is_no_target_without_a_decision(tiny_llama):
    """It is the embedding: an adapter on it would have to move both or to untie them."""
    directory, _ = tiny_llama(tie_word_embeddings=True)
    params = formats.describe(directory).params
    config = AdapterConfig(target_modules=["lm_head", "q_proj"])
    with pytest.raises(UserError, match="names lm_head, which is .* set ensure_weight_tying=true"):
        find_targets(params, config)
