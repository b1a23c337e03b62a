"""Heads of several sizes, shared keys and values: runs, cache, and fields of config.json."""

import jax.numpy as jnp
import pytest

from lora_jax import AdapterConfig, UserError, models
from lora_jax.models import stacks
from lora_jax.targets import find_trainable

from ..families import FAMILIES, FULL, SLIDING, describe

ROW = FAMILIES["gemma4_text"]
SAME, SHARED = (ROW.size | ROW.variants[name] for name in list(ROW.variants)[:2])


def test_a_layer_that_others_share_is_a_run_of_its_own():
    found = list(stacks.runs(describe("gemma4_text", **SHARED).config))
    assert [run.layers for run in found] == [(i, i + 1) for i in range(6)]
    assert [run.source for run in found] == [None, None, None, 1, 2, 1]
    assert [run.is_source for run in found] == [False, True, True, False, False, False]
    assert [(run.group, run.cached) for run in found[:3]] == [(0, 0), (1, 0), (0, 1)]


def test_the_cache_has_arrays_for_heads_of_each_shape():
    cache = describe("gemma4_text", **SAME).empty_cache(2, 7, jnp.float32)
    assert [each.shape for each in cache.keys] == [(4, 2, 2, 7, 8), (2, 2, 1, 7, 12)]
    assert cache.slots == 7
    shared = describe("gemma4_text", **SHARED).empty_cache(2, 7, jnp.float32)
    assert [len(each) for each in shared.values] == [2, 1]


@pytest.mark.parametrize("key", ["1", "01"])  # of 10 layers and more, transformers writes 01
def test_head_sizes_of_both_forms_of_config_json(key):
    own = {"head_dim": 12, "num_key_value_heads": 1}
    other = SAME | {"per_layer_config": {key: own, "5": own}}
    other = {k: v for k, v in other.items() if "global" not in k}
    assert describe("gemma4_text", **other).config == describe("gemma4_text", **SAME).config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"enable_moe_block": True}, "enable_moe_block=True is not supported.*experts"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ({"num_kv_shared_layers": 5}, "num_kv_shared_layers=5: of 6 layers"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config=.* is not supported"),
        ({"per_layer_config": {"1": {"rms_norm_eps": 4}}}, "per_layer_config=.* is not supported"),
        ({"rope_theta": 5.0}, "rope_theta=5.0.*by layer type"),
        (
            {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 3},
            "vocab_size_per_layer_input=3 is below vocab_size=97",
        ),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        describe("gemma4_text", **SAME | fields)


def test_the_last_layer_has_full_attention():
    model = describe("gemma4_text", **SAME | {"layer_types": [FULL] + [SLIDING] * 5})
    assert model.config.layer_types[-1] == FULL
    assert any("last layer" in note for note in model.notes)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_have_no_inputs_of_layers(method):
    config = AdapterConfig(method=method, num_virtual_tokens=2, prompt_init="random")
    with pytest.raises(UserError, match=f"method={method}: layers of the model") as caught:
        find_trainable(describe("gemma4_text", **SHARED).params, config)
    assert "method=prompt works" not in str(caught.value)


def test_tensors_of_shared_keys_are_not_weights():
    names = models.describe({"model_type": "gemma4_text", **SHARED}).names
    assert r"(3|4|5)\.self_attn" in names.no_weights
