"""The engine and its bank on eight devices as on one."""

from pathlib import Path

import pytest

FAMILIES = ["llama", "gemma2", "gpt2", "mixtral"]


@pytest.fixture(scope="module")
def result(on_eight_devices):
    return on_eight_devices(Path(__file__).with_name("sharded_engine.py"), *FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_on_eight_devices_are_those_on_one(result, error, family):
    alone = result[family].pop("1x1x1")
    assert len({tuple(answer) for answer in alone["answers"]}) > 3
    for mesh, found in result[family].items():
        assert found["answers"] == alone["answers"], mesh
        for one, other in zip(found["log_probs"], alone["log_probs"], strict=True):
            assert error(one, other) < 1e-5
        assert found["programs"][0] == found["programs"][1]
        assert found["programs"] == alone["programs"]
