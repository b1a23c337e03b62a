"""Fields of config.json against transformers: values that are refused change its numbers, values
that are accepted do not.
"""

import numpy as np
import pytest
import torch
import transformers

from lora_jax import UserError, formats, models

from ..encoders import ENCODERS
from ..families import ALIASES, FAMILIES, FULL, SLIDING, torch_model
from ..models.test_reader import PUBLISHED

ALL = FAMILIES | ALIASES
TOKENS = np.random.default_rng(0).integers(1, 97, (2, 24))


def make(family, **fields):
    """A torch model whose weights do not depend on `fields`."""
    if family in ALL:
        return torch_model(family, 0, ALL[family].size | fields)
    config = transformers.AutoConfig.for_model(family, **ENCODERS[family].fields | fields)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def logits(model):
    inputs = {} if model.config.model_type in models.CLASSIFIERS else {"use_cache": False}
    with torch.no_grad():
        return model(torch.tensor(TOKENS), **inputs).logits.numpy()


REFUSED = [
    # The layers of nemotron do not hand it on to attention.
    *((family, {"is_causal": False}) for family in ALL if family != "nemotron"),
    *((family, {"is_causal": True}) for family in models.CLASSIFIERS),
    # Null is as false, where the mask is written out.
    ("gemma2", {"is_causal": None}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("gpt2", {"num_hidden_layers": 2}),
]


@pytest.mark.parametrize(("family", "fields"), REFUSED, ids=str)
def test_values_that_are_refused_change_the_numbers(error, family, fields):
    found, plain = logits(make(family, **fields)), logits(make(family))
    assert error(found, plain) > 1e-3
    size = ALL[family].size if family in ALL else ENCODERS[family].fields
    (name,) = fields
    with pytest.raises(UserError, match=f"{name}="):
        models.describe({"model_type": family, **size, **fields})


@pytest.mark.parametrize("family", PUBLISHED)
def test_fields_of_published_models_do_not(error, family):
    unread = {"quantization_config", "torch_dtype"}  # of loading
    fields = {name: value for name, value in PUBLISHED[family].items() if name not in unread}
    assert error(logits(make(family, **fields)), logits(make(family))) < 1e-6


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("mistral", dict(sliding_window=5)),
        ("mistral", dict(sliding_window=None)),
        ("phi3", dict(sliding_window=5)),
    ],
    ids=str,
)
def test_layer_types_that_transformers_does_not_read(tiny_model, error, family, fields):
    fields = ALL[family].size | fields | dict(layer_types=[FULL, SLIDING, FULL])
    directory, oracle = tiny_model(family, **fields)
    model = formats.load(directory)
    assert "layer_types is not read" in model.notes[0]
    assert error(model.apply(model.params, TOKENS.astype(np.int32)), logits(oracle)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_noise_in_training_is_left_out(error, family):
    """In evaluation transformers leaves it out, too."""
    names = {"llama": "attention_dropout", "gpt2": "resid_pdrop", "bert": "hidden_dropout_prob"}
    assert error(logits(make(family, **{names[family]: 0.5})), logits(make(family))) == 0
