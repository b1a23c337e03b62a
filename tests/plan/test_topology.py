"""The train step compiled for TPU slices, on a machine without a TPU."""

import json
import os
import re
import subprocess
import sys

import pytest

from lora_jax import demo
from lora_jax.errors import UserError
from lora_jax.plan.compiled import find_libtpu

from ..families import SMOLLM2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def libtpu():
    """Nothing is skipped: a suite that could not compile for a TPU has not tested it."""
    try:
        find_libtpu()
    except UserError as error:
        pytest.fail(f"install the extra `test` or `plan` of this package: {error}")


# The compiler for TPUs works as it does for users.
OF_TESTS = ("JAX_COMPILATION_CACHE_DIR", "JAX_DISABLE_MOST_OPTIMIZATIONS")


def plan(tmp_path, *arguments, **fields):
    (tmp_path / "config.json").write_text(
        json.dumps(SMOLLM2 | {"torch_dtype": "bfloat16"} | fields)
    )
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {tmp_path}\nadapter: {{rank: 16}}\nmesh: {{data: 1, fsdp: -1}}\n")
    child = subprocess.run(
        [sys.executable, "-m", "lora_jax", "plan", "--config", file, "--quick", *arguments],
        env={name: value for name, value in os.environ.items() if name not in OF_TESTS}
        | {
            "LORA_JAX_CACHE": str(tmp_path / "cache"),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout


def test_smollm2_on_four_v5e_chips(tmp_path):
    overrides = ("train.compute_dtype=bfloat16", "train.batch_size=8")
    text = plan(tmp_path, "--topology", "v5e:2x2", "--json", *overrides)
    found = json.loads(text)
    shapes, real = found["estimate"], found["compiled"]
    # A TPU pads arrays to its tiles: no less than what shapes say, and not much more.
    assert shapes["arguments"] <= real["arguments"] <= 1.15 * shapes["arguments"]
    assert real["aliased"] >= shapes["adapters"] + shapes["optimizer"]
    assert 0.7 < shapes["total"] / real["total"] < 1.3
    assert real["arguments"] < real["peak"] == real["needed"] < real["total"]
    assert found["fits"] and real["needed"] < found["hbm"]
    sent = {one["kind"]: one for one in real["collectives"]}
    head = SMOLLM2["vocab_size"] * SMOLLM2["hidden_size"] * 2
    assert sent["all-gather"]["largest"] <= head  # never the whole base
    assert sent["all-gather"]["count"] > SMOLLM2["num_hidden_layers"]
    assert found["roofline"]["seconds"] > 0
    assert any((tmp_path / "cache" / "compiled").iterdir())


def test_activations_are_scattered_where_they_are_summed(tmp_path):
    """A layer gathers and scatters its activations; no device gets all of a sum."""
    layers, hidden, rows, tokens = 4, 1024, 8, 512
    fields = dict(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=2816)
    heads = dict(num_attention_heads=16, num_key_value_heads=8, head_dim=64)
    mesh = ("mesh.fsdp=2", "mesh.tensor=2", "train.compute_dtype=bfloat16")
    size = (f"train.batch_size={rows}", f"data.max_length={tokens}")
    text = plan(tmp_path, "--topology", "v5e:2x2", "--json", *mesh, *size, **fields, **heads)
    sent = {one["kind"]: one for one in json.loads(text)["compiled"]["collectives"]}
    activation = rows // 2 * tokens * hidden * 2
    assert sent["all-reduce"]["largest"] < activation
    # What is summed whole: low-rank products, a part of the head, gradients of the adapters.
    assert sent["all-reduce"]["bytes"] < layers * activation
    # Five sums of a layer (tests/plan/test_compiled.py), and those of the head.
    assert 5 <= sent["reduce-scatter"]["bytes"] / (layers * activation // 2) < 7


def test_a_step_that_does_not_fit_one_chip(tmp_path):
    """Its weights alone nearly do: what is missing is little, and not as much as they are."""
    large = dict(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336)
    heads = dict(num_attention_heads=32, num_key_value_heads=8)
    overrides = ("train.compute_dtype=bfloat16", "train.batch_size=8", "data.max_length=1024")
    text = plan(tmp_path, "--topology", "v5e:1x1", *overrides, **large, **heads)
    found = re.search(r"does not fit: ([\d.]+) GiB needed .*?([\d,]+) bytes too many", text)
    shapes = re.search(r"([\d.]+)  total \(with the larger", text)
    assert found and shapes, text
    needed = float(found[1])
    assert 0.9 < needed / float(shapes[1]) < 1.1
    missing = int(found[2].replace(",", ""))
    assert missing == pytest.approx((needed - 15.75) * 2**30, abs=0.01 * 2**30)
    assert re.search(r"base_dtype=nf4  \(fits\)", text)
    assert re.search(r"train.micro_batch_size=1  \((fits|does not fit either)\)", text)
    assert demo.cache_directory() != tmp_path  # the cache of the child is its own


def test_a_step_whose_buffers_add_up_to_more_than_the_chip_has_and_fits(tmp_path):
    """What the forward pass hands to the backward pass counts twice in the sum."""
    large = dict(num_hidden_layers=80, hidden_size=4096, intermediate_size=1024)
    heads = dict(num_attention_heads=32, num_key_value_heads=8)
    overrides = ("train.compute_dtype=bfloat16", "train.batch_size=8", "data.max_length=1024")
    text = plan(tmp_path, "--topology", "v5e:1x1", "--json", *overrides, **large, **heads)
    found = json.loads(text)
    assert found["compiled"]["needed"] < found["hbm"] < found["compiled"]["total"]
    assert found["fits"] and "remedies" not in found
