"""Rotary settings as config.json files have them, against transformers reading the same fields."""

import copy

import numpy as np
import pytest
import transformers
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from lora_jax import UserError, models
from lora_jax.models.reader import ConfigReader
from lora_jax.models.rotary import RopeRules, read_rope
from lora_jax.nn import rope

from ..families import FAMILIES, FULL, SLIDING, describe

MODULES = {
    "llama": LlamaRotaryEmbedding,
    "phi3": Phi3RotaryEmbedding,
    "gemma3_text": Gemma3RotaryEmbedding,
}
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LINEAR = dict(rope_type="linear", factor=2.0)
PLAIN = dict(rope_type="default", rope_theta=777.0)
LISTS = dict(short_factor=[1.0, 1.5, 2.0], long_factor=[2.0, 3.0, 7.0])
LONGROPE = dict(rope_type="longrope", **LISTS)
BY_TYPE = dict(layer_types=[FULL, SLIDING, FULL], sliding_window=9)
# (family, fields)
READ = {
    "attn_factor": ("llama", dict(rope_parameters=YARN | dict(attn_factor=0.5))),
    "attn_factor of 1": ("llama", dict(rope_scaling=YARN | dict(attn_factor=1.0))),
    "attn_factor and attention_factor": (
        "llama",
        dict(rope_parameters=YARN | dict(attn_factor=0.5, attention_factor=0.7)),
    ),
    "attn_factor of longrope": (
        "phi3",
        dict(rope_scaling=LONGROPE | dict(attn_factor=2), original_max_position_embeddings=32),
    ),
    "finetuned": ("llama", dict(rope_scaling=dict(type="yarn", factor=4.0, finetuned=True))),
    "whole heads": ("llama", dict(rope_parameters=PLAIN | dict(partial_rotary_factor=1.0))),
    "whole heads, outside": ("llama", dict(partial_rotary_factor=1.0)),
    "a factor from lengths": ("llama", dict(rope_parameters=YARN | dict(factor=None))),
    "truncate null": ("llama", dict(rope_parameters=YARN | dict(truncate=None, beta_slow=0.4))),
    "two equal mappings": (
        "llama",
        dict(rope_scaling=YARN, rope_parameters=YARN | dict(rope_theta=500.0), rope_theta=500.0),
    ),
    "two equal mappings, one of old names": (
        "llama",
        dict(
            rope_scaling=dict(type="linear", factor=2, rope_theta=5.0),
            rope_parameters=LINEAR | dict(rope_theta=5.0),
        ),
    ),
    "an empty one": ("llama", dict(rope_scaling={}, rope_parameters=PLAIN)),
    "a null one": ("llama", dict(rope_scaling=None, rope_parameters=PLAIN)),
    "an empty new one": ("llama", dict(rope_scaling=LINEAR, rope_parameters={}, rope_theta=5.0)),
    "the inner theta": ("llama", dict(rope_parameters=PLAIN, rope_theta=5.0)),
    "the outer original length": (
        "llama",
        dict(rope_parameters=LLAMA3 | YARN | LLAMA3, original_max_position_embeddings=16),
    ),
    "the outer original length of phi 3": (
        "phi3",
        dict(
            rope_scaling=LONGROPE | dict(original_max_position_embeddings=64),
            original_max_position_embeddings=32,
        ),
    ),
    "by layer type, one null": (
        "gemma3_text",
        dict(rope_parameters={FULL: None, SLIDING: PLAIN}, rope_theta=3.0),
    ),
    "by layer type, the outer original length": (
        "gemma3_text",
        dict(rope_parameters={FULL: YARN}, original_max_position_embeddings=16),
    ),
    "by layer type, and an equal mapping": (
        "gemma3_text",
        dict(rope_parameters={FULL: LINEAR | PLAIN | LINEAR, SLIDING: PLAIN}, rope_scaling=LINEAR),
    ),
    "old fields of layer types": (
        "gemma3_text",
        dict(rope_scaling=LINEAR, rope_theta=500.0, rope_local_base_freq=50.0),
    ),
    "one mapping that says what is so": (
        "gemma3_text",
        dict(rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
    ),
}


@pytest.mark.parametrize(("family", "fields"), READ.values(), ids=READ)
def test_what_transformers_computes(family, fields):
    fields = FAMILIES[family].size | (BY_TYPE if family == "gemma3_text" else {}) | fields
    config = getattr(transformers, FAMILIES[family].config_class)(**copy.deepcopy(fields))
    module = MODULES[family](config)
    found = describe(family, **fields).config
    for kind, name in ((FULL, "full_attention_"), (SLIDING, "sliding_attention_")):
        prefix = name if family == "gemma3_text" else ""
        settings = found.rope_parameters[kind]
        inverse = rope.inverse_frequencies(rope.rotary_features(found.head_dim, settings), settings)
        expected = getattr(module, f"{prefix}inv_freq").numpy()
        np.testing.assert_allclose(inverse, expected, rtol=3e-7)
        scale = getattr(module, f"{prefix}attention_scaling")
        assert rope.attention_factor(settings) == pytest.approx(scale, rel=1e-12)


def read(fields, ignore=(), **options):
    reader = ConfigReader({"model_type": "llama", **fields}, ignore)
    return reader, read_rope(reader, 128, 6, RopeRules(**options))


def test_a_factor_that_is_not_read_is_noted():
    reader, found = read(dict(rope_parameters=YARN | dict(attn_factor=0.5)))
    assert found == read(dict(rope_parameters=YARN))[1]
    assert reader.notes == [
        "config.json: rope_parameters.attn_factor=0.5 is not read, as in transformers"
    ]
    reader, _ = read(dict(rope_scaling=YARN | dict(attn_factor=1, finetuned=None)))
    assert reader.notes == []


REFUSED = {
    "two mappings": (
        dict(rope_scaling=YARN, rope_parameters=YARN | dict(factor=8.0)),
        "rope_scaling and rope_parameters contradict each other in factor (4.0 and 8.0); "
        "transformers reads rope_scaling: leave one out, or name the wrong one in ignore_config_",
    ),
    "a theta that transformers leaves out": (
        dict(rope_scaling=LINEAR, rope_parameters=LINEAR | dict(rope_theta=777.0)),
        "contradict each other in rope_theta (10000.0 and 777.0)",
    ),
    "types": (
        dict(rope_scaling=LINEAR, rope_parameters=PLAIN, rope_theta=777.0),
        "contradict each other in factor (2.0 and None), rope_type (linear and default)",
    ),
    "a field": (
        dict(rope_scaling=LINEAR | dict(foo=3)),
        "not understood for rope_type='linear': foo; if they do not change results, set "
        "ignore_config_fields=[rope_scaling.foo]",
    ),
    "layer types": (
        dict(rope_parameters={FULL: PLAIN, SLIDING: LINEAR}),
        "rope_parameters by layer type (full_attention, sliding_attention) is not read for "
        "model_type='llama'; give one mapping for all layers",
    ),
    "part of a head": (dict(rope_parameters=PLAIN | dict(partial_rotary_factor=0.5)), "partial_"),
    "part of a head, outside": (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is"),
}


@pytest.mark.parametrize(("fields", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_refused(fields, text):
    with pytest.raises(UserError) as caught:
        describe("llama", **FAMILIES["llama"].size, **fields)
    assert text in str(caught.value)


REFUSED_BY_LAYER_TYPE = {
    "one mapping": (
        dict(rope_parameters=PLAIN),
        "are read by layer type for model_type='gemma3_text'; write them under full_attention",
    ),
    "two mappings": (
        dict(rope_scaling=LINEAR, rope_parameters={FULL: PLAIN | dict(rope_theta=1e6)}),
        "contradict each other in factor (2.0 and None), rope_type (linear and default)",
    ),
    "a field": (
        dict(rope_parameters={FULL: LINEAR | dict(foo=3)}),
        "ignore_config_fields=[rope_parameters.full_attention.foo]",
    ),
    "an old name": (
        dict(rope_scaling=dict(type="linear", factor=2.0)),
        "rope_scaling.type='linear' is not read for model_type='gemma3_text'; write rope_type",
    ),
    "truncate": (
        dict(rope_parameters={SLIDING: YARN | dict(truncate=None)}),
        "truncate of yarn is not read by layer type: it is true there; leave it out",
    ),
    "a field of old files": (
        dict(rope_scaling=LINEAR | dict(foo=3)),
        "ignore_config_fields=[rope_scaling.foo]",
    ),
}


@pytest.mark.parametrize(
    ("fields", "text"), REFUSED_BY_LAYER_TYPE.values(), ids=REFUSED_BY_LAYER_TYPE
)
def test_what_is_not_read_by_layer_type_is_refused(fields, text):
    with pytest.raises(UserError) as caught:
        describe("gemma3_text", **FAMILIES["gemma3_text"].size, **fields)
    assert text in str(caught.value)


IGNORED = {
    "rope_parameters.foo": ("llama", dict(rope_parameters=PLAIN | dict(foo=3)), PLAIN),
    "rope_scaling.factor": ("llama", dict(rope_scaling=PLAIN | dict(factor=3.0)), PLAIN),
    "rope_parameters.attn_factor": (
        "llama",
        dict(rope_parameters=YARN | dict(attn_factor=3)),
        YARN,
    ),
    "rope_scaling": ("llama", dict(rope_scaling=YARN, rope_parameters=PLAIN), PLAIN),
    "rope_parameters": ("llama", dict(rope_scaling=YARN, rope_parameters=PLAIN), YARN),
    "rope_parameters.full_attention.foo": (
        "gemma3_text",
        dict(rope_parameters={FULL: PLAIN | dict(foo=3), SLIDING: PLAIN}),
        {FULL: PLAIN, SLIDING: PLAIN},
    ),
}


@pytest.mark.parametrize("name", IGNORED)
def test_nested_fields_can_be_ignored(name):
    family, fields, plain = IGNORED[name]
    size = {"model_type": family} | FAMILIES[family].size
    found = models.describe(size | fields, [name]).config
    assert found == models.describe(size | dict(rope_parameters=plain)).config


def test_a_head_too_small_for_dynamic():
    fields = dict(rope_parameters=dict(rope_type="dynamic", factor=2.0), head_dim=2)
    with pytest.raises(UserError, match="rope_type='dynamic' needs two pairs of features"):
        describe("llama", **FAMILIES["llama"].size | fields)
