"""Tiny random models of transformers as files, and the one measure of distance. Torch is imported
only when asked for.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

# No two axes are equal: vocabulary, hidden, intermediate, queries (6 x 8), keys (2 x 8).
TINY = dict(
    vocab_size=97,
    hidden_size=36,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)


@pytest.fixture(scope="session")
def error():
    """`error(x, y)`: max|x - y| / max(1, max|y|), y being the oracle; infinite where a number is
    not finite.
    """

    def measure(x, y) -> float:
        x, y = (np.asarray(value, np.float64) for value in (x, y))
        assert x.shape == y.shape, f"shapes {x.shape} and {y.shape}"
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            return float("inf")
        return float(np.abs(x - y).max() / max(1.0, np.abs(y).max()))

    return measure


@pytest.fixture
def tiny_llama(tmp_path):
    """`tiny_llama(seed=0, family="llama", dtype="float32", **config)`: a directory of transformers
    with every parameter random (norms and biases too), and the torch model in float32 with those
    very weights.
    """
    import torch
    import transformers

    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    }

    def make(seed=0, family="llama", dtype="float32", max_shard_size="1GB", **config):
        config_class, model_class = classes[family]
        model = model_class(config_class(**TINY | config)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith("norm.weight"):
                    parameter.copy_(1 + 0.3 * noise)
                elif name.endswith("bias"):
                    parameter.copy_(0.3 * noise)
                else:
                    parameter.copy_(
                        noise * (0.3 if "embed" in name else parameter.shape[1] ** -0.5)
                    )
        count = len(list(tmp_path.glob("model*")))
        directory = tmp_path / f"model{count}"
        stored = copy.deepcopy(model).to(getattr(torch, dtype))
        stored.save_pretrained(directory, max_shard_size=max_shard_size)
        with torch.no_grad():  # not model.to: that would round the rotary frequencies too
            for parameter, rounded in zip(model.parameters(), stored.parameters(), strict=True):
                parameter.copy_(rounded)
        return directory, model

    return make


@pytest.fixture
def edit_json():
    """`edit_json(file, drop=[...], key=value, ...)` rewrites a JSON object."""

    def edit(file: Path, drop=(), **changes) -> dict:
        content = json.loads(file.read_text())
        content = {key: value for key, value in content.items() if key not in drop} | changes
        file.write_text(json.dumps(content))
        return content

    return edit
