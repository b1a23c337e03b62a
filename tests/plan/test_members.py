"""Plans of the members of a sweep."""

import dataclasses

from lora_jax import plan as planning
from lora_jax.plan.analytic import Estimate
from lora_jax.plan.members import find_members, members_text

from ..train.tiny import make_config, write_model

ZEROS = {field.name: 0 for field in dataclasses.fields(Estimate)}


def estimate(**given):
    return Estimate(**(ZEROS | given))


def test_members_share_the_base_and_nothing_else():
    one = estimate(base=1000, weights=50, adapters=10, optimizer=20, batch=5, gradients=15)
    found = find_members(None, dataclasses.replace(one, kept=30, layer=8, logits=12), 4, 1500)
    assert (found.shared, found.arguments, found.temporaries) == (1050, 35, 57)
    assert found.total == 1050 + 4 * 92
    assert found.largest == (1500 - 1050) // 92 == 4 and found.fits
    assert find_members(None, one, 1, 100).largest == 0
    assert "4 members fit" in members_text(found, 1500)


def test_the_plan_of_a_topology_knows_members(tmp_path):
    config = make_config(f"model={write_model(tmp_path / 'model')}", "train.batch_size=4")
    options = planning.PlanOptions(topology="v5p:2x2x1", compiles=False, members=8)
    shown = []
    found = planning.plan(config, options, shown.append)["members"]
    assert found["count"] == 8 and found["fits"] is True
    assert found["total"] == found["shared"] + 8 * (found["arguments"] + found["temporaries"])
    assert found["roofline"]["seconds"] > 0
    assert any("a sweep of 8 members" in text for text in shown)
