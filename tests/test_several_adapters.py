"""The page on several adapters runs."""

import re
from pathlib import Path

import jax
import numpy as np

from lora_jax import AdapterConfig, formats, lora

from .train.tiny import random_adapters, write_model

PAGE = Path(__file__).parents[1] / "docs" / "several-adapters.md"
CONFIGS = {
    "a": AdapterConfig(rank=4, target_modules="all-linear"),
    "b": AdapterConfig(rank=16, use_rslora=True, target_modules=["q_proj", "up_proj"]),
}


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = write_model(tmp_path / "model")
    params = formats.load(directory).params
    trees = {}
    for seed, (name, config) in enumerate(CONFIGS.items(), start=1):
        _, fresh = lora.init(jax.random.key(seed), params, config)
        trees[name] = random_adapters(fresh, seed)
        formats.write_adapter(
            f"runs/{name}/adapter", trees[name], params, config, base_model="org/name"
        )
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 10
    names: dict = {}
    exec("\n".join(blocks).replace("demo:smollm2-135m-instruct", str(directory)), names)
    model, tokens = names["model"], names["tokens"]
    for row, name in enumerate("ab"):
        alone = model.apply(lora.bind(params, trees[name], CONFIGS[name]), tokens[:1])[0]
        assert np.abs(names["logits"][row] - alone).max() < 1e-4
        assert np.abs(names["first"][row] - alone).max() < 1e-4
    assert np.abs(names["logits"][2] - model.apply(params, tokens[:1])[0]).max() < 1e-5
    assert np.abs(names["mixed"] - names["first"]).max() > 1e-3
    assert names["forward"]._cache_size() == 1
    engine = names["engine"]
    assert engine.adapters["a"] == names["identity"]
    assert engine.compiled_programs == names["programs"] > 5
    assert names["found"].largest < 1e-4 and names["found"].tokens == 16
    assert len(names["answer"].tokens) == 8
