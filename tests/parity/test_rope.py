"""Stretched rotary positions against transformers: inverse frequencies bit by bit; texts below and
beyond the original length alone, packed, in chunks and as they grow in a cache.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from lora_jax import formats
from lora_jax.nn import rope
from lora_jax.nn.virtual import Prefix, Prompt

from ..engines import complete
from ..families import FAMILIES, describe
from ..methods import QUICK

TOLERANCE = 1e-5
ORIGINAL = 16
SHORT = dict(max_position_embeddings=ORIGINAL, head_dim=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
LONGROPE = dict(rope_type="longrope", rope_theta=100.0)
LISTS = dict(short_factor=[1.0, 1.05, 2.0], long_factor=[1.1, 5.0, 30.0])
PHI3 = dict(original_max_position_embeddings=ORIGINAL)
# Ways of stretching: (family, other fields, rope_parameters). Others are in `test_llama`.
ROPES = {
    "dynamic": ("llama", SHORT, dict(rope_type="dynamic", factor=3.0, rope_theta=500.0)),
    "yarn": ("llama", dict(head_dim=16), dict(**YARN, rope_theta=100.0)),
    "yarn, mscale": (
        "llama",
        dict(head_dim=16),
        dict(**YARN, rope_theta=100.0, mscale=0.4, mscale_all_dim=2.5, beta_fast=1.5),
    ),
    "yarn, given size, not truncated": (
        "llama",
        dict(head_dim=16),
        dict(**YARN, rope_theta=100.0, attention_factor=0.6, truncate=False, beta_slow=0.4),
    ),
    "longrope": ("phi3", PHI3, dict(**LONGROPE, **LISTS)),
    "longrope, given size, part rotated": (
        "phi3",
        PHI3,
        dict(
            **LONGROPE,
            partial_rotary_factor=0.7,
            attention_factor=0.6,
            short_factor=[1.0, 1.5],
            long_factor=[2.0, 7.0],
        ),
    ),
    "longrope, given factor": (
        "llama",
        dict(head_dim=6),
        dict(**LONGROPE, **LISTS, factor=3.0, original_max_position_embeddings=ORIGINAL),
    ),
}
BY_LENGTH = {name: row for name, row in ROPES.items() if not name.startswith("yarn")}
EACH_BY_LENGTH = pytest.mark.parametrize("name", BY_LENGTH)
EACH_KIND = pytest.mark.parametrize("name", ["dynamic", "longrope"])

# Of real models: head size, max_position_embeddings, rope_parameters.
RNG = np.random.default_rng(0)
PHI35 = dict(short_factor=[*1 + RNG.random(48)], long_factor=[*1 + 60 * RNG.random(48)])
PHI4 = dict(short_factor=[1.0] * 48, long_factor=[*1 + 50 * RNG.random(48)])
LLAMA31 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
REAL = {
    "SmolLM2": (64, 8192, dict(rope_type="default", rope_theta=1e5)),
    "Llama 2": (128, 4096, dict(rope_type="default", rope_theta=1e4)),
    "Gemma 3": (256, 131072, dict(rope_type="linear", rope_theta=1e6, factor=8.0)),
    "Llama 3.1": (128, 131072, dict(rope_type="llama3", rope_theta=5e5, **LLAMA31)),
    "Llama 3.2": (64, 131072, dict(rope_type="llama3", rope_theta=5e5, **LLAMA31 | {"factor": 32})),
    "Qwen 3": (
        128,
        131072,
        dict(YARN, rope_theta=1000000, original_max_position_embeddings=32768),
    ),
    "yarn, by hand": (
        80,
        32768,
        dict(YARN, rope_theta=1e4, beta_fast=20, beta_slow=2.5, truncate=False),
    ),
    "dynamic": (128, 4096, dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
    "dynamic, odd numbers": (80, 3000, dict(rope_type="dynamic", rope_theta=5e5, factor=1.7)),
    "Phi 3.5": (96, 131072, LONGROPE | PHI35 | dict(rope_theta=1e4)),
    "Phi 4": (128, 131072, LONGROPE | PHI4 | dict(rope_theta=1e4, partial_rotary_factor=0.75)),
}


def jit(function):
    return jax.jit(function, compiler_options=QUICK)


def random_tokens(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 97, shape, dtype=np.int32)


def make(tiny_model, name, seed=0):
    family, more, parameters = ROPES[name]
    size = FAMILIES[family].size | more | dict(rope_parameters=parameters)
    directory, oracle = tiny_model(family, seed, **size)
    return formats.load(directory), oracle


def uncached(oracle, tokens) -> np.ndarray:
    """Logits of transformers in one forward; the dynamic type remembers no longer text."""
    with torch.no_grad():
        oracle(torch.ones(1, 1).long(), use_cache=False)
        return oracle(torch.tensor(np.asarray(tokens)).long(), use_cache=False).logits.numpy()


def greedy(oracle, prompt, count) -> list[int]:
    """Tokens that transformers finds most likely, each by a forward over the whole text."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(uncached(oracle, [tokens])[0, -1].argmax()))
    return tokens[len(prompt) :]


def theirs(head_dim, longest, parameters):
    """A config of transformers, and the settings as the reader hands them on."""
    config = transformers.Phi3Config(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=longest,
        original_max_position_embeddings=parameters.get("original_max_position_embeddings", 4096),
    )
    config.rope_parameters = {
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 4096,
        **copy.deepcopy(parameters),
    }
    return config, config.rope_parameters | {"max_position_embeddings": longest}


def apart(found, expected) -> np.ndarray:
    """Distances in units of the last bit."""
    assert found.dtype == expected.dtype == np.float32
    return np.abs(found.view(np.int32).astype(int) - expected.view(np.int32))


@pytest.mark.parametrize("name", REAL)
def test_inverse_frequencies_are_those_of_transformers(name):
    """To the last bit; but torch rounds a power in a hundred the wrong way on some processors."""
    head_dim, longest, parameters = REAL[name]
    config, settings = theirs(head_dim, longest, parameters)
    dim = rope.rotary_features(head_dim, settings)
    kind = parameters["rope_type"]
    compute = ROPE_INIT_FUNCTIONS.get(kind, Phi3RotaryEmbedding.compute_default_rope_parameters)
    lengths = [None]
    if kind in ("dynamic", "longrope"):
        lengths += [torch.tensor(n) for n in (4097, 5003, 9999, 3 * longest + 1)]
    wrong = []
    for length in lengths:
        expected, scale = compute(config, torch.device("cpu"), seq_len=length)
        if length is None:
            found = rope.inverse_frequencies(dim, settings)
        else:
            of_length = jit(lambda lengths: rope.frequencies_of(lengths, dim, settings))
            found = np.asarray(of_length(jnp.full((1, 1, 1), int(length))))[0, 0]
        wrong.append(apart(found, expected.numpy()))
        assert rope.attention_factor(settings) == scale
    assert np.mean(np.asarray(wrong) > 0) <= 0.04  # powers of NumPy alone give 0.15
    assert np.max(wrong) <= 4
    assert np.max(wrong[0]) <= 2


@pytest.mark.parametrize("name", REAL)
def test_cosines_at_large_positions(error, name):
    head_dim, longest, parameters = REAL[name]
    config, settings = theirs(head_dim, longest, parameters)
    positions = np.r_[:40, 2950:3001][None].astype(np.int32)
    rotary = Phi3RotaryEmbedding(config)
    for last in (3999, 4996, 5000):
        positions[0, -1] = last
        expected = rotary(torch.zeros(1), torch.tensor(positions))
        lengths = np.full_like(positions, last + 1)
        found = jit(lambda p, n: rope.rope(p, head_dim, settings, n))(positions, lengths)
        for one, other in zip(found, expected, strict=True):
            assert error(one[:, :, 0], other.numpy()) < 3e-5


@pytest.mark.parametrize("name", ROPES)
def test_texts_beyond_the_original_length(tiny_model, error, name):
    """At once, and in chunks of a text whose length is given."""
    model, oracle = make(tiny_model, name)
    texts = random_tokens((2, 40))
    expected = uncached(oracle, texts)
    assert error(jit(model.apply)(model.params, texts), expected) < TOLERANCE

    @jit
    def advance(params, cache, tokens, positions, segment_ids, lengths):
        module = model.module(params)
        more = {"positions": positions, "segment_ids": segment_ids}
        cache = dataclasses.replace(cache, lengths=lengths)
        hidden, cache = module.hidden(tokens, cache=cache, **more)
        return module.logits(hidden), cache

    cache, found = model.empty_cache(2, 40, jnp.float32), []
    positions = np.broadcast_to(np.arange(40, dtype=np.int32), texts.shape)
    for part in (np.s_[:, :20], np.s_[:, 20:]):
        ones = np.ones_like(texts[part])
        given = (texts[part], positions[part], ones, 40 * ones)
        logits, cache = advance(model.params, cache, *given)
        found.append(logits)
    assert error(np.concatenate(found, axis=1), expected) < TOLERANCE
    parts = [uncached(oracle, texts[:, :end])[:, -1] for end in range(1, 41)]
    assert (error(np.stack(parts, 1), expected) > 1e-2) == (name in BY_LENGTH)


@EACH_BY_LENGTH
def test_packed_texts_are_turned_by_their_own_lengths(tiny_model, error, name):
    """Texts on both sides of the original length in one row; padding on the left and the right."""
    segment_ids, positions = np.zeros((3, 40), np.int32), np.zeros((3, 40), np.int32)
    texts = [(0, 0, 10), (0, 10, 27), (0, 27, 40), (1, 2, 35), (1, 35, 40), (2, 0, 16), (2, 16, 33)]
    for number, (row, start, end) in enumerate(texts, 1):
        segment_ids[row, start:end] = number
        positions[row, start:end] = np.arange(end - start)
    apply = None
    for seed in (0, 1):
        model, oracle = make(tiny_model, name, seed)
        apply = apply or jit(model.apply)
        tokens = random_tokens((3, 40), seed)
        own = {"positions": positions, "segment_ids": segment_ids}
        logits = apply(model.params, tokens, **own)
        for row, start, end in texts:
            alone = uncached(oracle, tokens[row : row + 1, start:end])[0]
            assert error(logits[row, start:end], alone) < TOLERANCE


@EACH_KIND
def test_a_text_that_grows_beyond_the_original_length(tiny_model, name):
    """Rows that switch at different steps, before the first and after the last, and never."""
    model, oracle = make(tiny_model, name)
    starts = (3, ORIGINAL - 4, ORIGINAL, ORIGINAL + 9, 6)
    prompts = [random_tokens(n, n).tolist() for n in starts]
    count = ORIGINAL - 1
    expected = [greedy(oracle, prompt, count) for prompt in prompts]
    answers = complete(model, prompts, count)
    assert answers == expected
    assert len({tuple(answer) for answer in answers}) == len(prompts)
    if name == "longrope":  # for Phi 3 it drops its cache where the text switches
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = torch.tensor([prompt])
            options = dict(max_new_tokens=count, do_sample=False, pad_token_id=0)
            found = oracle.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
            assert found[0, len(prompt) :].tolist() == answer


@EACH_KIND
def test_virtual_tokens_count(tiny_model, error, name):
    """Embeddings and keys of a text's first tokens give what the text gives."""
    model, oracle = make(tiny_model, name)
    count, time = 7, ORIGINAL + 3
    tokens = random_tokens((1, time))
    expected = uncached(oracle, tokens)[:, count:]
    first = model.params["model"]["embed_tokens"]["embedding"][tokens[0, :count]]
    rest = tokens[:, count:]
    logits = jit(model.apply)(model.params, rest, prefix=Prompt(first))
    assert error(logits, expected) < TOLERANCE

    @jit
    def read(params, tokens):
        empty = model.empty_cache(1, count, jnp.float32)
        return model.module(params).hidden(
            tokens,
            positions=jnp.arange(count)[None],
            segment_ids=jnp.ones_like(tokens),
            cache=dataclasses.replace(empty, lengths=jnp.full_like(tokens, time)),
        )

    _, cache = read(model.params, tokens[:, :count])
    parts = (x[:, 0].swapaxes(1, 2).reshape(len(x), count, -1) for x in (cache.keys, cache.values))
    logits = jit(model.apply)(model.params, rest, prefix=Prefix(*parts))
    assert error(logits, expected) < TOLERANCE

    prompt = tokens[0, : ORIGINAL - 2].tolist()
    answers = complete(model, [prompt[count:]], 6, prefix=Prompt(first))
    assert answers == [greedy(oracle, prompt, 6)]


@pytest.mark.parametrize("name", ROPES)
def test_what_can_be_left_out_changes_the_numbers(name):
    """Otherwise parity would say nothing about the field."""
    family, more, parameters = ROPES[name]
    size = FAMILIES[family].size | more

    def numbers(parameters):
        config = describe(family, **size, rope_parameters=parameters).config
        settings = config.rope_parameters[config.layer_types[0]]
        dim = rope.rotary_features(config.head_dim, settings)
        return [*rope.inverse_frequencies(dim, settings), rope.attention_factor(settings)]

    needed = {"rope_type", "factor", "short_factor", "long_factor", "partial_rotary_factor"}
    for field in {*parameters} - needed:
        without = {key: value for key, value in parameters.items() if key != field}
        assert numbers(without) != numbers(parameters), field


def test_lengths_are_those_of_segments():
    segment_ids = jnp.asarray([[0, 0, 7, 7, 7, 2, 9, 9], [1, 1, 1, 1, 1, 1, 0, 0]])
    positions = jnp.asarray([[0, 0, 0, 1, 2, 0, 4, 5], [0, 1, 2, 3, 4, 5, 0, 0]])
    lengths = rope.text_lengths(positions, segment_ids)
    assert lengths.tolist() == [[1, 1, 3, 3, 3, 1, 6, 6], [6, 6, 6, 6, 6, 6, 1, 1]]


def test_only_types_that_need_lengths_compute_them():
    def operations(**parameters):
        model = describe("llama", **FAMILIES["llama"].size, rope_parameters=parameters)
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        return str(jax.make_jaxpr(model.apply)(model.params, tokens))

    assert "cummin" in operations(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    assert "cummin" not in operations(rope_type="yarn", factor=2.0, rope_theta=1e4)
    with pytest.raises(ValueError, match="rope_type='dynamic' needs the lengths of the texts"):
        settings = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
        rope.rope(jnp.zeros((1, 1), int), 8, settings | dict(max_position_embeddings=4))
