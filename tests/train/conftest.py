"""Fixtures of runs: a cache of their own, and a directory with a model, rows and a config."""

from pathlib import Path

import pytest

from .tiny import write_model, write_rows


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenised examples of these tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """A directory with `model`, `rows.jsonl` and `run.yaml`, a config that names both."""
    directory = tmp_path_factory.mktemp("files")
    write_model(directory / "model")
    rows = write_rows(directory / "rows.jsonl")
    (directory / "run.yaml").write_text(
        f"model: {directory / 'model'}\n"
        f"data: {{train: {rows}, max_length: 64}}\n"
        "adapter: {rank: 4}\n"
        "train: {steps: 2, batch_size: 4, remat: none}\n"
        "eval: {batch_size: 4, max_new_tokens: 8}\n"
    )
    return directory
