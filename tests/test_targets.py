"""What a config trains beyond LoRA: counts from shapes alone, and an error for every mistake."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lora_jax import AdapterConfig, UserError, lora
from lora_jax import config as configs
from lora_jax.models import describe
from lora_jax.quantize import SCHEMES, quantize_tree
from lora_jax.targets import find_targets, find_trainable
from lora_jax.tree import count, flatten

from .families import SMOLLM2
from .methods import ROWS, TINY, tiny_model, trains

D, F, Q, K, V, LAYERS = 36, 72, 48, 16, 97, 3  # of TINY
QKVO_BIAS = Q + K + K + D
MLP = 3 * D * F
EVERY_LINEAR = D * Q + 2 * D * K + Q * D + MLP


def shapes(tied=False, bias=False):
    return describe(TINY | {"tie_word_embeddings": tied, "attention_bias": bias}).params


TIED, UNTIED, BIASED = (dict(tied=True), dict(), dict(bias=True))
Q4 = LAYERS * 4 * (D + Q)  # rank 4 on q_proj


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rank": 16}, 4_884_480),
        ({"rank": 16, "use_dora": True}, 5_040_000),
        ({"rank": 16, "target_modules": ["embed_tokens"]}, 795_648),
        (
            {"rank": 16, "target_modules": ["embed_tokens"], "ensure_weight_tying": True},
            795_648,
        ),
        ({"method": "full"}, 134_515_008),
    ],
)
def test_counts_of_smollm2(fields, expected):
    params, config = describe(SMOLLM2).params, AdapterConfig(**fields)
    assert find_trainable(params, config).parameters == expected
    assert count(lora.shapes(params, config)) == expected


@pytest.mark.parametrize(
    ("model", "fields", "expected"),
    [
        (UNTIED, {}, Q4),
        (UNTIED, {"freeze_a": True}, LAYERS * 4 * Q),
        (UNTIED, {"use_dora": True}, Q4 + LAYERS * Q),
        (UNTIED, {"use_dora": True, "freeze_a": True}, LAYERS * 4 * Q + LAYERS * Q),
        (UNTIED, {"use_dora": True, "layers_to_transform": [0, 2]}, 2 * (4 * (D + Q) + Q)),
        (UNTIED, {"init": "pissa"}, Q4),
        (UNTIED, {"rank_pattern": {r"1\.self_attn\.q_proj": 2}}, 10 * (D + Q)),
        (BIASED, {"bias": "all"}, Q4 + LAYERS * QKVO_BIAS),
        (BIASED, {"bias": "lora_only"}, Q4 + LAYERS * Q),
        (BIASED, {"bias": "lora_only", "layers_to_transform": 1}, 4 * (D + Q) + Q),
        (UNTIED, {"modules_to_save": ["norm"]}, Q4 + D),
        (UNTIED, {"modules_to_save": ["mlp"]}, Q4 + LAYERS * MLP),
        (UNTIED, {"modules_to_save": ["1.mlp"]}, Q4 + MLP),
        (BIASED, {"modules_to_save": ["k_proj"], "bias": "all"}, Q4 + 3 * (D * K + QKVO_BIAS)),
        (UNTIED, {"modules_to_save": ["lm_head"]}, Q4 + D * V),
        (UNTIED, {"modules_to_save": ["lm_head", "embed_tokens"]}, Q4 + 2 * D * V),
        (TIED, {"modules_to_save": ["embed_tokens"]}, Q4 + D * V),
        (TIED, {"modules_to_save": ["lm_head"], "ensure_weight_tying": False}, Q4 + D * V),
        (TIED, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, Q4 + D * V),
        (
            TIED,
            {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
            Q4 + D * V,
        ),
        (
            TIED,
            {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": False},
            Q4 + 2 * D * V,
        ),
        (UNTIED, {"target_modules": ["embed_tokens"]}, 4 * (V + D)),
        (UNTIED, {"target_modules": ["embed_tokens"], "use_dora": True}, 4 * (V + D) + D),
        (UNTIED, {"target_modules": ["lm_head"], "use_dora": True}, 4 * (V + D) + V),
        (
            TIED,
            {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": False},
            8 * (V + D),
        ),
        (
            TIED,
            {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
            4 * (V + D),
        ),
        (UNTIED, {"trainable_token_indices": [5, 0, 96]}, Q4 + 3 * D),
        (TIED, {"trainable_token_indices": [5]}, Q4 + D),
        (TIED, {"method": "full"}, LAYERS * (EVERY_LINEAR + 2 * D) + D + V * D),
        (UNTIED, {"method": "full"}, LAYERS * (EVERY_LINEAR + 2 * D) + D + 2 * V * D),
    ],
    ids=str,
)
def test_counts_by_hand(model, fields, expected):
    usual = {} if "method" in fields else {"rank": 4, "target_modules": ["q_proj"]}
    config = AdapterConfig(**usual | fields)
    assert find_trainable(shapes(**model), config).parameters == expected


@pytest.mark.parametrize("name", ROWS)
def test_the_count_is_that_of_the_numbers_that_train(name):
    row = ROWS[name]
    params = describe(row.hf_config).params
    found = find_trainable(params, row.config)
    masks = trains(lora.shapes(params, row.config), found)
    assert found.parameters == sum(int(mask.sum()) for mask in masks.values()) > 0
    assert find_targets(params, row.config) == list(found.targets)


def test_shapes_are_those_of_init():
    row = ROWS["OLoRA, DoRA"]
    model = tiny_model(row.hf_config)
    found = flatten(lora.shapes(describe(row.hf_config).params, row.config))
    expected = flatten(lora.init(jax.random.key(0), model.params, row.config)[1])
    assert {path: (x.shape, x.dtype) for path, x in found.items()} == {
        path: (x.shape, x.dtype) for path, x in expected.items()
    }


def test_all_linear_leaves_out_what_trains_whole():
    config = AdapterConfig(rank=4, modules_to_save=["layers.1.mlp", "v_proj"])
    found = find_trainable(shapes(), config)
    adapted = {n for t in found.targets for n, r in zip(t.names, t.ranks, strict=True) if r}
    assert "model.layers.1.mlp.up_proj" not in adapted
    assert not any("v_proj" in name for name in adapted)
    assert {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"} <= adapted
    with pytest.raises(UserError, match="leaves no weight to adapt"):
        everything = ["self_attn", "mlp"]
        find_trainable(shapes(), dataclasses.replace(config, modules_to_save=everything))


def test_modules_to_save_match_whole_parts_of_a_path():
    """`norm` is the last norm, not the two of every layer whose names end alike."""
    found = find_trainable(shapes(), AdapterConfig(modules_to_save=["norm"]))
    assert [whole.path for whole in found.whole] == [("model", "norm", "scale")]
    for entry in ("model.layers.2", "layers.2"):
        found = find_trainable(
            shapes(), AdapterConfig(target_modules=["embed_tokens"], modules_to_save=[entry])
        )
        assert all(whole.chosen == (False, False, True) for whole in found.whole)
        assert len(found.whole) == 9  # seven linears, two norms


MISTAKES = [
    # values that no model takes
    (
        TIED,
        {"method": "lroa"},
        ["method='lroa' is not one of: lora, prompt", "Did you mean 'lora'?"],
    ),
    (TIED, {"init": "pisa"}, ["init='pisa' is not one of:", "Did you mean 'pissa'?"]),
    (TIED, {"bias": "lora"}, ["bias='lora' is not one of: none, lora_only, all", "'lora_only'?"]),
    (TIED, {"lora_plus_ratio": 0.0}, ["lora_plus_ratio=0.0 must be above 0"]),
    (TIED, {"lora_plus_ratio": -2.0}, ["lora_plus_ratio=-2.0 must be above 0"]),
    (TIED, {"lora_plus_ratio": float("nan")}, ["lora_plus_ratio=nan must be above 0"]),
    (
        TIED,
        {"method": "full", "use_dora": True, "modules_to_save": ["norm"]},
        [
            "method=full trains every weight, and use_dora=True is a setting of adapters",
            "and modules_to_save=['norm'] is a setting of adapters",
        ],
    ),
    (TIED, {"method": "full", "freeze_a": True}, ["method=full", "freeze_a=True"]),
    (TIED, {"method": "full", "init": "pissa"}, ["method=full", "init='pissa'"]),
    (TIED, {"method": "full", "lora_plus_ratio": 2.0}, ["method=full", "lora_plus_ratio=2.0"]),
    (TIED, {"method": "full", "bias": "all"}, ["method=full", "bias='all'"]),
    # modules_to_save
    (
        UNTIED,
        {"modules_to_save": ["lm_haed", "norm"]},
        ["modules_to_save=['lm_haed'] matches no module; the model has:", "Did you mean 'lm_head'"],
    ),
    (
        UNTIED,
        {"modules_to_save": ["model.layers.3.mlp", "nrom"]},
        ["modules_to_save=['model.layers.3.mlp'] matches no module", "['nrom'] matches no module"],
    ),
    (
        UNTIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["0.self_attn"]},
        [
            "target_modules=['q_proj'] and modules_to_save=['0.self_attn'] both name "
            "model.layers.0.self_attn.q_proj",
            "an adapter or full training",
        ],
    ),
    (
        TIED,
        {"target_modules": ["embed_tokens"], "modules_to_save": ["embed_tokens"]},
        ["both name model.embed_tokens"],
    ),
    (
        TIED,
        {
            "target_modules": ["lm_head"],
            "modules_to_save": ["lm_head"],
            "ensure_weight_tying": False,
        },
        ["both name lm_head"],
    ),
    # trainable_token_indices
    (
        UNTIED,
        {"trainable_token_indices": [3, 97, -1]},
        ["trainable_token_indices=[-1, 97]: the model has tokens 0 to 96"],
    ),
    (
        UNTIED,
        {"trainable_token_indices": [3, 5, 3]},
        ["trainable_token_indices=[3]: every token once"],
    ),
    (UNTIED, {"trainable_token_indices": []}, ["trainable_token_indices=[]", "at least one"]),
    (
        UNTIED,
        {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]},
        ["trainable_token_indices and target_modules both train model.embed_tokens"],
    ),
    (
        UNTIED,
        {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [1]},
        ["trainable_token_indices and modules_to_save both train model.embed_tokens"],
    ),
    (
        TIED,
        {
            "target_modules": ["lm_head"],
            "ensure_weight_tying": False,
            "trainable_token_indices": [1],
        },
        ["trainable_token_indices and target_modules both train lm_head"],
    ),
    # frozen halves, ranks
    (
        UNTIED,
        {"freeze_a": True, "target_modules": ["embed_tokens", "q_proj"]},
        ["freeze_a=true and target_modules=", "lora_a of model.embed_tokens starts at zero"],
    ),
    (
        TIED,
        {"freeze_a": True, "target_modules": ["lm_head"], "ensure_weight_tying": True},
        ["freeze_a=true and target_modules=['lm_head']", "lora_a of lm_head starts at zero"],
    ),
    (
        UNTIED,
        {"target_modules": ["embed_tokens"], "rank": 37},
        ["rank=37 is larger than model.embed_tokens allows: its shape is (97, 36)"],
    ),
    (
        TIED,
        {"target_modules": ["lm_head"], "rank": 37, "ensure_weight_tying": True},
        ["rank=37 is larger than lm_head allows"],
    ),
    (
        UNTIED,
        {"target_modules": ["k_proj"], "rank": 17, "init": "pissa"},
        ["rank=17 is larger than model.layers.0.self_attn.k_proj allows", "(36, 16)"],
    ),
    (
        UNTIED,
        {"init": "orthogonal", "rank": 3, "target_modules": ["q_proj"]},
        ["init=orthogonal needs an even rank", "it is 3 at model.layers.0.self_attn.q_proj"],
    ),
    (
        UNTIED,
        {
            "init": "orthogonal",
            "target_modules": ["q_proj"],
            "rank_pattern": {r"2\.self_attn\.q_proj": 5},
        },
        ["init=orthogonal needs an even rank", "it is 5 at model.layers.2.self_attn.q_proj"],
    ),
    # biases
    (UNTIED, {"bias": "all"}, ["bias='all': the model has no bias; leave it at 'none'"]),
    (
        BIASED,
        {"bias": "lora_only", "target_modules": ["up_proj"]},
        ["bias='lora_only': no adapted module has a bias"],
    ),
    # tied embeddings
    (
        UNTIED,
        {"ensure_weight_tying": True},
        ["ensure_weight_tying=true: the model's embedding and head are not tied"],
    ),
    (
        TIED,
        {"ensure_weight_tying": True},
        ["ensure_weight_tying=true, and neither target_modules nor modules_to_save names"],
    ),
    (
        TIED,
        {"target_modules": ["lm_head", "q_proj"]},
        ["target_modules names lm_head, which is model.embed_tokens in this model (tied)"],
    ),
    (
        TIED,
        {"modules_to_save": ["lm_head"]},
        ["modules_to_save names lm_head, which is model.embed_tokens", "ensure_weight_tying=true"],
    ),
    *(
        (
            TIED,
            {"init": init, "target_modules": [name], "ensure_weight_tying": tie},
            [f"init={init} subtracts its factors from model.embed_tokens", "must be true"],
        )
        for init, name, tie in (
            ("pissa", "embed_tokens", None),
            ("olora", "lm_head", False),
            ("pissa", "embed_tokens", False),
        )
    ),
    *(
        (
            TIED,
            {"target_modules": [one], "modules_to_save": [other], "ensure_weight_tying": True},
            ["one is in target_modules and the other in modules_to_save"],
        )
        for one, other in (("lm_head", "embed_tokens"), ("embed_tokens", "lm_head"))
    ),
]


@pytest.mark.parametrize(
    ("model", "fields", "texts"), MISTAKES, ids=[" ".join(map(str, m[1])) for m in MISTAKES]
)
def test_mistakes_say_what_was_given_and_what_to_do(model, fields, texts):
    params = shapes(**model)
    with pytest.raises(UserError) as caught:
        find_trainable(params, AdapterConfig(**fields))
    assert all(text in str(caught.value) for text in texts), str(caught.value)
    with pytest.raises(UserError):
        lora.shapes(params, AdapterConfig(**fields))


def test_a_head_that_trains_alone_may_freeze_a():
    fields = {"freeze_a": True, "target_modules": ["lm_head"], "ensure_weight_tying": False}
    assert find_trainable(shapes(tied=True), AdapterConfig(**fields)).parameters == 8 * V


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"method": "full"}, "method=full trains the weights of model.layers."),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["1.mlp"]},
            "modules_to_save=['1.mlp'] trains the weights of model.layers.mlp.",
        ),
        ({"init": "pissa"}, "init=pissa subtracts its factors from model.layers.mlp.down_proj"),
        ({"init": "olora"}, "run init on float weights first, and quantise the remaining base"),
    ],
    ids=str,
)
def test_what_a_quantised_base_cannot_give(scheme, fields, text):
    params = jax.eval_shape(functools.partial(quantize_tree, scheme=scheme), shapes())
    with pytest.raises(UserError) as caught:
        lora.init(jax.random.key(0), params, AdapterConfig(**fields))
    assert text in str(caught.value)
    assert "a quantised base (base_dtype) cannot be changed" in str(caught.value)


def test_problems_of_a_combination_are_told_together():
    fields = {
        "target_modules": ["embed_tokens", "lm_head"],
        "freeze_a": True,
        "trainable_token_indices": [2],
    }
    with pytest.raises(UserError) as caught:
        find_trainable(shapes(tied=True), AdapterConfig(**fields))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["adapter.method=full", "base_dtype=nf4"], "adapter.method=full trains the weights them"),
        (["adapter.method=full", "base_dtype=int8"], "base_dtype=int8 keeps them in a form"),
        (["adapter.method=full", "adapter.use_dora=true"], "adapter.method=full trains every"),
        (["adapter.method=dora"], "adapter.method='dora' is not one of: lora, prompt"),
        (["adapter.init=gausian"], "Did you mean 'gaussian'?"),
        (["adapter.bias=some"], "adapter.bias='some' is not one of"),
        (["adapter.lora_plus_ratio=0"], "adapter.lora_plus_ratio=0.0 must be above 0"),
        (["adapter.modules_to_save={a: b}"], "adapter.modules_to_save"),
        (["adapter.trainable_token_indices=[a]"], "adapter.trainable_token_indices"),
        (["adapter.use_dora=yess"], "adapter.use_dora"),
    ],
)
def test_mistakes_in_a_file(overrides, text):
    with pytest.raises(UserError) as caught:
        configs.parse({"model": "m"}, overrides)
    assert text in str(caught.value)


def test_a_model_without_an_embedding_of_tokens():
    params = {"model": {"layers": {"q_proj": {"kernel": np.ones((2, 8, 6), np.float32)}}}}
    with pytest.raises(UserError, match="the model has no token embedding"):
        find_trainable(params, AdapterConfig(rank=2, trainable_token_indices=[0]))


def test_adapters_of_another_config_do_not_fit():
    params = describe(TINY | {"tie_word_embeddings": True}).params
    given = lora.shapes(params, AdapterConfig(rank=4, target_modules=["q_proj"], use_dora=True))
    config = AdapterConfig(rank=4, target_modules=["q_proj"], init="pissa")
    with pytest.raises(UserError) as caught:
        lora.bind(params, given, config)
    for text in (
        "these adapters do not fit the model and config",
        "missing model.layers.self_attn.q_proj.init_a (3, 36, 4)",
        "unexpected model.layers.self_attn.q_proj.magnitude (3, 48)",
    ):
        assert text in str(caught.value)
