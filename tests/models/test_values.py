"""Values in config.json that no model can compute with are refused by name."""

import json

import pytest

from lora_jax import formats
from lora_jax.errors import UserError


def write(directory, **fields):
    """Write a config.json of a tiny Llama; NaN and Infinity are written as json does."""
    content = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    (directory / "config.json").write_text(json.dumps(content | fields))
    return directory


NAN, INF = float("nan"), float("inf")
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(rms_norm_eps=NAN), "NaN is not a JSON number"),
        (dict(rms_norm_eps=INF), "Infinity is not a JSON number"),
        (dict(rms_norm_eps=10**400), "is too large for an integer"),
        (dict(rms_norm_eps=-1e-5), "rms_norm_eps=-1e-05 is below 0"),
        (dict(rope_theta=NAN), "NaN is not a JSON number"),
        (dict(rope_theta=INF), "Infinity is not a JSON number"),
        (dict(rope_theta=0), "rope_theta=0"),
        (dict(rope_theta=-1e4), "rope_theta=-10000.0 is not above 0"),
        (dict(rope_scaling=LINEAR | {"factor": INF}), "Infinity is not a JSON number"),
        (dict(rope_scaling=LINEAR | {"factor": NAN}), "NaN is not a JSON number"),
        (dict(rope_scaling=LINEAR | {"factor": 10**400}), "is too large for an integer"),
        (dict(rope_scaling=LINEAR | {"factor": 0}), "factor=0 is not above 0"),
        (dict(num_attention_heads=0), "num_attention_heads=0 is below 1"),
        (dict(num_key_value_heads=0), "num_key_value_heads=0 is below 1"),
        (dict(head_dim=0), "head_dim=0 is below 1"),
        (dict(attention_dropout=NAN), "NaN is not a JSON number"),
        (dict(attention_dropout=-0.1), "attention_dropout=-0.1 is not a number from 0 to 1"),
        (dict(attention_dropout=2), "attention_dropout=2 is not a number from 0 to 1"),
        (dict(attention_dropout="x"), "attention_dropout='x' is not a number from 0 to 1"),
    ],
)
def test_values_of_a_decoder(tmp_path, fields, expected):
    with pytest.raises(UserError) as raised:
        formats.describe(write(tmp_path, **fields), ())
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((INF, "Infinity is not a JSON number"), (NAN, "NaN is not a JSON number")),
        *((0, "final_logit_softcapping=0 is not "), (-1, "final_logit_softcapping=-1 is not ")),
    ],
)
def test_softcaps(tmp_path, value, expected):
    fields = dict(model_type="gemma2", head_dim=8, final_logit_softcapping=value)
    with pytest.raises(UserError, match=expected):
        formats.describe(write(tmp_path, **fields), ())


@pytest.mark.parametrize("value", [0, 1e-12, 0.5])
def test_small_values_are_read(tmp_path, value):
    model = formats.describe(write(tmp_path, rms_norm_eps=value, attention_dropout=value), ())
    assert model.config.rms_norm_eps == value
