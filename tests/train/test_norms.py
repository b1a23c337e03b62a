"""Norms of adapters and of the update, against the dense product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as methods
from lora_jax import targets as selection
from lora_jax import tree
from lora_jax.train import norms

from .tiny import make_config, random_adapters, tiny_model

KINDS = ("lora_a", "lora_b", "update", "relative")


def padded(params, config, seed=1):
    """Random adapters whose padding is zero, as that of trained ones."""
    fresh = methods.init(jax.random.key(0), params, config)[1]
    flat = tree.flatten(random_adapters(fresh, seed))
    for target in selection.find_targets(params, config):
        mask = target.rank_mask()
        flat[(*target.path, "lora_a")] *= mask
        flat[(*target.path, "lora_b")] *= np.swapaxes(mask, -1, -2)
    return tree.unflatten(flat)


CASES = {
    "plain": (),
    "rslora": ("adapter.use_rslora=true", "adapter.alpha=3"),
    "ranks": ("adapter.rank_pattern={q_proj: 2, layers.1.mlp.up_proj: 7}",),
    "alphas": ("adapter.alpha_pattern={down_proj: 1.5}",),
    "layers": ("adapter.layers_to_transform=[1]",),
    "some": ("adapter.target_modules=[v_proj, up_proj]", "adapter.use_rslora=true"),
}


@pytest.mark.parametrize("case", CASES)
def test_norms_are_those_of_the_dense_product(case):
    params = tiny_model(num_hidden_layers=3).params
    config = make_config("adapter.rank=4", *CASES[case]).adapter
    adapters = padded(params, config)
    found = norms.measure(params, adapters, config)
    flat, base = tree.flatten(adapters), tree.flatten(params)
    targets = selection.find_targets(params, config)
    assert set(found) == {tree.dotted(target.path) for target in targets}
    assert any(len(set(target.shape)) == 2 for target in targets), "no shape that is not square"
    for target in targets:
        one = found[tree.dotted(target.path)]
        assert set(one) == set(KINDS)
        for layer, (rank, alpha) in enumerate(zip(target.ranks, target.alphas, strict=True)):
            values = [one[kind][layer] for kind in KINDS]
            if not rank:
                assert values == [None] * 4
                continue
            a, b, w = (
                np.asarray(leaves[(*target.path, name)][layer], np.float64)
                for leaves, name in ((flat, "lora_a"), (flat, "lora_b"), (base, target.leaf))
            )
            a, b = a[:, :rank], b[:rank]
            update = alpha / (rank**0.5 if config.use_rslora else rank) * (a @ b)
            expected = [np.sqrt(np.sum(x**2)) for x in (a, b, update)]
            expected.append(expected[-1] / np.sqrt(np.sum(w**2)))
            assert np.allclose(values, expected, rtol=1e-5)
    if case == "layers":
        assert all(one["update"][0] is None is one["update"][2] for one in found.values())


def test_a_half_precision_base_is_measured_in_full():
    config = make_config("adapter.rank=4").adapter
    params = tiny_model().params
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapters = padded(params, config)
    found, exact = (norms.measure(p, adapters, config) for p in (low, params))
    for module, one in found.items():
        assert one["update"] == exact[module]["update"]
        assert np.allclose(one["relative"], exact[module]["relative"], rtol=1e-3)


def test_fresh_adapters_change_nothing():
    params, config = tiny_model().params, make_config("adapter.rank=4").adapter
    found = norms.measure(params, methods.init(jax.random.key(0), params, config)[1], config)
    for one in found.values():
        assert one["update"] == one["relative"] == one["lora_b"] == [0, 0]
        assert min(one["lora_a"]) > 0


def test_the_summary_is_a_root_mean_square_without_layers_that_are_not_adapted():
    found = {
        "x": {kind: [3.0, None] for kind in KINDS},
        "y": {kind: [None, 4.0] for kind in KINDS} | {"update": [0.0, 0.0]},
    }
    assert norms.summarize(found) == pytest.approx(
        {
            "norm_lora_a": 12.5**0.5,
            "norm_lora_b": 12.5**0.5,
            "norm_update": 3**0.5,
            "norm_relative": 12.5**0.5,
        }
    )
