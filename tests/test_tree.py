"""Which weights an adapter targets, the errors when it targets none, and the counts of known
models.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterConfig, Config, UserError, lora
from lora_jax.config import TrainConfig
from lora_jax.models import describe
from lora_jax.targets import find_targets
from lora_jax.targets.match import matches, pattern_values
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.step import make_train_step
from lora_jax.tree import (
    check_same_structure,
    count,
    flatten,
    in_layers,
    nbytes,
    one_layer,
    slice_names,
    unflatten,
)

TINY = dict(
    model_type="llama",
    vocab_size=97,
    hidden_size=36,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
)
SMOLLM2_135M = dict(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
LLAMA_3_2_1B = dict(
    model_type="llama",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
LLAMA_3_1_8B = dict(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
EVERY_LINEAR = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


@pytest.fixture(scope="module")
def shapes():
    return describe(TINY).params


def selected(params, **config) -> list[str]:
    return [
        name
        for target in find_targets(params, AdapterConfig(**config))
        for name, rank in zip(target.names, target.ranks, strict=True)
        if rank
    ]


@pytest.mark.parametrize(
    ("model", "config", "expected"),
    [
        (SMOLLM2_135M, dict(rank=8), 2_442_240),
        (SMOLLM2_135M, dict(rank=16), 4_884_480),
        (LLAMA_3_2_1B, dict(rank=1), 704_512),
        (LLAMA_3_2_1B, dict(rank=16), 11_272_192),
        (LLAMA_3_1_8B, dict(rank=16), 41_943_040),
        (LLAMA_3_1_8B, dict(rank=8, target_modules=["q_proj", "v_proj"]), 3_407_872),
    ],
)
def test_counts_of_known_models(model, config, expected):
    """From shapes alone; what `init` would make has the same number of entries."""
    params, config = describe(model).params, AdapterConfig(**config)
    assert sum(target.parameters for target in find_targets(params, config)) == expected
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, config)[1])
    assert count(adapters) == expected
    assert nbytes(adapters) == 4 * expected


def test_counts_leave_the_padding_out(shapes):
    config = AdapterConfig(
        rank=4, target_modules=["q_proj"], rank_pattern={"1.self_attn.q_proj": 2}
    )
    assert sum(t.parameters for t in find_targets(shapes, config)) == (4 + 2 + 4) * (36 + 48)
    one_layer = dataclasses.replace(config, layers_to_transform=1)
    assert sum(t.parameters for t in find_targets(shapes, one_layer)) == 2 * (36 + 48)


def test_all_linear_leaves_the_head_out(shapes):
    names = selected(shapes, target_modules="all-linear")
    assert len(names) == 3 * 7
    assert "lm_head" not in names
    assert "lm_head" in selected(shapes, target_modules=["lm_head", "q_proj"])


LAYER_1 = "model.layers.1.self_attn."


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (dict(target_modules=[f"{LAYER_1}q_proj"]), [f"{LAYER_1}q_proj"]),
        (dict(target_modules=["1.self_attn.q_proj"]), [f"{LAYER_1}q_proj"]),
        (dict(target_modules=r".*\.1\.self_attn\.[kq]_proj"), [f"{LAYER_1}{x}_proj" for x in "kq"]),
        (dict(target_modules=["k_proj"], layers_to_transform=1), [f"{LAYER_1}k_proj"]),
        (
            dict(
                target_modules=["q_proj", "k_proj"],
                layers_to_transform=[1],
                exclude_modules=["q_proj"],
            ),
            [f"{LAYER_1}k_proj"],
        ),
        (
            dict(target_modules=["lm_head", "k_proj"], layers_to_transform=[1]),
            [f"{LAYER_1}k_proj", "lm_head"],
        ),
        (
            dict(target_modules=["model.layers.0.mlp.up_proj", "k_proj"], layers_to_transform=[1]),
            ["model.layers.0.mlp.up_proj", f"{LAYER_1}k_proj"],
        ),
    ],
)
def test_selection(shapes, config, expected):
    """An entry that is a whole module path holds whatever the layers, as in PEFT."""
    assert sorted(selected(shapes, **config)) == sorted(expected)


ERRORS = {
    "misspelt target": (
        dict(target_modules=["qproj", "v_proj"]),
        f"target_modules=['qproj'] matches no weight; the model has: {EVERY_LINEAR}. "
        "Did you mean 'q_proj'?",
    ),
    "a prefix is no suffix": (
        dict(target_modules=["self_attn"]),
        "target_modules=['self_attn'] matches no weight",
    ),
    "misspelt path": (
        dict(target_modules=["model.layers.0.self_attn.q_prj"]),
        "Did you mean 'model.layers.0.self_attn.q_proj'?",
    ),
    "misspelt exclusion": (
        dict(exclude_modules=["k_prj"]),
        f"exclude_modules=['k_prj'] matches no weight; the model has: {EVERY_LINEAR}. "
        "Did you mean 'k_proj'?",
    ),
    "exclusion by regex": (
        dict(exclude_modules=r".*\.9\.mlp.*"),
        "exclude_modules='.*\\\\.9\\\\.mlp.*' matches no weight",
    ),
    "misspelt rank_pattern": (
        dict(target_modules=["q_proj"], rank_pattern={"q_prj": 2}),
        "rank_pattern['q_prj'] matches no adapted module; they are: q_proj. Did you mean 'q_proj'?",
    ),
    "rank_pattern of another module": (
        dict(target_modules=["q_proj"], rank_pattern={"k_proj": 2}),
        "rank_pattern['k_proj'] matches no adapted module; they are: q_proj.",
    ),
    "misspelt alpha_pattern": (
        dict(target_modules=["q_proj"], alpha_pattern={"proj_q": 2.0}),
        "alpha_pattern['proj_q'] matches no adapted module; they are: q_proj.",
    ),
    "invalid regex": (
        dict(target_modules="q_proj("),
        "target_modules='q_proj(' is not a valid regex: missing )",
    ),
    "invalid exclusion": (
        dict(exclude_modules="*x"),
        "exclude_modules='*x' is not a valid regex: nothing to repeat",
    ),
    "invalid pattern": (
        dict(rank_pattern={"q_proj[": 2}),
        "rank_pattern['q_proj['] is not a valid regex",
    ),
    "layer out of range": (
        dict(layers_to_transform=[1, 3, 7]),
        "layers_to_transform=[3, 7] does not exist; the model has layers 0 to 2",
    ),
    "negative layer": (
        dict(layers_to_transform=-1),
        "layers_to_transform=[-1] does not exist; the model has layers 0 to 2",
    ),
    "no layer": (
        dict(layers_to_transform=[]),
        "layers_to_transform=[] must be a layer index or a non-empty list of them",
    ),
    "layer of another type": (
        dict(layers_to_transform=["1"]),
        "layers_to_transform=['1'] is not a whole number or a list of whole numbers",
    ),
    "rank above the smaller side": (
        dict(rank=17, target_modules=["q_proj", "k_proj"]),
        "rank=17 is larger than model.layers.0.self_attn.k_proj allows: its shape is (36, 16), "
        "so a rank above 16",
    ),
    "rank_pattern above the smaller side": (
        dict(target_modules=["k_proj"], rank_pattern={"2.self_attn.k_proj": 20}),
        "rank=20 is larger than model.layers.2.self_attn.k_proj allows",
    ),
    "a name where a regex belongs": (
        dict(target_modules="q_proj"),
        "target_modules='q_proj' matches no weight. A string is a regex for the whole module path, "
        "such as 'model.layers.0.self_attn.k_proj'; a list holds names; "
        f"the model has: {EVERY_LINEAR}. Did you mean ['q_proj']?",
    ),
    "empty list": (
        dict(target_modules=[]),
        "target_modules=[] must be a string or a non-empty list of strings",
    ),
    "another type": (
        dict(target_modules=7),
        "target_modules=7 is not text or a list of names",
    ),
    "null": (
        dict(target_modules=None),
        "target_modules=null is not text or a list of names",
    ),
    "nothing left": (
        dict(target_modules=["q_proj"], exclude_modules=["q_proj"]),
        "target_modules=['q_proj'] with exclude_modules=['q_proj'] and layers_to_transform=None "
        "leaves no weight to adapt",
    ),
}


@pytest.mark.parametrize(("config", "text"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_was_given_and_what_exists(shapes, config, text):
    with pytest.raises(UserError) as caught:
        find_targets(shapes, AdapterConfig(**config))
    assert text in str(caught.value)


def test_all_problems_are_raised_together(shapes):
    config = AdapterConfig(
        target_modules=["qproj", "vproj"], exclude_modules=["x"], layers_to_transform=9
    )
    with pytest.raises(UserError) as caught:
        find_targets(shapes, config)
    for text in ("['qproj']", "['vproj']", "exclude_modules=['x']", "layers_to_transform=[9]"):
        assert text in str(caught.value)


def test_names_match_by_whole_parts():
    name = "model.layers.11.self_attn.q_proj"
    assert (
        matches(name, ["q_proj"]) and matches(name, ["self_attn.q_proj"]) and matches(name, [name])
    )
    assert not matches(name, ["proj"]) and not matches(name, ["1.self_attn.q_proj"])
    assert matches(name, r".*q_proj") and not matches(name, "q_proj")
    assert pattern_values({"1.self_attn.q_proj": 1, "q_proj": 2})(name, 3) == 2
    assert pattern_values({"q": 1})(name, 3) == 3
    assert pattern_values({r"q_\w+": 1, "q_proj": 2})(name, 3) == 1  # the first that matches


def test_scales_and_masks_of_a_padded_stack(shapes):
    config = AdapterConfig(
        rank=4,
        alpha=8.0,
        target_modules=["q_proj"],
        layers_to_transform=[0, 2],
        rank_pattern={"2.self_attn.q_proj": 1},
        alpha_pattern={"0.self_attn.q_proj": 2.0},
    )
    (target,) = find_targets(shapes, config)
    assert (target.ranks, target.alphas, target.rank) == ((4, 0, 1), (2.0, 8.0, 8.0), 4)
    np.testing.assert_array_equal(target.scales(False).ravel(), [0.5, 0, 8])
    np.testing.assert_array_equal(target.scales(True).ravel(), [1, 0, 8])
    np.testing.assert_array_equal(target.rank_mask()[:, 0], [[1] * 4, [0] * 4, [1, 0, 0, 0]])


def test_slice_names():
    path = ("model", "layers", "self_attn", "q_proj")
    assert slice_names(path, (2, 3, 4)) == tuple(
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    )
    assert slice_names(("lm_head",), (3, 4)) == ("lm_head",)
    assert slice_names(("h", "0", "attn"), (3, 4)) == ("h.0.attn",)


def test_flatten_and_unflatten_are_inverse(shapes):
    assert unflatten(flatten(shapes)) == shapes


def test_structure_errors_list_every_leaf():
    expected = {"x": {"a": jnp.zeros(2), "b": jnp.zeros((3, 1))}, "y": jnp.zeros(4)}
    check_same_structure(expected, expected, "trees")
    given = {"x": {"a": jnp.zeros(3), "c": jnp.zeros(1)}, "y": jnp.zeros(4)}
    with pytest.raises(UserError) as caught:
        check_same_structure(given, expected, "trees")
    assert str(caught.value) == (
        "trees: missing x.b (3, 1)\n  unexpected x.c (1,)\n  x.a has shape (3,), expected (2,)"
    )


def test_padding_stays_zero_under_adamw():
    """With B no longer zero, a weight decay, and a layer that is not adapted at all."""
    model = describe(TINY | dict(num_hidden_layers=2))
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = jax.tree.map(
        lambda leaf: 0.3 * jax.random.normal(next(keys), leaf.shape), model.params
    )
    adapter = AdapterConfig(
        rank=5,
        target_modules=["q_proj", "up_proj"],
        exclude_modules=["1.mlp.up_proj"],
        rank_pattern={"0.self_attn.q_proj": 2},
    )
    train = TrainConfig(steps=4, batch_size=2, weight_decay=0.1, learning_rate=0.01)
    config = Config(adapter=adapter, train=train)
    optimizer = make_optimizer(train)
    step = make_train_step(model, config, optimizer)
    _, adapters = lora.init(jax.random.key(1), params, adapter)
    masks = {
        (*target.path, part): target.rank_mask() if part == "lora_a" else target.rank_mask().mT
        for target in find_targets(params, adapter)
        for part in ("lora_a", "lora_b")
    }
    opt_state = optimizer.init(adapters)
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 97)
    batch = {
        "tokens": tokens,
        "segment_ids": jnp.ones_like(tokens),
        "positions": jnp.broadcast_to(jnp.arange(12), tokens.shape),
        "loss_weights": jnp.ones(tokens.shape, jnp.float32),
    }
    for number in range(4):
        adapters, opt_state, _ = step(adapters, opt_state, params, batch, jax.random.key(number))
    assert set(flatten(adapters)) == set(masks)
    for path, leaf in flatten(adapters).items():
        real = np.broadcast_to(masks[path], leaf.shape) != 0
        assert not np.asarray(leaf)[~real].any(), path
        assert np.asarray(leaf)[real].all(), path
    assert sum(int((masks[path] == 0).sum()) for path in masks) > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 0}, "alpha=0 must be above 0"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"alpha_pattern": {"q_proj": -1.0}}, r"alpha_pattern\['q_proj'\]=-1.0 must be above 0"),
    ],
)
def test_impossible_values_are_refused_in_python_too(fields, message):
    model = describe(TINY)
    with pytest.raises(UserError, match=message):
        find_targets(model.params, AdapterConfig(**fields))


def test_one_layer_of_a_stack_and_of_a_list():
    stack = ("model", "layers", "mlp", "up_proj", "kernel")
    layers = [("model", "layers", str(i), "mlp", "Wo", "kernel") for i in range(11)]
    outside = ("model", "embed_tokens", "embedding")
    assert one_layer(dict.fromkeys([stack, outside])).keys() == {stack}
    assert one_layer(dict.fromkeys([*layers, outside])).keys() == {layers[10]}
    assert all(map(in_layers, [stack, *layers])) and not in_layers(outside)
    assert one_layer({}) == {}
