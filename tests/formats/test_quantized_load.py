"""Loading a model as NF4 or int8: which leaves, the very bits, memory, placement, mistakes.

Run as a script it loads a directory on eight virtual devices and prints what it finds as JSON.
"""

import json
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import formats, sharding, tree
from lora_jax.config import MeshConfig
from lora_jax.errors import UserError
from lora_jax.formats import model_reader
from lora_jax.formats.tensors import all_finite
from lora_jax.quantize import SCHEMES, Int8Weight, NF4Weight, dequantize, quantize

LEAF = {"nf4": NF4Weight, "int8": Int8Weight}
# Three blocks, the last half full, and two groups of columns.
WIDE = dict(hidden_size=160, intermediate_size=320, num_attention_heads=8, num_key_value_heads=4)


def same_leaf(found, expected) -> bool:
    """Equal structure, dtypes and bits."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return jax.tree.structure(found) == jax.tree.structure(expected) and all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
    )


def nbytes(params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def is_block_kernel(path) -> bool:
    return path[-1] == "kernel" and "lm_head" not in path


def edit_tensors(directory, **changes) -> None:
    """Write one value into a tensor of a model directory: name=(position, value)."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, (position, value) in changes.items():
        tensors[name][position] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        dict(dtype="bfloat16", attention_bias=True, mlp_bias=True),
        dict(dtype="float16", tie_word_embeddings=True, max_shard_size="20KB"),
        WIDE,
    ],
    ids=["float32", "bfloat16, biases", "float16, tied, shards", "wide"],
)
def test_kernels_of_the_blocks_are_quantised_and_nothing_else(tiny_llama, scheme, config):
    whole = jax.jit(quantize, static_argnums=1)
    directory, _ = tiny_llama(**config)
    plain = tree.flatten(formats.load(directory).params)
    found = tree.flatten(formats.load(directory, dtype=scheme).params)
    assert found.keys() == plain.keys()
    for path, leaf in found.items():
        assert leaf.shape == plain[path].shape and leaf.dtype == plain[path].dtype
        if is_block_kernel(path):
            assert isinstance(leaf, LEAF[scheme])
            assert same_leaf(leaf, whole(plain[path], scheme))
            assert not same_leaf(leaf, whole(plain[path][::-1], scheme))
        else:
            assert same_leaf(leaf, plain[path])
    assert sum(map(is_block_kernel, found)) == 7


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_float_model_never_stands_in_memory(tiny_llama, monkeypatch, scheme):
    config = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=12, head_dim=32)
    directory, _ = tiny_llama(**config)
    formats.load(directory, dtype=scheme)  # compiles
    quantized = model_reader._quantize
    live = []

    def count(tensor, scheme):
        live.append(nbytes(jax.live_arrays()))
        return quantized(tensor, scheme)

    monkeypatch.setattr(model_reader, "_quantize", count)
    before = nbytes(jax.live_arrays())
    tracemalloc.start()
    model = formats.load(directory, dtype=scheme)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tensor, size = 4 * 192 * 512, nbytes(model.params)
    floats = 4 * sum(np.prod(leaf.shape) for leaf in tree.flatten(model.params).values())
    assert len(live) == 7 * 12
    assert max(live) - before < size + 2 * tensor < floats / 2
    assert peak < size + 4 * tensor < floats / 2


def tell(directory: Path) -> dict:
    """Report the sharding of every quantised array on a mesh of 2 (fsdp) x 4 (tensor), and if its
    numbers are those of one device.
    """
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    alone = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    result = {}
    for scheme in SCHEMES:
        single = tree.flatten(formats.load(directory, mesh=alone, dtype=scheme).params)
        found = tree.flatten(formats.load(directory, mesh=mesh, dtype=scheme).params)
        with jax.set_mesh(mesh):
            inside = tree.flatten(formats.load(directory, mesh=mesh, dtype=scheme).params)
        for path, leaf in found.items():
            same = same_leaf(leaf, single[path]) and same_leaf(leaf, inside[path])
            result[f"{scheme} {path[-2]}.{path[-1]}"] = {
                "same": same,
                "devices": sorted({len(x.sharding.device_set) for x in jax.tree.leaves(leaf)}),
                "specs": [str(tuple(x.sharding.spec)) for x in jax.tree.leaves(leaf)],
            }
            if isinstance(leaf, NF4Weight | Int8Weight):
                computed = jax.jit(dequantize)(leaf)
                same_floats = np.array_equal(computed, dequantize(single[path]))
                result[f"{scheme} {path[-2]}.{path[-1]}"]["same"] &= same_floats
    return result


def test_eight_devices_hold_parts_of_the_same_leaf(tiny_llama, on_eight_devices):
    directory, _ = tiny_llama(**WIDE)
    result = on_eight_devices(Path(__file__), str(directory))
    assert len(result) == 2 * 12 and all(leaf["same"] for leaf in result.values())
    assert all(leaf["devices"] == [8] for leaf in result.values())
    specs = {name: leaf["specs"] for name, leaf in result.items()}
    whole = "(None, 'fsdp', 'tensor')"
    # 160 rows are 3 blocks and 320 columns 2 groups: what 2 or 4 do not divide stays whole.
    assert specs["nf4 gate_proj.kernel"] == [whole, "(None, None, 'tensor')", "(None, None, None)"]
    assert specs["nf4 down_proj.kernel"] == [
        "(None, 'tensor', 'fsdp')",
        "(None, None, 'fsdp')",
        "(None, None, None)",
    ]
    assert specs["int8 gate_proj.kernel"] == [whole, "(None, None, 'tensor')"]
    assert specs["int8 down_proj.kernel"] == ["(None, 'tensor', 'fsdp')", "(None, None, 'fsdp')"]
    assert specs["nf4 embed_tokens.embedding"] == ["(None, 'fsdp')"]


@pytest.mark.parametrize("dtype", [None, "bfloat16", *SCHEMES])
def test_weights_that_are_not_finite_are_named(tiny_llama, dtype):
    directory, _ = tiny_llama()
    kernel, bias = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"
    norm, embedding = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"
    edit_tensors(
        directory,
        **{kernel: ((3, 5), np.nan), bias: ((0, 0), -np.inf)},
        **{norm: ((35,), np.inf), embedding: ((96, 35), -np.nan)},
    )
    with pytest.raises(UserError, match="weights are infinite or not a number in:") as raised:
        formats.load(directory, dtype=dtype)
    lines = str(raised.value).splitlines()[1:-1]
    assert [line.strip() for line in lines] == sorted([kernel, bias, norm, embedding])


def test_weights_that_a_dtype_cannot_hold_are_named(tiny_llama):
    directory, _ = tiny_llama()
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(directory, **{name: ((0, 0), 7e4)})
    with pytest.raises(UserError, match=f"weights are too large for float16 in:\n  {name}"):
        formats.load(directory, dtype="float16")
    assert formats.load(directory, dtype="bfloat16").params["model"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_value_that_is_not_finite_is_seen_wherever_it_is(dtype):
    """Also the largest numbers that are finite, in arrays that are not contiguous."""
    largest = float(ml_dtypes.finfo(dtype).max)
    for value in (0.0, -0.0, 1.5, -1.5, largest, -largest, np.nan, -np.nan, np.inf, -np.inf):
        for place in ((0, 0), (3, 4), (2, 1)):
            values = np.linspace(-2, 2, 48).astype(dtype).reshape(6, 8)
            values[place] = value
            for seen in (values, values.T, values[:4, :5]):
                assert all_finite(seen) == bool(np.isfinite(np.float64(value))), (value, place)
    assert all_finite(np.zeros((0, 3), dtype))


@pytest.mark.parametrize(
    "dtype", ["nf3", "fp4", "float64", "bfloat", np.int8, np.dtype("int8"), object()]
)
def test_a_dtype_that_weights_are_not_stored_in_is_refused(tiny_llama, dtype):
    directory, _ = tiny_llama()
    listed = "float32, float16, bfloat16, int8, nf4, and None"
    with pytest.raises(
        UserError, match=f"is not a dtype that weights .*; these are: {listed}"
    ) as e:
        formats.load(directory, dtype=dtype)
    assert repr(dtype) in str(e.value)
    assert dtype != "nf3" or "Did you mean 'nf4'?" in str(e.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", jnp.bfloat16, np.float32])
def test_float_dtypes_still_cast_every_leaf(tiny_llama, dtype):
    directory, _ = tiny_llama()
    params = formats.load(directory, dtype=dtype).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


def test_without_the_cpu_the_way_out_is_told(tiny_llama, monkeypatch):
    directory, _ = tiny_llama()

    def no_cpu(**kwargs):
        raise RuntimeError("Unknown backend cpu")

    mesh = sharding.make_mesh(MeshConfig())
    monkeypatch.setattr(jax, "local_devices", no_cpu)
    with pytest.raises(UserError, match="quantised on the CPU.*JAX_PLATFORMS=cuda,cpu"):
        formats.load(directory, mesh=mesh, dtype="nf4")


if __name__ == "__main__":
    print(json.dumps(tell(Path(sys.argv[1]))))
