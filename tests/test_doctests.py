"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import AdapterConfig, formats, lora

from .train.tiny import write_model, write_rows

ROOT = Path(lora_jax.__file__).parent
MODULES = sorted(
    ".".join(("lora_jax", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for file in ROOT.rglob("*.py")
    if ">>> " in file.read_text(encoding="utf-8")
)


def find_examples(module):
    """Docstrings of a module that hold examples."""
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names that docs/api/index.md says the examples begin with."""
    directory = write_model(tmp_path_factory.mktemp("doctests") / "model")
    model, config = formats.load(directory), AdapterConfig(rank=2)
    kernel = jnp.arange(12.0).reshape(4, 3)
    params, adapters = lora.init(jax.random.key(0), {"proj": {"kernel": kernel}}, config)
    return {
        **{"jax": jax, "jnp": jnp, "np": np},
        **{"lora": lora, "formats": formats, "AdapterConfig": AdapterConfig},
        **{"directory": str(directory), "rows": str(write_rows(directory.parent / "rows.jsonl"))},
        **{"model": model, "tokenizer": formats.load_tokenizer(directory)},
        **{"params": params, "adapters": adapters, "config": config},
    }


@pytest.mark.parametrize("module", MODULES)
def test_examples_print_what_they_say(module, names):
    runner, output = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE), []
    for test in find_examples(importlib.import_module(module)):
        test.globs |= names
        runner.run(test, out=output.append)
    assert not runner.summarize(verbose=False).failed, "".join(output)


def test_the_main_functions_have_examples():
    found = {
        test.name.removeprefix("lora_jax.")
        for name in MODULES
        for test in find_examples(importlib.import_module(name))
    }
    assert {f"adapters.{name}" for name in ("init", "bind", "merge", "shapes")} <= found
    assert {"formats.load", "generate.engine.Engine", "weights.linear"} <= found
    assert len(found) >= 14
