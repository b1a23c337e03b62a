"""A matrix read alone is that of the model read whole."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import UserError, formats
from lora_jax.tree import flatten, lead_axes

from ..families import FAMILIES, random_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "bert"])
def test_every_matrix_is_that_of_its_leaf(tmp_path, family):
    fields = FAMILIES[family].size if family in FAMILIES else BERT
    model = random_model(family, **fields)
    formats.write_model(tmp_path / "model", model, model.params, tmp_path)
    with formats.open_matrices(tmp_path / "model", model) as read:
        for path, leaf in flatten(model.params).items():
            for index in np.ndindex(leaf.shape[: lead_axes(path)]):
                found = read(path, index)
                assert found.dtype == np.float32
                np.testing.assert_array_equal(found, np.asarray(leaf[index]))


BERT = dict(
    vocab_size=97,
    hidden_size=36,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    max_position_embeddings=64,
    type_vocab_size=2,
)


def test_files_that_do_not_fit_and_heads_that_they_lack(tmp_path):
    model = random_model("bert", **BERT)
    formats.write_model(tmp_path / "model", model, model.params, tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    kept = {name: value for name, value in tensors.items() if not name.startswith("classifier.")}
    save_file(kept, file)
    with formats.open_matrices(tmp_path / "model", model) as read:
        read(("bert", "pooler", "dense", "kernel"), ())
        with pytest.raises(UserError, match="has no classifier.kernel.*add up to 1"):
            read(("classifier", "kernel"), ())
    name = next(name for name in kept if "embeddings" in name)
    save_file({k: v for k, v in kept.items() if k != name}, file)
    with (
        pytest.raises(UserError, match="missing"),
        formats.open_matrices(tmp_path / "model", model),
    ):
        pass
