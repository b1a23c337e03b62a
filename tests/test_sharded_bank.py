"""Banks on eight virtual devices: a process of its own, read here."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_eight_devices_compute_what_one_does(on_eight_devices):
    result = on_eight_devices(Path(__file__).with_name("sharded_bank.py"))
    assert set(result) == {"qwen2", "mixtral", "gpt2", "phi3"}
    for found in result.values():
        assert found["distance"] <= 1e-5 < 0.1 < found["moved"], result
        assert found["programs"] == 1 and found["stays"] and found["split"] > 0.3, result
    assert sum(found["base"] for found in result.values()) >= 3  # of the same program but for sums
