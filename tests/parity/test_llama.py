"""Llama and Mistral against transformers, on tiny random models: forward, padding, packing, cache,
files.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from lora_jax import formats

from ..engines import complete

TOLERANCE = 1e-5
SEEDS = (0, 1)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,  # head size 16 has frequencies on both sides and between
)
LINEAR = dict(rope_type="linear", rope_theta=700.0, factor=4.0)
VARIANTS = {
    "grouped": {},
    "tied": dict(tie_word_embeddings=True),
    "all heads": dict(num_key_value_heads=6),
    "one kv head": dict(num_key_value_heads=1),
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "both biases, tied": dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "implied head_dim": dict(head_dim=None),
    "gelu": dict(hidden_act="gelu"),
    "gelu_pytorch_tanh": dict(hidden_act="gelu_pytorch_tanh"),
    "relu": dict(hidden_act="relu"),
    "rms_norm_eps": dict(rms_norm_eps=0.05),
    "theta": dict(rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "linear": dict(rope_parameters=LINEAR),
    "llama3": dict(rope_parameters=LLAMA3, head_dim=16),
    "mistral, window": dict(family="mistral", sliding_window=5),
    "mistral, no window": dict(family="mistral", sliding_window=None),
    "mistral, theta, tied": dict(
        family="mistral",
        sliding_window=7,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    ),
}
CHANGES_NUMBERS = ["hidden_act", "rms_norm_eps", "rope_parameters", "sliding_window"]


def random_tokens(shape, seed=0, vocab=97) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, vocab, shape, dtype=np.int32)


def torch_logits(oracle, tokens, **inputs) -> np.ndarray:
    with torch.no_grad():
        inputs = {name: torch.tensor(np.asarray(value)).long() for name, value in inputs.items()}
        return oracle(torch.tensor(tokens).long(), use_cache=False, **inputs).logits.numpy()


def read_tensors(directory) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor in a model directory."""
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as handle:
            for name in handle.keys():
                array = handle.get_tensor(name)
                assert name not in found
                found[name] = (str(array.dtype), array.shape, array.tobytes())
    return found


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits(tiny_llama, error, config):
    apply = None
    for seed in SEEDS:
        directory, oracle = tiny_llama(seed, **config)
        model = formats.load(directory)
        apply = apply or jax.jit(model.apply)
        tokens = random_tokens((2, 80), seed)
        expected = torch_logits(oracle, tokens)
        assert np.abs(expected).max() > 1
        assert error(apply(model.params, tokens), expected) < TOLERANCE


@pytest.mark.parametrize(
    "config",
    [config for config in VARIANTS.values() if set(config) & set(CHANGES_NUMBERS)],
    ids=[name for name, config in VARIANTS.items() if set(config) & set(CHANGES_NUMBERS)],
)
def test_the_fields_of_the_variants_change_the_numbers(tiny_llama, error, config):
    """Otherwise the parity of the variant would say nothing about the field."""
    directory, oracle = tiny_llama(**config)
    plain = dict(config)
    for name in CHANGES_NUMBERS:
        plain.pop(name, None)
    if config.get("sliding_window", 0) is None:
        plain["sliding_window"] = 5
    _, without = tiny_llama(**plain)
    without.load_state_dict(oracle.state_dict())
    tokens = random_tokens((2, 80))
    assert error(torch_logits(without, tokens), torch_logits(oracle, tokens)) > 1e-3


OLD_FORMS = {
    "theta": ({"rope_theta": 500.0}, dict(rope_type="default", rope_theta=500.0)),
    "theta, null scaling": (
        {"rope_theta": 500.0, "rope_scaling": None},
        dict(rope_type="default", rope_theta=500.0),
    ),
    "type": ({"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 4.0}}, LINEAR),
    "rope_type": (
        {"rope_theta": 700.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        LINEAR,
    ),
    "both": (
        {
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "llama3"}
            | {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
        },
        LLAMA3,
    ),
    "neither": ({}, dict(rope_type="default", rope_theta=10000.0)),
}


@pytest.mark.parametrize(("old", "new"), OLD_FORMS.values(), ids=OLD_FORMS)
def test_config_json_from_before_transformers_5(tiny_llama, edit_json, error, old, new):
    directory, oracle = tiny_llama(rope_parameters=new, head_dim=16)
    edit_json(directory / "config.json", drop=["rope_parameters"], **old)
    model = formats.load(directory)
    tokens = random_tokens((2, 80))
    assert error(model.apply(model.params, tokens), torch_logits(oracle, tokens)) < TOLERANCE


def test_absent_fields_have_the_defaults_of_transformers(tiny_llama, edit_json, error):
    directory, oracle = tiny_llama(head_dim=None, num_key_value_heads=6)
    absent = ["head_dim", "num_key_value_heads", "attention_bias", "mlp_bias", "hidden_act"]
    absent += ["rms_norm_eps", "rope_parameters", "tie_word_embeddings", "sliding_window"]
    edit_json(directory / "config.json", drop=[*absent, "max_position_embeddings"])
    model = formats.load(directory)
    tokens = random_tokens((2, 20))
    assert error(model.apply(model.params, tokens), torch_logits(oracle, tokens)) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["grouped", "mistral, window"])
def test_padding_equals_attention_mask(tiny_llama, error, name, side):
    apply = None
    for seed in SEEDS:
        directory, oracle = tiny_llama(seed, **VARIANTS[name])
        model = formats.load(directory)
        apply = apply or jax.jit(model.apply)
        tokens, lengths = random_tokens((3, 20), seed), np.array([20, 13, 4])
        slots = np.arange(20)[None]
        real = slots < lengths[:, None] if side == "right" else slots >= 20 - lengths[:, None]
        positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
        expected = torch_logits(oracle, tokens, attention_mask=real, position_ids=positions)
        logits = apply(model.params, tokens, positions=positions, segment_ids=real.astype(np.int32))
        assert error(np.asarray(logits)[real], expected[real]) < TOLERANCE
        if side == "left":  # on the right the pads come after everything that is compared
            everything = np.ones_like(real)
            unmasked = torch_logits(
                oracle, tokens, attention_mask=everything, position_ids=positions
            )
            assert error(unmasked[real], expected[real]) > 1e-3


@pytest.mark.parametrize("name", ["grouped", "llama3", "mistral, window"])
def test_packed_texts_equal_each_text_alone(tiny_llama, error, name):
    lengths = [[7, 12, 5], [20, 3]]
    segment_ids, positions = np.zeros((2, 26), np.int32), np.zeros((2, 26), np.int32)
    for row, parts in enumerate(lengths):
        start = 0
        for number, length in enumerate(parts, 1):
            segment_ids[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    apply = None
    for seed in SEEDS:
        directory, oracle = tiny_llama(seed, **VARIANTS[name])
        model = formats.load(directory)
        apply = apply or jax.jit(model.apply)
        tokens = random_tokens((2, 26), seed)
        logits = np.asarray(
            apply(model.params, tokens, positions=positions, segment_ids=segment_ids)
        )
        leaking = torch_logits(  # the mask keeps transformers from seeing the texts by positions
            oracle, tokens, position_ids=positions, attention_mask=np.ones_like(tokens)
        )
        for row, parts in enumerate(lengths):
            for number in range(1, len(parts) + 1):
                own = segment_ids[row] == number
                alone = torch_logits(oracle, tokens[row : row + 1, own])[0]
                assert error(logits[row, own], alone) < TOLERANCE
                if number > 1:
                    assert error(leaking[row, own], alone) > 1e-3


@pytest.mark.parametrize("name", ["both biases, tied", "llama3", "mistral, window"])
def test_cache_step_by_step_equals_the_full_forward(tiny_llama, error, name):
    """A prompt of 9 slots, padded on the left, then a chunk of 3 tokens, then one at a time."""
    directory, oracle = tiny_llama(**VARIANTS[name])
    model = formats.load(directory)
    total, tokens = 20, random_tokens((3, 20))
    real = np.arange(total)[None] >= np.array([0, 4, 8])[:, None]
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    expected = torch_logits(oracle, tokens, attention_mask=real, position_ids=positions)
    segment_ids = real.astype(np.int32)

    @jax.jit
    def advance(params, cache, tokens, positions, segment_ids):
        module = model.module(params)
        hidden, cache = module.hidden(
            tokens, positions=positions, segment_ids=segment_ids, cache=cache
        )
        return module.logits(hidden), cache

    cache, logits = model.empty_cache(3, total + 5, jnp.float32), []
    for start, end in [(0, 9), (9, 12), *((i, i + 1) for i in range(12, total))]:
        part = slice(start, end)
        new, cache = advance(
            model.params, cache, tokens[:, part], positions[:, part], segment_ids[:, part]
        )
        logits.append(np.asarray(new))
    assert error(np.concatenate(logits, axis=1)[real], expected[real]) < TOLERANCE


@pytest.mark.parametrize("name", ["tied", "llama3", "mistral, window"])
def test_greedy_tokens_equal_transformers(tiny_llama, name):
    for seed in SEEDS:
        directory, oracle = tiny_llama(seed, **VARIANTS[name])
        model = formats.load(directory)
        prompts = [random_tokens(n, seed + n).tolist() for n in (11, 4, 1)]
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        expected = oracle.generate(
            padded,
            attention_mask=(padded != 0).long(),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )[:, longest:].tolist()
        answers = complete(model, prompts, 12)
        assert answers == expected
        assert len({tuple(answer) for answer in answers}) == len(prompts)
        stop = expected[0][5]
        answers = complete(model, prompts, 12, {stop})
        assert answers[0] == expected[0][: expected[0].index(stop)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_of_every_dtype(tiny_llama, error, dtype):
    directory, oracle = tiny_llama(dtype=dtype)
    model = formats.load(directory)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {dtype}
    tokens = random_tokens((2, 20))
    assert error(model.apply(model.params, tokens), torch_logits(oracle, tokens)) < TOLERANCE
    wide = formats.load(directory, dtype=jnp.float32)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(wide.params)} == {"float32"}
    np.testing.assert_array_equal(
        wide.params["model"]["norm"]["scale"], oracle.state_dict()["model.norm.weight"].numpy()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_shards_and_the_round_trip_keep_every_bit(tiny_llama, tmp_path, dtype, tied):
    config = dict(dtype=dtype, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    single, oracle = tiny_llama(**config)
    sharded, _ = tiny_llama(max_shard_size="20KB", **config)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = read_tensors(single)
    assert read_tensors(sharded) == expected
    model, other = formats.load(single), formats.load(sharded)
    assert jax.tree.structure(model.params) == jax.tree.structure(other.params)
    for x, y in zip(jax.tree.leaves(model.params), jax.tree.leaves(other.params), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for size in ("1GB", "20KB"):
        target = tmp_path / f"written {size}"
        formats.write_model(target, model, model.params, single, max_shard_size=size)
        assert (len(list(target.glob("*.safetensors"))) > 2) == (size == "20KB")
        assert read_tensors(target) == expected
        before, after = (
            json.loads((path / "config.json").read_text()) for path in (single, target)
        )
        assert before == after
        loaded, info = transformers.LlamaForCausalLM.from_pretrained(
            target, output_loading_info=True
        )
        assert not any(info.values()), info
        assert str(loaded.dtype) == f"torch.{dtype}"
        tokens = random_tokens((1, 8))
        np.testing.assert_array_equal(
            torch_logits(loaded.float(), tokens), torch_logits(oracle, tokens)
        )
