"""Every family trains on eight virtual devices as on one: a process of its own, read here.

A new family is one more line of `ON`. All rows on all meshes: see `sharded_families.py`.
"""

from pathlib import Path

import pytest

from lora_jax import models

from ..methods import QUICK
from ..towers import TOWERS

pytestmark = pytest.mark.slow

# Every family and every mesh; Llama on all meshes is in `tests/train/test_sharding.py`.
ON = {
    "llama, DoRA, NF4": "1x8x1",
    "mistral, prefix": "1x1x8",
    "qwen2, prompt": "8x1x1",
    "qwen3, splash": "1x1x8",
    "gemma": "2x2x2",
    "gemma2, splash": "2x2x2",
    "gemma3_text": "1x8x1",
    "gemma4_text": "2x2x2",
    "granite": "1x8x1",
    "phi3, longrope": "2x2x2",
    "gpt2, DoRA, all biases": "2x2x2",
    "olmo2": "2x2x2",
    "arcee": "1x8x1",
    "starcoder2": "2x2x2",
    "nemotron": "1x8x1",
    "phi": "2x2x2",
    "cohere": "2x2x2",
    "glm4": "1x8x1",
    "exaone4": "1x1x8",
    "ministral3": "1x8x1",
    "mixtral, router loss": "2x2x2",
    "qwen3_moe": "1x8x1",
    "gpt_oss, splash": "2x2x2",
    "lfm2": "2x2x2",
    "qwen3_next": "2x2x2",
    "qwen3_5_text": "1x8x1",
    "bert": "1x1x8",
    "roberta": "2x2x2",
    "distilbert": "1x8x1",
    "electra": "2x2x2",
    "modernbert": "1x1x8",
}


@pytest.fixture(scope="module")
def result(on_eight_devices):
    script = Path(__file__).with_name("sharded_families.py")
    rows = [f"{name}:{mesh}" for name, mesh in ON.items()]
    return on_eight_devices(script, *rows, flags=QUICK)


def test_every_family_has_a_row():
    """Families of the same modules and rules share one, and a tower has that of its text."""
    on = [models.FAMILIES[name.partition(",")[0]] for name in ON]
    for name, family in models.FAMILIES.items():
        if name in TOWERS:
            assert any(issubclass(family.Model, one.Model) for one in on), name
            continue
        assert any(family.Model is one.Model and family.RULES is one.RULES for one in on), family


@pytest.mark.parametrize("name", ON)
def test_eight_devices_compute_what_one_does(result, name):
    found = result[name]
    assert max(found[ON[name]]["distances"].values()) <= 1e-5, found
    assert found["moved"] > 0.01 and found["norm"] > 0.1
    assert found[ON[name]]["split"] > 5 or ON[name] == "8x1x1"
