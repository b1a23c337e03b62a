"""Tiny random models of transformers as files, and the one measure of distance. Torch is imported
only when asked for.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

# One compile cache for the whole session, for its processes and the commands that tests start. The
# programs are those of users; only the machine code made of them is not optimised, and comes from
# the emitters of XLA that take half the time, where jaxlib has a choice: an unknown flag ends it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    has_choice = Version(version("jaxlib")) < Version("0.11")
    emitters = ["--xla_cpu_use_fusion_emitters=false"] if has_choice else []
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *emitters]).strip()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lora_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import numpy as np
import pytest

from lora_jax.formats import digests

from .families import save, torch_model

# No two axes are equal: vocabulary, hidden, intermediate, queries (6 x 8), keys (2 x 8).
TINY = dict(
    vocab_size=97,
    hidden_size=36,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)


# Files that take minutes come first, so that two workers end at about the same time.
LONG = ["train/test_resume.py", "test_engine_requests.py", "multihost/test_runs.py"]
LONG += ["test_programs.py", "test_notebooks.py", "test_bank.py", "parity/test_sharded_families.py"]
LONG += ["serve/test_serve_command.py", "parity/test_virtual.py", "train/test_family.py"]
LONG += ["train/test_run.py", "plan/test_compiled.py", "train/test_preference_runs.py"]
TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`long_table(keep)`: `keep` cases of the test, evenly spread over its table, are not slow."""
    order = {TESTS / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    tables = {}
    for item in items:
        if (mark := item.get_closest_marker("long_table")) is not None:
            tables.setdefault((item.path, item.originalname, *mark.args), []).append(item)
    for (_, _, keep), cases in tables.items():
        kept = {round(i * (len(cases) - 1) / max(1, keep - 1)) for i in range(keep)}
        for number, item in enumerate(cases):
            if number not in kept:
                item.add_marker(pytest.mark.slow)


def pytest_sessionfinish():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """A process may map 65,530 pieces of memory on Linux, of which a compiled program takes about
    15; the compiler crashes where there are no more.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def own_digests(tmp_path_factory):
    """Digests of the tests' models stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cache")
        patch.setattr(digests, "cache_directory", lambda: directory)
        yield


@pytest.fixture(scope="module")
def optimised():
    """Compile as users do: for tests that compute for minutes."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def on_eight_devices():
    """`on_eight_devices(script, *arguments, flags={})`: the JSON that a script prints last, run on
    eight virtual devices with these flags of XLA.
    """

    def run(script: Path, *arguments: str, flags: dict | None = None):
        options = {"xla_force_host_platform_device_count": 8} | (flags or {})
        given = (f"--{name}={str(value).lower()}" for name, value in options.items())
        text = " ".join([os.environ["XLA_FLAGS"], *given])
        done = subprocess.run(
            [sys.executable, "-W", "error", script, *arguments],
            env=os.environ | {"XLA_FLAGS": text, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def error():
    """`error(x, y)`: max|x - y| / max(1, max|y|), y being the oracle; infinite where a number is
    not finite.
    """

    def measure(x, y) -> float:
        x, y = (np.asarray(value, np.float64) for value in (x, y))
        assert x.shape == y.shape, f"shapes {x.shape} and {y.shape}"
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            return float("inf")
        return float(np.abs(x - y).max() / max(1.0, np.abs(y).max()))

    return measure


@pytest.fixture
def tiny_model(tmp_path):
    """`tiny_model(family, seed=0, dtype="float32", max_shard_size="1GB", **config)`: a directory of
    transformers with every parameter random (norms and biases too), and the torch model in float32
    with those very weights.
    """

    def make(family, seed=0, dtype="float32", max_shard_size="1GB", **config):
        model = torch_model(family, seed, config)
        directory = tmp_path / f"model{len(list(tmp_path.glob('model*')))}"
        save(model, directory, dtype, max_shard_size)
        return directory, model

    return make


@pytest.fixture
def tiny_llama(tiny_model):
    """`tiny_llama(seed=0, family="llama", **config)`: `tiny_model` of the size `TINY`."""

    def make(seed=0, family="llama", **config):
        return tiny_model(family, seed, **TINY | config)

    return make


@pytest.fixture
def edit_json():
    """`edit_json(file, drop=[...], key=value, ...)` rewrites a JSON object."""

    def edit(file: Path, drop=(), **changes) -> dict:
        content = json.loads(file.read_text())
        content = {key: value for key, value in content.items() if key not in drop} | changes
        file.write_text(json.dumps(content))
        return content

    return edit
