"""Shapes against the compiler, on the CPU backend: eight virtual devices in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .settings import SETTINGS

# Wide enough that arrays, and not constants, make up the memory; nothing of it is ever allocated.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plan")
    (directory / "config.json").write_text(json.dumps(LLAMA))
    child = subprocess.run(
        [sys.executable, Path(__file__).parent / "settings.py", str(directory)],
        env=os.environ
        | {
            # Machine code that is not optimised: buffers are those of the same program.
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
            "--xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SETTINGS)
def test_arguments_and_outputs_are_exact_and_the_total_is_close(measured, name):
    one = measured["steps"][name]
    found, real = one["estimate"], one["compiled"]
    assert found["arguments"] == real["arguments"]
    assert found["outputs"] == real["outputs"]
    assert real["aliased"] >= one["state"]  # adapters and optimizer are changed in place
    tolerance = 0.1 if one["remat"] == "full" else 0.25
    assert abs(found["total"] / real["total"] - 1) < tolerance


def test_weights_that_trained_ones_replace_are_counted_beside_the_arguments(measured):
    head = LLAMA["hidden_size"] * LLAMA["vocab_size"] * 4
    assert measured["steps"]["lora head"]["estimate"]["unread"] == head
    assert measured["steps"]["lora"]["estimate"]["unread"] == 0


@pytest.mark.parametrize("name", ["lora fsdp", "lora mesh", "nf4 fsdp"])
def test_the_base_is_gathered_one_matrix_at_a_time(measured, name):
    one = measured["steps"][name]
    gathers = [entry for entry in one["collectives"] if entry["kind"] == "all-gather"]
    assert gathers
    head = LLAMA["hidden_size"] * LLAMA["vocab_size"] * 4
    assert max(entry["largest"] for entry in gathers) <= max(head, one["layer"])


def test_the_tensor_axis_sums_less_than_every_linear_alone(measured):
    """Separate sums of outputs and of gradients would be eight activations in a layer. Sums that
    linears share are in tests/plan/test_topology.py.
    """
    (sums,) = [
        entry
        for entry in measured["steps"]["lora mesh"]["collectives"]
        if entry["kind"] == "all-reduce"
    ]
    activation = 16 // 4 * 512 * LLAMA["hidden_size"] * 4
    assert sums["bytes"] < 7 * LLAMA["num_hidden_layers"] * activation


def test_collectives_in_loops_count_as_often_as_they_run(measured):
    found = {entry["kind"]: entry for entry in measured["known"]}
    size = 16 * 128 * 4
    assert found["all-reduce"]["count"] == 5
    assert found["all-reduce"]["bytes"] == 5 * 2 * size * 3 // 4
    assert found["all-gather"]["count"] == 1
    assert found["all-gather"]["bytes"] == 4 * size * 3 // 4
