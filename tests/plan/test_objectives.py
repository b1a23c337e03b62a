"""The step of an objective that compares answers: one base, and a few arrays more in the batch."""

import json

import pytest

from lora_jax import config as configs
from lora_jax.plan import analytic, compiled, program
from lora_jax.sharding import abstract_mesh

from ..train.tiny import TINY

ROWS, LENGTH = 4, 64


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 1}))

    def make(objective):
        train = {"objective": objective, "batch_size": ROWS, "remat": "none"}
        content = {"model": str(tmp_path), "data": {"max_length": LENGTH}, "train": train}
        return configs.parse(content | {"adapter": {"rank": 4}})

    return make


@pytest.mark.parametrize(("objective", "arrays"), [("dpo", 3), ("simpo", 2)])
def test_the_step_holds_one_base(settings, objective, arrays):
    """Its arguments are those of the cross-entropy and the arrays that name and score the pairs."""
    found = []
    for name in ("sft", objective):
        done = compiled.compile_here(settings(name))
        assert isinstance(done, compiled.Compiled)
        config, model = program.open_shapes(settings(name))
        built = program.build(config, model, abstract_mesh(config.mesh, 1))
        assert analytic.estimate(built, "cpu").arguments == done.arguments
        found.append(done.arguments)
    assert found[1] - found[0] == arrays * 4 * ROWS * LENGTH
