"""Plans of the members of a sweep."""

import pytest

from lora_jax import plan as planning
from lora_jax import sharding
from lora_jax.plan.analytic import estimate
from lora_jax.plan.members import find_members, members_text
from lora_jax.plan.program import build, open_shapes

from ..train.tiny import make_config, write_model


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("members") / "model", vocab_size=4096)
    config = make_config(f"model={model}", "train.batch_size=4", "data.max_length=512")
    settled, shapes = open_shapes(config)
    return build(settled, shapes, sharding.abstract_mesh(settled.mesh, 1))


def test_members_share_the_base_and_the_logits(program):
    alone = estimate(program, "tpu")
    assert alone.logits > 2 * alone.layer
    one, eight = (find_members(program, "tpu", count, None) for count in (1, 8))
    assert one.shared == eight.shared == alone.base + alone.weights
    assert one.arguments == eight.arguments == alone.adapters + alone.optimizer + alone.batch
    assert one.temporaries == alone.temporaries - alone.weights
    assert alone.kept < eight.temporaries - alone.gradients < alone.kept + alone.logits
    assert one.total < eight.total < one.shared + 8 * one.each


def test_the_most_members_that_fit(program):
    for count in (1, 5, 40):
        room = find_members(program, "tpu", count, None).total
        assert find_members(program, "tpu", 1, room).largest == count
        found = find_members(program, "tpu", count, room - 1)
        assert found.largest == count - 1 and not found.fits
        assert f"{count - 1} members fit" in members_text(found, room - 1)


def test_the_plan_of_a_topology_knows_members(tmp_path):
    config = make_config(f"model={write_model(tmp_path / 'model')}", "train.batch_size=4")
    options = planning.PlanOptions(topology="v5p:2x2x1", compiles=False, members=8)
    shown = []
    found = planning.plan(config, options, shown.append)["members"]
    assert found["count"] == 8 and found["fits"] is True
    assert found["total"] == found["shared"] + 8 * (found["arguments"] + found["temporaries"])
    assert found["roofline"]["seconds"] > 0
    assert any("a sweep of 8 members" in text for text in shown)
