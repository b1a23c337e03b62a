"""The code of docs/objectives.md runs."""

import re
from pathlib import Path

from ..train.tiny import write_model

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def test_the_page_on_objectives_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    directory = write_model(tmp_path / "model")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 2
    names = {}
    exec("\n".join(blocks).replace("demo:smollm2-135m-instruct", str(directory)), names)
    lines = names["lines"]
    assert len(lines) == 3 and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["divergence"] < 1e-6 < lines[-1]["divergence"]
    assert callable(names["dpo"])
