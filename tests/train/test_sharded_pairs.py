"""DPO on eight virtual devices in another order and grouping, and on one."""

import math
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(on_eight_devices):
    return on_eight_devices(Path(__file__).with_name("sharded_pairs.py"))


@pytest.mark.parametrize("mesh", ["permuted", "regrouped", "one device", "shared"])
@pytest.mark.parametrize("init", ["default", "zero_a"])
def test_curves_stay_together(result, init, mesh):
    found = result[init]
    assert found["losses"][0] == pytest.approx(math.log(2), abs=1e-7)
    assert found["losses"][0] - found["losses"][-1] > 0.02
    assert found[mesh]["losses"] <= 1e-6
    assert found[mesh]["adapters"] <= 1e-5
