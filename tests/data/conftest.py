"""Fixtures of the tests of data."""

import pytest


@pytest.fixture
def quiet_datasets(tmp_path, monkeypatch):
    """Let the `datasets` library cache below tmp_path, and print no progress."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
