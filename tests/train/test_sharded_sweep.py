"""A sweep on eight virtual devices and on one."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(on_eight_devices):
    return on_eight_devices(Path(__file__).with_name("sharded_sweep.py"))


@pytest.mark.parametrize("axes", ["(2, 2, 2)", "(8, 1, 1)", "(1, 8, 1)"])
def test_members_are_the_same_on_any_mesh(result, axes):
    assert result[axes]["losses"] <= 1e-5
    assert result[axes]["adapters"] <= 1e-5
    assert result[axes]["programs"] == 1
