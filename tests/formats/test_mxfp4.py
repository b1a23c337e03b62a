"""Weights in MXFP4: numbers of transformers, parts of tensors, whole models, damaged files."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lora_jax import formats, models, tree
from lora_jax.errors import UserError
from lora_jax.formats.mxfp4 import _Packed, dequantize
from lora_jax.formats.tensors import list_tensors
from lora_jax.quantize import quantize

from ..families import FAMILIES

# A hidden and an intermediate size of whole blocks of 32.
SIZE = FAMILIES["gpt_oss"].fields | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
STACKS = ("gate_up_proj", "down_proj")


def draw(seed, experts, out, blocks):
    """Random blocks, and scales from the whole range that bfloat16 holds."""
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (experts, out, blocks, 16), dtype=np.uint8)
    return packed, rng.integers(0, 252, (experts, out, blocks), dtype=np.uint8)


def of_transformers(blocks, scales) -> np.ndarray:
    """(experts, in, out) as float32."""
    return convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy()


@pytest.fixture
def packed(tiny_model):
    """`packed(shards=1)`: a directory with experts in MXFP4, the same with them in bfloat16, and
    the model of transformers in float32.
    """

    def make(shards=1):
        plain, oracle = tiny_model("gpt_oss", dtype="bfloat16", **SIZE)
        directory = plain.parent / "packed"
        directory.mkdir()
        tensors, new = load_file(plain / "model.safetensors"), {}
        parameters = dict(oracle.named_parameters())
        for number, name in enumerate(tensors):
            if name.endswith(STACKS):
                experts, features, out = tensors[name].shape
                blocks, scales = draw(number, experts, out, features // 32)
                scales = 121 + scales % 5  # as large as the weights of the model
                values = of_transformers(blocks, scales)
                new |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
                tensors[name] = values.astype(ml_dtypes.bfloat16)
                with torch.no_grad():
                    parameters[name].copy_(torch.tensor(values))
            else:
                new[name] = tensors[name]
        save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((plain / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "mxfp4"}
        (directory / "config.json").write_text(json.dumps(config))
        write(directory, new, shards)
        return directory, plain, oracle

    return make


def write(directory, tensors, shards=1):
    """With two shards blocks and scales are apart."""
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    where = {name: files[-1 if name.endswith("_scales") else 0] for name in tensors}
    for file in files:
        own = {name: tensors[name] for name in tensors if where[name] == file}
        save_file(own, directory / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def same(found, expected) -> bool:
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_are_those_of_transformers(seed):
    blocks, scales = draw(seed, 3, 10, 4)
    values = dequantize(blocks, scales)
    assert values.dtype == ml_dtypes.bfloat16
    expected = of_transformers(blocks, scales)
    assert np.array_equal(values.astype(np.float32).swapaxes(1, 2), expected)
    assert len(np.unique(np.abs(expected))) > 300


def test_all_numbers_of_a_byte():
    """E2M1: a sign, two bits of exponent, one of mantissa."""
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    values = dequantize(blocks, np.full((1, 16), 127, np.uint8)).astype(np.float32).reshape(256, 2)
    known = [float(ml_dtypes.float4_e2m1fn(x)) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
    known += [-x for x in known]
    assert values.tolist() == [[known[byte & 15], known[byte >> 4]] for byte in range(256)]


@pytest.mark.parametrize("rows", [(0, 128), (0, 32), (33, 34), (31, 97), (64, 128)])
def test_a_part_is_that_of_the_whole(rows):
    blocks, scales = draw(0, 3, 10, 4)
    whole = of_transformers(blocks, scales)
    source = _Packed(blocks, scales, whole.shape)
    part = (slice(1, 3), slice(*rows), slice(2, 9))
    assert np.array_equal(source[part].astype(np.float32), whole[part])


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_in_mxfp4_is_the_one_it_stands_for(packed, error, shards):
    directory, plain, oracle = packed(shards)
    model, expected = formats.load(directory), formats.load(plain)
    assert same(model.params, expected.params)
    assert any("quant_method='mxfp4': the experts are read" in note for note in model.notes)
    wide = formats.load(directory, dtype="float32")
    tokens = np.random.default_rng(0).integers(1, 97, (2, 20), dtype=np.int32)
    with torch.no_grad():
        logits = oracle(torch.tensor(tokens).long(), use_cache=False).logits.numpy()
    assert error(jax.jit(wide.apply)(wide.params, tokens), logits) < 1e-5


def test_transformers_reads_the_same(packed):
    directory, _, _ = packed()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    )
    leaves = tree.flatten(formats.load(directory).params)
    for layer in range(2):
        for stack in STACKS:
            ours = leaves["model", "layers", "mlp", "experts", stack, "kernel"][layer]
            value = getattr(theirs.model.layers[layer].mlp.experts, stack).float().detach().numpy()
            assert np.array_equal(np.asarray(ours, np.float32), value)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_experts_are_quantised_one_at_a_time(packed, scheme):
    directory, plain, _ = packed()
    found = tree.flatten(formats.load(directory, dtype=scheme).params)
    for path, leaf in tree.flatten(formats.load(plain).params).items():
        if path[-1] == "kernel" and not {"lm_head", "router"} & {*path}:
            leaf = jax.jit(quantize, static_argnums=1)(leaf, scheme)
        assert same(found[path], leaf), path


def test_an_export_is_not_quantised(packed, tmp_path):
    directory, plain, oracle = packed()
    model = formats.load(directory)
    formats.write_model(tmp_path / "written", model, model.params, directory)
    config = json.loads((tmp_path / "written" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert list_tensors(tmp_path / "written").keys() == list_tensors(plain).keys()
    loaded = type(oracle).from_pretrained(tmp_path / "written", dtype=torch.float32)
    for (name, value), (_, known) in zip(
        loaded.named_parameters(), oracle.named_parameters(), strict=True
    ):
        assert torch.equal(value, known), name


def test_matrices_are_read_one_at_a_time(packed):
    directory, plain, _ = packed()
    path = ("model", "layers", "mlp", "experts", "gate_up_proj", "kernel")
    with formats.open_matrices(directory, formats.describe(directory)) as read:
        found = read(path, (1, 3))
        bias = read((*path[:-1], "bias"), (0, 2))
    params = tree.flatten(formats.load(plain).params)
    assert np.array_equal(found, np.asarray(params[path][1, 3], np.float32))
    assert np.array_equal(bias, np.asarray(params[*path[:-1], "bias"][0, 2], np.float32))


NAME = "model.layers.0.mlp.experts.down_proj"


def without(name):
    return lambda tensors: tensors.pop(name)


def changed(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


def not_a_number(scales):
    scales = scales.copy()
    scales[0, 0, 0] = 255
    return scales


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without(f"{NAME}_scales"), f"{NAME}_blocks has no {NAME}_scales"),
        (without(f"{NAME}_blocks"), f"{NAME}_scales has no {NAME}_blocks"),
        (changed(f"{NAME}_scales", lambda x: x[:, 1:]), "are not (experts, out, n, 16) and (exp"),
        (changed(f"{NAME}_blocks", lambda x: x.astype(np.float32)), "of float32 and scales"),
        (changed(f"{NAME}_scales", not_a_number), f"not a number in:\n  {NAME}_blocks"),
        (
            lambda tensors: tensors.update({NAME: np.zeros((5, 96, 64), np.float32)}),
            f"{NAME} is there both in MXFP4 and as float32",
        ),
    ],
)
def test_damaged_files_are_refused(packed, damage, expected):
    directory, _, _ = packed()
    tensors = load_file(directory / "model.safetensors")
    damage(tensors)
    write(directory, tensors)
    with pytest.raises(UserError) as raised:
        formats.load(directory)
    assert expected in str(raised.value) and str(directory) in str(raised.value)


@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
def test_other_quantised_weights_are_refused(family):
    method = "gptq" if family == "gpt_oss" else "mxfp4"
    content = FAMILIES[family].fields | {"model_type": family}
    content["quantization_config"] = {"quant_method": method}
    with pytest.raises(UserError, match=f"quantization_config='{method}': the weights are quant"):
        models.describe(content)
