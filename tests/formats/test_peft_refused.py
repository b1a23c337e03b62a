"""PEFT directories that cannot be read, and what their errors name."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import AdapterConfig, UserError, formats

from .test_peft import (
    AS_ONE,
    BIASED,
    EMBED_A,
    EMBED_B,
    HEAD_A,
    HEAD_B,
    QV,
    TIED,
    UNTIED,
    P,
    make_fields,
    random_adapters,
)


@pytest.fixture
def written(tiny_llama, tmp_path):
    """`written(base, **fields)`: a directory that we wrote, and the shapes of its model."""

    def write(base, **fields):
        directory, _ = tiny_llama(**base)
        params = formats.describe(directory).params
        config = AdapterConfig(**make_fields(fields))
        adapters = random_adapters(formats.load(directory).params, config, 0)
        target = tmp_path / "adapter"
        formats.write_adapter(target, adapters, params, config, base_model="org/base")
        return target, params

    return write


@pytest.mark.parametrize(
    ("base", "fields", "changes", "text"),
    [
        (
            TIED,
            AS_ONE,
            dict(use_dora=True),
            "use_dora=True with ensure_weight_tying=True, by which PEFT gives model.embed_tokens",
        ),
        (
            TIED,
            AS_ONE,
            dict(rank_pattern={"embed_tokens": 2}),
            "rank_pattern={'embed_tokens': 2} with ensure_weight_tying=True: model.embed_tokens "
            "has 2 and lm_head 4",
        ),
        (
            TIED,
            AS_ONE,
            dict(alpha_pattern={"lm_head": 3}),
            "model.embed_tokens has 6.0 and lm_head 3.0, so that they part",
        ),
        (TIED, AS_ONE, dict(ensure_weight_tying=False), f"unexpected {HEAD_A} (4, 36)"),
        (UNTIED, {}, dict(modules_to_save="lm_head"), "modules_to_save='lm_head' is not a list"),
        (UNTIED, {}, dict(trainable_token_indices=5), "trainable_token_indices=5 is not a list"),
        (UNTIED, {}, dict(trainable_token_indices=["a"]), "indices=['a'] is no list of tokens"),
        (
            UNTIED,
            {},
            dict(trainable_token_indices={"lm_head": [1]}),
            "trainable_token_indices={'lm_head': [1]}; tokens train in model.embed_tokens",
        ),
        (
            TIED,
            {},
            dict(trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}),
            "tokens train in model.embed_tokens and lm_head, the same in each",
        ),
        (TIED, {}, dict(bias="some"), "bias='some' is not one of: none, lora_only, all"),
        (UNTIED, {}, dict(use_dora=True), "missing base_model.model.model.layers.0.mlp.down_proj"),
        (
            UNTIED,
            {},
            dict(modules_to_save=["lm_head"]),
            f"missing {P}lm_head.weight (97, 36)",
        ),
        (
            UNTIED,
            {},
            dict(trainable_token_indices=[1, 2]),
            f"missing {P}model.embed_tokens.token_adapter.trainable_tokens_delta (2, 36)",
        ),
        (BIASED, {}, dict(bias="all"), ".down_proj.base_layer.bias (36,)"),
        (TIED, AS_ONE, dict(target_modules="(embed_tokens"), "is not a valid regex"),
        (
            UNTIED,
            {},
            dict(init_lora_weights="OLoRA"),
            "init_lora_weights='OLoRA', after which an adapter belongs to a base without its first",
        ),
        (UNTIED, {}, dict(init_lora_weights="loftq"), "not supported: init_lora_weights='loftq'"),
        (UNTIED, {}, dict(lora_bias=True), "not supported: lora_bias=True"),
        (UNTIED, {}, dict(target_parameters=["x"]), "not supported: target_parameters=['x']"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_settings_that_cannot_be_read_are_named(written, edit_json, base, fields, changes, text):
    directory, params = written(base, **fields)
    formats.read_adapter(directory, params)
    edit_json(directory / "adapter_config.json", **changes)
    with pytest.raises(UserError) as caught:
        formats.read_adapter(directory, params)
    assert text in str(caught.value)
    assert str(directory) in str(caught.value)


def test_values_of_a_type_that_peft_never_writes_are_named(written, edit_json):
    """Python would make a rank of true, "8" or 8.5, and true of the text "false"."""
    directory, params = written(UNTIED)
    file = directory / "adapter_config.json"
    whole = file.read_bytes()
    for changes, text in (
        (dict(r=True), "r=True is not an integer"),
        (dict(r="8"), "r='8' is not an integer"),
        (dict(r=8.5), "r=8.5 is not an integer"),
        (dict(r=[[1]]), "r=[[1]] is not an integer"),
        (dict(r=-1), "rank=-1 must be at least 1"),
        (dict(r=float("inf")), "Infinity is not a JSON number"),
        (dict(lora_alpha=10**400), "is too large for an integer"),
        (dict(lora_alpha=True), "lora_alpha=True is not a number"),
        (dict(lora_dropout="0"), "lora_dropout='0' is not a number"),
        (dict(use_dora="false"), "use_dora='false' is not true or false"),
        (dict(target_modules={}), "target_modules={} is not a string or a list"),
        (dict(target_modules=[1]), "target_modules has an entry that is not a string: 1"),
        (dict(target_modules=[["a"]]), "target_modules has an entry that is not a string: ['a']"),
        (dict(target_modules=None), "missing: target_modules"),
        (dict(target_modules=[]), "target_modules=[]"),
        (dict(rank_pattern=[1]), "rank_pattern=[1] is not an object"),
        (dict(rank_pattern={"q_proj": "2"}), "rank_pattern['q_proj']='2' is not an integer"),
        (dict(alpha_pattern={"q_proj": None}), "alpha_pattern['q_proj']=None is not a number"),
        (dict(bias={}), "bias={} is not a string"),
        (dict(target_modules=["é" * 10**6]), "target_modules"),
    ):
        edit_json(file, **changes)
        with pytest.raises(UserError) as caught:
            formats.read_adapter(directory, params)
        assert text in str(caught.value) and str(file) in str(caught.value)
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("base", "fields", "key", "other"),
    [
        (TIED, AS_ONE, HEAD_A, EMBED_B),
        (TIED, AS_ONE, HEAD_B, EMBED_A),
        (
            TIED,
            dict(target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
            f"{P}lm_head.weight",
            f"{P}model.embed_tokens.weight",
        ),
    ],
)
def test_a_tied_head_that_differs_from_its_embedding_is_named(written, base, fields, key, other):
    directory, params = written(base, **fields)
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[key][1, 2] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{key} does not hold the numbers of {other}"):
        formats.read_adapter(directory, params)


def test_every_kind_of_tensor_that_does_not_fit_is_named(written):
    fields = dict(use_dora=True, modules_to_save=["lm_head"], trainable_token_indices=[3, 4])
    directory, params = written(BIASED, target_modules=["q_proj"], bias="all", **fields)
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    attention = f"{P}model.layers.1.self_attn"
    rows = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors[f"{attention}.q_proj.bias"] = tensors.pop(f"{attention}.q_proj.base_layer.bias")
    tensors[f"{attention}.k_proj.bias"][0] = np.inf
    tensors[f"{attention}.q_proj.lora_magnitude_vector"] = np.ones((1, 48), np.float32)
    tensors[rows] = tensors[rows][:1]
    tensors[f"{P}lm_head.weight"] = np.ascontiguousarray(tensors[f"{P}lm_head.weight"].T)
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        formats.read_adapter(directory, params)
    for text in (
        f"missing {attention}.q_proj.base_layer.bias (48,)",
        f"unexpected {attention}.q_proj.bias (48,)",
        f"{attention}.k_proj.bias holds numbers that are not finite",
        f"{attention}.q_proj.lora_magnitude_vector has shape (1, 48), expected (48,)",
        f"{rows} has shape (1, 36), expected (2, 36)",
        f"{P}lm_head.weight has shape (36, 97), expected (97, 36)",
    ):
        assert text in str(caught.value)
