"""A LoRA from two sets of weights: what moved, what is kept of it, and what is said of the rest."""

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import UserError
from lora_jax.adapters.extract import extract, find_changes, plan
from lora_jax.adapters.updates import reader
from lora_jax.tree import flatten, unflatten

from .test_combine import TIED, UNTIED, changes, distance, spectra, tiny

HEADS = ["embed_tokens", "q_proj", "down_proj", "up_proj"]


def move(model, chosen, seed=0, rank=None):
    """The weights of a model, those with `chosen(path)` moved, matrices by so many ranks."""
    rng, moved = np.random.default_rng(seed), {}
    for path, leaf in flatten(model.params).items():
        change = rng.standard_normal(leaf.shape)
        if rank and leaf.ndim > 1 and path[-1] in ("kernel", "embedding"):
            *lead, rows, columns = leaf.shape
            change = rng.standard_normal((*lead, rows, rank))
            change = change @ rng.standard_normal((*lead, rank, columns))
        moved[path] = leaf + jnp.asarray(0.1 * change, jnp.float32) * chosen(path)
    return unflatten(moved)


def run(model, tuned, **options):
    read, other = reader(model.params), reader(tuned)
    found = find_changes(model.params, read, other)
    return extract(model.params, plan(model.params, found, **options), read, other)


def difference(model, tuned):
    """As `changes` has it, of two trees."""
    base, leaves = flatten(model.params), flatten(tuned)
    found = {p: np.asarray(leaves[p], np.float64) - np.asarray(base[p], np.float64) for p in base}
    if not any("lm_head" in path for path in base):
        found["lm_head", "kernel"] = found["model", "embed_tokens", "embedding"]
    return found


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_has_the_rank_comes_back_and_more_loses_its_tail(family):
    for seed in (0, 1):
        model = tiny(family, seed, **UNTIED)
        tuned = move(
            model, lambda p: "self_attn" in p or "experts" in p or "mlp" in p, seed, rank=4
        )
        router = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]}
        router["target_modules"] += (
            ["gate_up_proj", "gate"] if family == "mixtral" else ["up_proj", "gate_proj"]
        )
        expected = difference(model, tuned)
        exact = run(model, tuned, rank=4, **router)
        found = changes(model.params, exact.adapters, exact.config)
        assert distance(found, expected) < 1e-5 and exact.error < 1e-5
        small = run(model, tuned, rank=3, **router)
        found = changes(model.params, small.adapters, small.config)
        lost = sum(np.square(found[path] - x).sum() for path, x in expected.items())
        tail = sum(np.square(spectra(x)[..., 3:]).sum() for x in expected.values() if x.ndim > 1)
        assert lost == pytest.approx(tail, rel=1e-4)
        size = sum(np.square(x).sum() for x in expected.values())
        assert small.error == pytest.approx(np.sqrt(tail / size), rel=1e-4)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_embedding_takes_one_adapter_under_either_name(target):
    model = tiny("llama", **TIED)
    tuned = move(model, lambda p: p[-1] == "embedding", rank=2)
    made = run(model, tuned, rank=2, target_modules=[target])
    assert made.config.ensure_weight_tying and made.config.target_modules == ["model.embed_tokens"]
    found = changes(model.params, made.adapters, made.config)
    assert distance(found, difference(model, tuned)) < 1e-5


def test_what_else_moved_is_named_stored_or_left():
    model = tiny("llama", **UNTIED | dict(attention_bias=True))
    tuned = move(model, lambda p: p[-1] != "kernel" or "q_proj" in p or "lm_head" in p)
    with pytest.raises(UserError) as caught:
        run(model, tuned, rank=2)
    message = str(caught.value)
    for text in (
        "model.embed_tokens.embedding: 3,492 numbers of 1 modules",
        "lm_head.kernel: 3,492 numbers",
        "model.norm.scale: 36 numbers",
        "model.layers.self_attn.k_proj.bias: 48 numbers of 3 modules, by ",
        "uncovered=save",
    ):
        assert text in message
    expected = difference(model, tuned)
    made = run(model, tuned, rank=36, uncovered="save")
    found = changes(model.params, made.adapters, made.config)
    assert distance(found, expected) < 1e-5
    assert made.config.bias == "all" and "lm_head" in made.config.modules_to_save
    dropped = run(model, tuned, rank=36, uncovered="drop")
    found = changes(model.params, dropped.adapters, dropped.config)
    left = {path for path, x in found.items() if np.any(x)}
    assert left == {("model", "layers", "self_attn", "q_proj", "kernel")}


def test_mistakes():
    model = tiny("phi3")
    tuned = move(model, lambda p: "qkv_proj" in p)
    for options, text in (
        (dict(target_modules=["qkv_proj.k"]), "qkv_proj.k is a part of a fused projection"),
        (dict(uncovered="forget"), "uncovered='forget' is not one of: refuse, save, drop"),
        (dict(target_modules=["o_proj"]), "none of these weights differ"),
        (dict(rank=37), "rank=37 is larger than any module can use: the most is 36"),
        (dict(rank=0), "rank=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=text):
            run(model, tuned, **dict(rank=2) | options)
    with pytest.raises(UserError, match="the same weights: there is nothing to extract"):
        run(model, model.params, rank=2)
