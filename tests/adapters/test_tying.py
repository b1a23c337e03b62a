"""Embeddings and heads that share an array, and rows of tokens."""

import dataclasses

import numpy as np
import pytest

from lora_jax import lora
from lora_jax.adapters import low_rank as low_rank
from lora_jax.targets import find_trainable
from lora_jax.weights import LoraWeight, Untied

from ..methods import ROWS, names_of, stirred
from ..test_methods import start

SIDES = [
    ({"modules_to_save": ["embed_tokens"]}, "head"),
    ({"modules_to_save": ["lm_head"], "ensure_weight_tying": False}, "embed"),
    ({"target_modules": ["embed_tokens"]}, "head"),
    ({"target_modules": ["lm_head"], "ensure_weight_tying": False}, "embed"),
]


@pytest.mark.parametrize(("fields", "plain"), SIDES, ids=[names_of(f) for f, _ in SIDES])
def test_an_untied_embedding_shares_what_is_not_adapted(fields, plain):
    row = dataclasses.replace(ROWS["LoRA"], fields=fields, tied=True)
    model, base, adapters = start(row, 0)
    embedding = base["model"]["embed_tokens"]["embedding"]
    assert base is model.params
    bound = lora.bind(base, stirred(base, adapters, row.config, 0), row.config)
    leaf = bound["model"]["embed_tokens"]["embedding"]
    assert isinstance(leaf, Untied)
    assert getattr(leaf, plain) is embedding
    other = getattr(leaf, "embed" if plain == "head" else "head")
    if isinstance(other, LoraWeight):
        assert other.base is embedding
    assert "lm_head" not in bound
    merged = lora.merge(bound)["model"]["embed_tokens"]["embedding"]
    assert getattr(merged, plain) is embedding
    difference = np.abs(np.asarray(merged.embed) - np.asarray(merged.head)).max()
    assert difference > 1e-2


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [1, 2]},
        {"method": "full"},
    ],
    ids=names_of,
)
def test_a_tied_embedding_stays_one_leaf_however_it_is_named(fields):
    row = dataclasses.replace(ROWS["LoRA"], fields=fields, tied=True)
    model, base, adapters = start(row, 0)
    assert "lm_head" not in adapters
    bound = lora.bind(base, adapters, row.config)
    assert not isinstance(bound["model"]["embed_tokens"]["embedding"], Untied)
    merged = lora.merge(bound)["model"]["embed_tokens"]["embedding"]
    assert merged.shape == model.params["model"]["embed_tokens"]["embedding"].shape
    # One set of numbers however it is named.
    found = find_trainable(model.params, row.config)
    parts = [*found.targets, *found.whole]
    paths = [(*p.path, p.leaf) if hasattr(p, "leaf") else p.path for p in parts]
    assert len(paths) == len(set(paths))


def test_rows_of_tokens_alone_change(error):
    """The others keep their bits, in the embedding and in the tied head."""
    row = ROWS["tokens, tied"]
    model, base, adapters = start(row, 0)
    moved = stirred(base, adapters, row.config, 0)
    merged = lora.merge(lora.bind(base, moved, row.config))["model"]["embed_tokens"]["embedding"]
    original = np.asarray(base["model"]["embed_tokens"]["embedding"])
    indices = row.config.trainable_token_indices
    others = [i for i in range(97) if i not in indices]
    assert np.asarray(merged)[others].tobytes() == original[others].tobytes()
    trained = moved["model"]["embed_tokens"]["trainable_tokens"]
    assert error(np.asarray(merged)[indices], trained) <= 1e-6
