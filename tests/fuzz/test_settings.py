"""Settings at random end in a config or in one clear error."""

import pytest

from lora_jax import config as configs
from lora_jax.errors import UserError

from .settings import cases

pytestmark = pytest.mark.slow
LONGEST = 12_000  # characters of a message


@pytest.mark.parametrize("seed", range(4))
def test_settings_are_read_or_refused(tmp_path, seed):
    file = tmp_path / "config.yaml"
    read = refused = 0
    for text, overrides in cases(seed, 500):
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            config = configs.load(file, overrides)
        except UserError as error:
            refused += 1
            assert 0 < len(str(error)) < LONGEST, (text, overrides)
            str(error).encode()
            continue
        read += 1
        file.write_text(configs.dump(config), encoding="utf-8")
        assert configs.load(file) == config, (text, overrides)
    assert read > 10 and refused > 100
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
