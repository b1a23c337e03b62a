"""The packaged BERT encoder, all-MiniLM-L6-v2, against transformers on real text."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lora_jax import formats

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("optimised")]
TEXTS = [
    ("The Punter is an Italian restaurant near Rainbow Vegetarian Café, in the city centre.",),
    ("Parker & Sons Ltd",),
    (
        "Does it rain in Oslo?",
        "It rained there all through the winter of 1903, and then it stopped.",
    ),
]


def test_pooled_features_equal_transformers(error):
    directory = formats.resolve("demo:all-minilm-l6-v2")
    model = formats.load(directory, labels=["a", "b"])
    assert formats.missing_heads(directory, model) == ("classifier",)
    oracle = transformers.BertModel.from_pretrained(directory).eval()
    tokenizer = formats.load_tokenizer(directory)
    module = model.module(model.params)
    for texts in TEXTS:
        inputs = tokenizer(*texts, return_tensors="np")
        with torch.no_grad():
            given = {name: torch.tensor(value) for name, value in inputs.items()}
            expected = oracle(**given).pooler_output.numpy()
        tokens = jnp.asarray(inputs["input_ids"])
        pooled, _ = module.hidden(
            tokens,
            positions=jnp.arange(tokens.shape[1])[None],
            segment_ids=jnp.ones_like(tokens),
            token_types=jnp.asarray(inputs["token_type_ids"]),
        )
        assert np.abs(expected).max() > 0.1
        assert error(pooled[:, 0], expected) < 1e-5
