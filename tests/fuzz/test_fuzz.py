"""What comes from outside works or ends in one clear error (`watch` says what is checked)."""

import pytest

from . import watch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("module", "count"), [("directories", 2000), ("rows", 20_000), ("templates", 200)]
)
def test_fuzzed(module, count):
    problems, counts = watch.run(f"tests.fuzz.{module}", count)
    assert not problems, f"seed {watch.SEED}\n" + "\n".join(problems)
    assert min(counts.values()) > 0.01 * sum(counts.values()), counts
