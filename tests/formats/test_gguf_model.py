"""Models as GGUF files: round trips through our own reader, dtypes, and what is refused."""

import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterConfig, UserError, formats, lora
from lora_jax.formats import Chat
from lora_jax.formats.gguf import convert
from lora_jax.tree import flatten

from ..train.tiny import random_adapters
from .gguf_models import KINDS, write_llama, write_tiny
from .test_gguf import write, write_gemma

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def fields_of(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("write", [write, write_gemma], ids=["llama", "gemma3"])
def test_a_converted_file_comes_back_as_it_was(tmp_path, write):
    write(tmp_path / "first.gguf")
    first = convert(tmp_path / "first.gguf", tmp_path / "first")
    model = formats.load(first)
    formats.write_gguf_model(tmp_path / "again", model, model.params)
    second = convert(tmp_path / "again" / "model.gguf", tmp_path / "second")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir()) and len(names) == 5
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize(
    "fields",
    [
        *(KINDS["llama"], KINDS["mistral"], {}),
        dict(rope_scaling={"rope_type": "linear", "factor": 4.0}),
        dict(rope_scaling=LLAMA3, rope_theta=500_000.0),
        KINDS["mistral"] | dict(sliding_window=256),  # as long as the longest text
    ],
    ids=["llama", "mistral", "tied", "linear", "llama3", "long window"],
)
def test_our_reader_finds_the_model(tmp_path, fields):
    model = write_llama(tmp_path / "m", **fields)
    formats.write_gguf_model(tmp_path / "g", model, model.params)
    found = formats.load(convert(tmp_path / "g" / "model.gguf", tmp_path / "back"))
    assert found.hf_config["model_type"] == "llama"
    expected = flatten(model.params)
    assert flatten(found.params).keys() == expected.keys()
    for path, leaf in flatten(found.params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=str(path))
    tokens = np.arange(3, 40)[None]
    np.testing.assert_allclose(
        found.apply(found.params, tokens), model.apply(model.params, tokens), atol=1e-5
    )
    own, other = (formats.load_tokenizer(one.directory) for one in (model, found))
    text = "ab <|im_start|>über 12  c<|im_end|>"
    assert own.encode(text) == other.encode(text)
    assert own.chat_template == other.chat_template != ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merged_weights_in_every_dtype(tmp_path, kind, dtype):
    model = write_tiny(kind, tmp_path / "m")
    config = AdapterConfig(target_modules="all-linear", rank=2)
    adapters = random_adapters(lora.init(jax.random.key(0), model.params, config)[1])
    merged = lora.merge(lora.bind(model.params, adapters, config))
    merged = jax.tree.map(lambda x: x.astype(dtype), merged)
    formats.write_gguf_model(tmp_path / "g", model, merged)
    short = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    for tensor in gguf.GGUFReader(tmp_path / "g" / "model.gguf").tensors:
        expected = "F32" if len(tensor.shape) == 1 else short  # llama.cpp's norms are float32
        assert tensor.tensor_type.name == expected, tensor.name
    found = formats.load(convert(tmp_path / "g" / "model.gguf", tmp_path / "back"))
    for path, leaf in flatten(merged).items():
        got, offset = flatten(found.params)[path], kind == "gemma3" and path[-1] == "scale"
        tolerance = 2**-23 if offset else 0  # 1 + w is rounded, and w is at most 2
        np.testing.assert_allclose(got, leaf.astype(jnp.float32), rtol=0, atol=tolerance)


def test_a_head_that_training_untied_is_in_the_file(tmp_path):
    model = write_llama(tmp_path / "m")
    config = AdapterConfig(target_modules=["embed_tokens"], ensure_weight_tying=False)
    adapters = random_adapters(lora.init(jax.random.key(0), model.params, config)[1])
    merged = lora.merge(lora.bind(model.params, adapters, config))
    formats.write_gguf_model(tmp_path / "g", model, merged)
    found = formats.load(convert(tmp_path / "g" / "model.gguf", tmp_path / "back"))
    tokens = np.arange(3, 40)[None]
    live = model.apply(lora.bind(model.params, adapters, config), tokens)
    assert np.abs(live - model.apply(model.params, tokens)).max() > 1e-2
    np.testing.assert_allclose(found.apply(found.params, tokens), live, atol=1e-4)


def test_tokens_stops_and_template(tmp_path):
    model = write_llama(tmp_path / "m")
    chat = Chat(stops=[1], template="{{ messages[0] }}", system_prompt="Be brief.\nAlways.")
    for name in ("g", "again"):
        formats.write_gguf_model(tmp_path / name, model, model.params, chat=chat)
    file = tmp_path / "g" / "model.gguf"
    assert file.read_bytes() == (tmp_path / "again" / "model.gguf").read_bytes()
    fields = fields_of(file)
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[:3] == ["<pad>", "<|im_start|>", "<|im_end|>"]
    # 272 rows, 260 tokens: the others are marked as unused.
    assert (tokens[259], tokens[260], len(tokens)) == ("ab", "[PAD260]", 272)
    assert fields["tokenizer.ggml.token_type"] == [3] * 3 + [1] * 257 + [5] * 12
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.eos_token_id"] == 1  # at which the run was trained to stop
    assert fields["tokenizer.ggml.eot_token_id"] == 2
    assert not fields["tokenizer.ggml.add_bos_token"] and not fields["tokenizer.ggml.add_eos_token"]
    assert fields["tokenizer.chat_template"] == "{{ messages[0] }}"
    assert (tmp_path / "g" / "Modelfile").read_text() == (
        'FROM ./model.gguf\nPARAMETER stop "<|im_start|>"\nSYSTEM """Be brief.\nAlways."""\n'
    )


REFUSED = {
    "biases": (dict(attention_bias=True), "llama cannot hold attention_bias=True"),
    "activation": (dict(hidden_act="gelu"), "cannot hold hidden_act='gelu'"),
    "window": (KINDS["mistral"] | dict(sliding_window=5), "cannot hold sliding_window=5"),
    "rope": (
        dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "cannot hold rope_parameters=.*dynamic",
    ),
    "rope of llama3": (
        dict(rope_scaling=LLAMA3 | {"low_freq_factor": 2.0}),
        "rope_freqs.weight is not that of Llama 3.1",
    ),
    "architecture": (
        dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=8),
        "model_type='qwen3'; supported: llama, mistral, gemma3_text; use --format hf",
    ),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_models_that_the_file_cannot_hold(tmp_path, fields, message):
    model = write_llama(tmp_path / "m", **fields)
    with pytest.raises(UserError, match=message):
        formats.write_gguf_model(tmp_path / "g", model, model.params)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def with_split(content):
    content["pre_tokenizer"]["add_prefix_space"] = True


def with_normalizer(content):
    content["normalizer"] = {"type": "NFC"}


def without_merges(content):
    content["model"]["merges"] = []


def with_strip(content):
    content["added_tokens"][1]["rstrip"] = True


def with_many_tokens(content):
    content["model"]["vocab"] |= {f"extra{i}": 260 + i for i in range(20)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_split, "its pre-tokenizer is none of: gpt-2, smollm, llama-bpe"),
        (with_normalizer, "it has a normalizer"),
        (without_merges, "it has no merges"),
        (with_strip, r"its token '<\|im_start\|>' has rstrip"),
        (with_many_tokens, "it has ids outside of the 272 rows of the embedding"),
    ],
)
def test_tokenizers_that_llama_cpp_would_read_otherwise(tmp_path, change, message):
    model = write_llama(tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        formats.write_gguf_model(tmp_path / "g", model, model.params)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_gemma_pieces_whose_merges_no_score_can_order(tmp_path):
    model = write_tiny("gemma3", tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [*merges[::2], *merges[1::2]]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="are not next to each other"):
        formats.write_gguf_model(tmp_path / "g", model, model.params)
