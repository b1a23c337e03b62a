"""Quantised weights in FP8 and of bitsandbytes: the numbers of torch and bitsandbytes, parts of
tensors, whole models, damaged files.
"""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from lora_jax import formats, tree
from lora_jax.errors import UserError
from lora_jax.formats import bitsandbytes, fingerprint, fp8
from lora_jax.formats.tensors import list_tensors, open_all, open_source, read_whole
from lora_jax.models.quantization import Quantization
from lora_jax.quantize import quantize

from ..packed import KINDS, pack, to_bits, to_float8, write
from ..parity.test_towers import make, with_names_of_modules, with_old_names

NAME = "model.layers.0.mlp.up_proj"
FLOAT32 = np.dtype(np.float32)


@pytest.fixture
def packed(tiny_llama, tmp_path):
    """`packed(kind)`: a directory with linears of that kind, and one with the same in float32."""

    def make(kind, shards=1, **config):
        plain, _ = tiny_llama(**config)
        return pack(plain, tmp_path / f"packed {plain.name}", kind, shards), plain

    return make


def same(found, expected) -> bool:
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


PARTS = [(0, 33), (5, 6), (7, 31)], [(0, 40), (3, 4), (11, 37)]


def check(tensor, expected):
    """The whole tensor and parts of it are the expected weights, bit for bit."""
    values = read_whole(tensor)
    assert values.dtype == np.float32 and np.array_equal(values, expected)
    with open_all([tensor]) as handles:
        source = open_source(tensor, handles)
        for rows in PARTS[0]:
            for columns in PARTS[1]:
                part = slice(*rows), slice(*columns)
                assert np.array_equal(source[part], expected[part]), (rows, columns)


@pytest.mark.parametrize(
    ("width", "options"),
    [
        (40, dict(quant_type="nf4", blocksize=64)),
        (40, dict(quant_type="fp4", blocksize=128, compress_statistics=True)),
        (40, dict(quant_type="nf4", blocksize=64, quant_storage=torch.bfloat16)),
        (41, dict(quant_type="nf4", blocksize=64, compress_statistics=True)),
        (41, dict(quant_type="fp4", blocksize=4096)),
    ],
    ids=lambda value: str(value)[:60],
)
def test_values_of_4_bits_are_those_of_bitsandbytes(tmp_path, monkeypatch, width, options):
    monkeypatch.setattr(bitsandbytes, "_PART", 100)
    torch.set_num_threads(1)
    weight = torch.randn(600, width, generator=torch.Generator().manual_seed(0))
    parts, values = to_bits(weight, **options)  # double quantisation in more than one block
    save_file({f"a.{name}": part for name, part in parts.items()}, tmp_path / "model.safetensors")
    found, problems = bitsandbytes.joined(list_tensors(tmp_path), FLOAT32)
    assert not problems and found.keys() == {"a.weight"}
    check(found["a.weight"], values.numpy())


@pytest.mark.parametrize(
    ("block", "dtype", "shape"),
    [
        ((16, 12), torch.float32, (3, 4)),  # the last blocks are partial
        ((11, 10), torch.bfloat16, (3, 4)),
        ((11, 10), torch.float8_e8m0fnu, (3, 4)),
        ((1, 40), torch.float32, (33, 1)),
        ((1, 40), torch.float16, (33,)),
        ((33, 40), torch.bfloat16, ()),
        ((33, 40), torch.float32, (1,)),
    ],
)
def test_values_of_fp8_are_those_of_torch(tmp_path, monkeypatch, block, dtype, shape):
    monkeypatch.setattr(fp8, "_PART", 100)
    weight = torch.randn(33, 40, generator=torch.Generator().manual_seed(0))
    numbers, scales, values = to_float8(weight, block, dtype)
    parts = {"a.weight": numbers, "a.weight_scale_inv": scales.reshape(shape)}
    save_file(parts, tmp_path / "model.safetensors")
    blocks = block if block[0] > 1 and shape == (3, 4) else None
    found, problems = fp8.joined(
        list_tensors(tmp_path), Quantization("fp8", "float32", blocks), FLOAT32
    )
    assert not problems and found.keys() == {"a.weight"}
    check(found["a.weight"], values.numpy())
    if block != (16, 12) and len(shape) == 2:  # transformers reads whole blocks alone
        theirs = Fp8Dequantize(None)._dequantize_one(numbers, scales, torch.float32)
        assert torch.equal(theirs, values)


def test_scales_in_bytes_are_exponents(tmp_path):
    """`scale_fmt` ue8m0 as transformers has it; bytes are no scales otherwise."""
    numbers = torch.arange(127, dtype=torch.uint8).reshape(1, 127).view(torch.float8_e4m3fn)
    scales = torch.tensor([[118, 133]], dtype=torch.uint8)
    parts = {"a.weight": numbers, "a.weight_scale_inv": scales}
    save_file(parts, tmp_path / "model.safetensors")
    tensors, given = list_tensors(tmp_path), Quantization("fp8", "float32", (1, 64), True)
    values = read_whole(fp8.joined(tensors, given, FLOAT32)[0]["a.weight"])
    factors = np.repeat(np.float32([2.0**-9, 64]), 64)[:127]
    assert np.array_equal(values[0], numbers.float().numpy()[0] * factors)
    plain = Quantization("fp8", "float32", (1, 64))
    assert "do not fit" in fp8.joined(tensors, plain, FLOAT32)[1][0]


class Recorder:
    """An array that remembers the parts of it that were read."""

    def __init__(self, array):
        self.array, self.size = array, 0

    def __getitem__(self, index):
        part = self.array[index]
        self.size += part.size
        return part


def test_only_the_part_that_is_wanted_is_read():
    numbers, scales, values = to_float8(torch.randn(64, 64), (16, 16))
    codes = Recorder(numbers.view(torch.uint8).numpy())
    source = fp8._Scaled(codes, scales.numpy(), (64, 64), (16, 16))
    part = slice(16, 48), slice(8, 16)
    assert np.array_equal(source[part], values.numpy()[part]) and codes.size == 32 * 8
    parts, values = to_bits(torch.randn(64, 64), quant_type="nf4", blocksize=64)
    codes, absmax = (Recorder(parts[name].numpy()) for name in ("weight", "weight.absmax"))
    source = bitsandbytes._Blocks(codes, absmax, state=bitsandbytes._State("nf4", (64, 64), 64))
    assert np.array_equal(source[part], values.numpy()[part])
    assert codes.size <= 32 * 32 + 1 and absmax.size == 32  # of 64 * 32 bytes and 64 blocks


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_the_one_it_stands_for(packed, kind, shards):
    directory, plain = packed(kind, shards)
    model, expected = formats.load(directory), formats.load(plain)
    assert same(model.params, expected.params)
    name = {"i": "int8", "n": "4-bit NF4", "f": "FP8"}[kind[0]] if kind != "fp4" else "4-bit FP4"
    assert any(f"weights are stored in {name}; they are dequant" in note for note in model.notes)
    left = any("14 scales of activations left out" in note for note in model.notes)
    assert left == (kind == "fp8 tensors")
    if kind in ("fp8 blocks", "nf4 nested") and shards == 2:
        tokens = np.random.default_rng(0).integers(1, 97, (2, 20), dtype=np.int32)
        logits = [jax.jit(one.apply)(one.params, tokens) for one in (model, expected)]
        assert np.array_equal(*logits)


@pytest.mark.parametrize("kind", ["fp8 blocks", "nf4"])
def test_dtypes(packed, edit_json, kind):
    """Without another one the dtype of config.json; values are rounded once."""
    directory, plain = packed(kind)
    wanted = formats.load(plain, dtype="bfloat16").params
    edit_json(directory / "config.json", dtype="bfloat16")
    found = tree.flatten(formats.load(directory).params)
    for path, leaf in tree.flatten(wanted).items():
        if path[-1] == "kernel" and path[0] != "lm_head":
            assert same(found[path], leaf), path
    assert same(formats.load(directory, dtype="bfloat16").params, wanted)
    edit_json(directory / "config.json", dtype="float32")
    again = tree.flatten(formats.load(directory, dtype="nf4").params)
    for path, leaf in tree.flatten(formats.load(plain).params).items():
        if path[-1] == "kernel" and path[0] != "lm_head":
            leaf = jax.jit(quantize, static_argnums=1)(leaf, "nf4")
        assert same(again[path], leaf), path


@pytest.mark.parametrize("kind", ["fp8 tensors"])
def test_transformers_reads_the_same(packed, kind):
    directory, _ = packed(kind, vocab_size=97)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    leaves = tree.flatten(formats.load(directory).params)
    for layer in range(2):
        value = theirs.model.layers[layer].mlp.up_proj.weight.detach().float().numpy()
        ours = leaves["model", "layers", "mlp", "up_proj", "kernel"][layer]
        assert np.array_equal(np.asarray(ours).T, value)


@pytest.mark.parametrize("kind", ["fp8 tensors", "nf4"])
def test_the_text_of_a_model_that_reads_images(tmp_path, kind):
    """Ministral 3 in FP8 has images in plain numbers; here those of NF4 are quantised too."""
    plain, oracle = tmp_path / "plain", make("mistral3", "ministral3")
    oracle.save_pretrained(plain)
    with_names_of_modules(plain, oracle)
    with_old_names(plain, "mistral3")
    only = "language_model." if kind.startswith("fp8") else ""
    directory = pack(plain, tmp_path / "packed", kind, only=only)
    model = formats.load(directory)
    assert same(model.params, formats.load(plain).params)
    formats.write_model(tmp_path / "written", model, model.params, directory)
    written = load_file(tmp_path / "written" / "model.safetensors")
    expected = load_file(plain / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert "quantization_config" not in json.loads((tmp_path / "written/config.json").read_text())


def test_the_fingerprint_covers_scales_and_no_division_into_files(packed):
    directory, _ = packed("fp8 blocks")
    digest = fingerprint.base_digest(directory)
    assert digest == fingerprint.base_digest(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    write(directory, tensors, 2)
    assert fingerprint.base_digest(directory) == digest
    tensors[f"{NAME}.weight_scale_inv"][0, 0] *= 2
    write(directory, tensors, 2)
    assert fingerprint.base_digest(directory) != digest


def test_matrices_are_read_one_at_a_time(packed):
    directory, plain = packed("nf4 nested")
    path = ("model", "layers", "mlp", "up_proj", "kernel")
    with formats.open_matrices(directory, formats.describe(directory)) as read:
        found = read(path, (0,))
    assert np.array_equal(found, load_file(plain / "model.safetensors")[f"{NAME}.weight"].T)


def without(end):
    return lambda tensors: tensors.pop(f"{NAME}.{end}")


def changed(end, change):
    return lambda tensors: tensors.update({f"{NAME}.{end}": change(tensors[f"{NAME}.{end}"])})


def with_state(**fields):
    def change(state):
        content = json.loads(bytes(state.tolist())) | fields
        return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return changed(STATE, change)


def filled(value):
    return lambda tensor: torch.full_like(tensor, value)


def shortened(tensor):
    return tensor[1:].contiguous()


STATE = "weight.quant_state.bitsandbytes__nf4"
SCALES = "weight_scale_inv"
DAMAGE = [
    ("fp8 blocks", without(SCALES), f"{NAME}.weight (72, 36) has no weight_scale_inv"),
    ("fp8 blocks", without("weight"), f"{NAME}.{SCALES} has no weight: {NAME}.weight is missing"),
    ("fp8 blocks", changed("weight", lambda x: x.float()), f"{NAME}.weight is float32, not float8"),
    (
        "fp8 blocks",
        changed(SCALES, shortened),
        f"{NAME}.weight (72, 36) and its scales (4, 2) of",
    ),
    ("fp8 blocks", changed(SCALES, lambda x: x.int()), "of int32 do not fit: expected for blocks "),
    ("fp8 blocks", changed(SCALES, filled(np.inf)), f"not a number in:\n  {NAME}.weight"),
    ("fp8 features", changed("weight_scale", filled(3e38)), f"not a number in:\n  {NAME}.weight"),
    ("fp8 features", changed("weight", lambda x: x[None]), f"{NAME}.weight (1, 72, 36) and its sc"),
    ("nf4", without("weight"), f"{NAME}.weight: is missing, and "),
    ("nf4", without("weight.absmax"), f"{NAME}.weight: has no absmax"),
    ("nf4", without("weight.quant_map"), f"{NAME}.weight: has no quant_map"),
    ("nf4", without(STATE), f"{NAME}.weight: has 0 quant_state of nf4, fp4, not one"),
    ("nf4", changed("weight.absmax", shortened), "absmax is (40,) of float32, not (41,) of float3"),
    ("nf4", changed("weight.absmax", filled(np.nan)), f"not a number in:\n  {NAME}.weight"),
    ("nf4", changed("weight.quant_map", filled(0.5)), "quant_map has other values than those of "),
    ("nf4", changed("weight", shortened), "is (1295, 1) of uint8, which are not the 4 bits of (7"),
    ("nf4", changed(STATE, lambda x: x[:-1].clone()), f"{NAME}.weight: quant_state is not JSON: "),
    ("nf4", changed(STATE, filled(255)), f"{NAME}.weight: quant_state is not JSON: "),
    ("nf4", changed(STATE, lambda x: x.repeat(999)), "quant_state is (76923,) of uint8, not bytes"),
    ("nf4", with_state(blocksize=2**40), "quant_state has blocksize=1099511627776, which is not"),
    ("nf4", with_state(blocksize=True), "quant_state has blocksize=True, which is not supported"),
    ("nf4", with_state(shape=[72]), "quant_state has shape=[72], which is not supported"),
    ("nf4", with_state(shape=[36, 72]), f"{NAME}.weight has shape (36, 72), config.json asks for "),
    ("nf4", with_state(shape=[2**30, 2**30]), "which are not the 4 bits of (1073741824, 107374182"),
    ("nf4", with_state(quant_type="fp4"), "quant_state has quant_type='fp4', which is not support"),
    ("nf4", with_state(more=1), "does not have blocksize, dtype, quant_type, shape"),
    ("nf4 nested", without("weight.nested_absmax"), f"{NAME}.weight: quant_state={{"),
    ("nf4 nested", without("weight.nested_quant_map"), f"{NAME}.weight: has no nested_quant_map"),
    ("nf4 nested", with_state(nested_offset="x"), "nested_offset='x', which is not supported"),
    ("nf4 nested", changed("weight.nested_absmax", filled(np.nan)), f"number in:\n  {NAME}.weight"),
    ("int8", without("SCB"), f"{NAME}.weight: has no SCB"),
    ("int8", changed("SCB", shortened), f"{NAME}.weight: SCB is (71,) of float32, not (72,) of fl"),
    ("int8", changed("SCB", filled(np.inf)), f"not a number in:\n  {NAME}.weight"),
    ("int8", changed("weight_format", filled(2)), "weight_format is not 0, the layout of plain ro"),
    ("int8", changed("weight", lambda x: x.float()), "is (72, 36) of float32, not (out, in) of in"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(kind)`: the tensors and the config.json of a quantised model."""
    from ..conftest import TINY
    from ..families import save, torch_model

    made = {}

    def make(kind):
        if kind not in made:
            place = tmp_path_factory.mktemp("whole")
            save(torch_model("llama", 0, TINY), place / "plain")
            directory = pack(place / "plain", place / "packed", kind)
            config = (directory / "config.json").read_text()
            made[kind] = load_file(directory / "model.safetensors"), config
        return made[kind]

    return make


@pytest.mark.parametrize(("kind", "damage", "expected"), DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_files_are_refused(whole, tmp_path, kind, damage, expected):
    tensors, config = whole(kind)
    tensors = dict(tensors)
    damage(tensors)
    write(tmp_path, tensors)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as raised:
        formats.load(tmp_path)
    assert expected in str(raised.value) and str(tmp_path) in str(raised.value)


def test_quantised_files_that_config_json_does_not_mention(packed, edit_json):
    for kind, dtype in (("fp8 blocks", "float8_e4m3fn"), ("int8", "int8"), ("nf4", "uint8")):
        directory, _ = packed(kind)
        edit_json(directory / "config.json", drop=["quantization_config"])
        with pytest.raises(UserError, match=f"model.safetensors: .* has dtype {dtype}; supported"):
            formats.load(directory)
