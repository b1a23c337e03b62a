"""The same training on eight virtual devices, whatever the mesh: one process of its own, read
here.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

MESHES = ("8x1x1", "1x8x1", "1x1x8", "2x2x2", "2x2x2 micro 8")


@pytest.fixture(scope="module")
def result(on_eight_devices):
    return on_eight_devices(Path(__file__).with_name("sharded.py"))


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_computes_what_one_device_does(result, mesh):
    names = ("evaluated", "losses", "norms", "first_moments", "adapters")
    worst = {name: result[mesh][name] for name in names}
    assert max(worst.values()) <= 1e-5, worst


@pytest.mark.parametrize("mesh", MESHES)
def test_adapters_stay_where_they_are_and_their_moments_with_them(result, mesh):
    assert result[mesh]["stays"] and result[mesh]["moments_follow"]
    # Two halves of seven linears: `fsdp` or `tensor` alone splits one of each, both split both.
    splits = {"8x1x1": 0, "1x8x1": 7, "1x1x8": 7}
    assert result[mesh]["split_adapters"] == splits.get(mesh, 14)


@pytest.mark.parametrize("mesh", ["one device", *MESHES])
def test_five_steps_compile_once(result, mesh):
    assert result[mesh]["compiled"] == 1


def test_where_every_parameter_lies(result):
    inward, outward = "(None, 'fsdp', 'tensor')", "(None, 'tensor', 'fsdp')"
    names = {
        **{f"self_attn.{name}_proj.kernel": inward for name in "qkv"},
        **{f"self_attn.{name}_proj.bias": "(None, 'tensor')" for name in "qkv"},
        "self_attn.o_proj.kernel": outward,
        "self_attn.o_proj.bias": "(None, None)",
        "mlp.gate_proj.kernel": inward,
        "mlp.up_proj.kernel": inward,
        "mlp.down_proj.kernel": outward,
        "input_layernorm.scale": "(None, None)",
        "post_attention_layernorm.scale": "(None, None)",
    }
    assert result["specs"] == {
        **{f"model.layers.{name}": spec for name, spec in names.items()},
        "model.embed_tokens.embedding": "('tensor', 'fsdp')",
        "model.norm.scale": "(None,)",
        "lm_head.kernel": "('fsdp', 'tensor')",
    }
    # An axis that does not divide a dimension is left out: 17 columns over two devices.
    assert result["odd"] == "('fsdp', None)"


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        ("no rule", "no partition rule covers these parameters:"),
        ("no rule", "model.extra.kernel"),
        ("no rule", "model.other"),
        ("mesh", "mesh={'data': 3, 'fsdp': 1, 'tensor': 1} does not fit 8 devices"),
        ("mesh left", "does not fit 8 devices"),
        ("batch", "train.batch_size=12 rows cannot be split over 8 devices"),
        ("micro", "train.micro_batch_size=4 rows cannot be split over 8 devices"),
        ("eval", "eval.batch_size=12 rows cannot be split over 8 devices"),
        ("length", "data.max_length=12 tokens cannot be split over 8 devices (tensor=8)"),
        ("attention", "train.attention=splash cannot be used on cpu: it runs on TPUs; auto would"),
    ],
)
def test_mistakes_are_told(result, mistake, expected):
    assert expected in result["errors"][mistake]


@pytest.mark.parametrize("mesh", ["1x8x1", "1x1x8", "2x2x2"])
def test_devices_exchange_one_layer_at_a_time_and_reduce_gradients_of_adapters_alone(result, mesh):
    found = {
        kind: [tuple(map(int, shape.split(","))) for shape in shapes if shape]
        for kind, shapes in result["collectives"][mesh].items()
    }
    assert not [shape for shapes in found.values() for shape in shapes if shape[0] == 5]
    kernels = ({32}, {32, 64}, {32, 272})
    reduced = [*found.get("all-reduce", []), *found.get("reduce-scatter", [])]
    assert not [shape for shape in reduced if len(shape) == 2 and set(shape) in kernels]
    # The rank is 4; rows are split wherever `data` or `fsdp` is.
    assert any({32, 4} >= set(shape) for shape in reduced) or mesh == "1x1x8"
    if mesh == "1x8x1":  # and weights are gathered, each by itself
        assert {(32, 32), (32, 64), (64, 32)} <= set(found["all-gather"])


def test_heads_that_are_not_split_are_told(result):
    notes = result["notes"]
    assert notes["split"] == ""
    assert notes["kv"].startswith("note: 1 key and value heads cannot be split over mesh.tensor=2")
    assert notes["none"].startswith("note: 3 heads cannot be split over mesh.tensor=2")


def on_hosts(count):
    """The batches that `hosts.py` puts on a mesh over `count` processes, as host 0 prints them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("hosts.py")
    command = [sys.executable, script, str(port), str(count)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [*command, str(host)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for host in range(count)
    ]
    texts = [process.communicate(timeout=300)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0] * count, texts
    return [json.loads(line) for line in texts[0].splitlines() if line.startswith("{")]


def test_one_two_and_four_hosts_see_the_same_examples_in_the_same_order():
    alone = on_hosts(1)
    assert len(alone) == 3 and alone[0] != alone[1]
    assert on_hosts(2) == alone
    assert on_hosts(4) == alone
