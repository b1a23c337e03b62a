"""Layers of several shapes: names, order, patterns, and what a state cannot do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterConfig, UserError, lora, models, settle, tree
from lora_jax.audit.targets import layer_range
from lora_jax.generate import Engine, Request, for_decoding
from lora_jax.models import stacks
from lora_jax.targets import find_trainable

from ..engines import random_adapters
from ..families import FAMILIES, FULL, STATEFUL, describe, random_model
from ..train.tiny import make_config

FIELDS = FAMILIES["lfm2"].fields  # conv, attention, conv, conv, attention
CONV = ("model", "layers", "0,2-3", "conv", "in_proj")


@pytest.mark.parametrize("seed", range(20))
def test_the_key_of_a_stack_names_its_layers(seed):
    rng = np.random.default_rng(seed)
    layers = tuple(np.flatnonzero(rng.random(rng.integers(1, 30)) < 0.6).tolist()) or (seed,)
    key = tree.stack_key(layers)
    path = ("model", "layers", key, "mlp", "up_proj", "kernel")
    assert not key.isdigit() and tree.stack_layers(path) == layers
    assert tree.stack_position(path) == 2 and tree.lead_axes(path) == 1
    shape = (len(layers), 3, 4)
    names = tuple(f"model.layers.{layer}.mlp.up_proj" for layer in layers)
    assert tree.slice_names(path[:-1], shape) == names


@pytest.mark.parametrize("key", ["mlp", "3", "conv1", "0-", "a-b", "1,"])
def test_other_keys_name_no_layers(key):
    assert tree.stack_layers(("model", "layers", key, "up_proj", "kernel")) is None


def test_one_layer_of_several_stacks_is_of_the_longest():
    long, short = ((*path, "x", "kernel") for path in (("layers", "0-1"), ("layers", "2-2")))
    assert tree.one_layer(dict.fromkeys([short, long, ("lm_head", "kernel")])).keys() == {long}


def test_runs_are_the_model_in_its_order():
    config = describe("lfm2", **FIELDS).config
    found = [(run.layers, run.key, run.start, run.cached) for run in stacks.runs(config)]
    assert found == [
        ((0, 1), "0,2-3", 0, 0),
        ((1, 2), "1,4", 0, 0),
        ((2, 4), "0,2-3", 1, 1),
        ((4, 5), "1,4", 1, 1),
    ]


def test_layers_of_one_shape_have_no_key():
    plain = FAMILIES["lfm2"].size
    assert "conv" not in str(models.describe({"model_type": "lfm2", **plain}).params)
    paths = tree.flatten(describe("lfm2", **plain).params)
    assert ("model", "layers", "self_attn", "out_proj", "kernel") in paths


def test_patterns_and_reports_name_layers_of_the_model():
    params = describe("lfm2", **FIELDS).params
    config = AdapterConfig(
        rank=2,
        target_modules=["in_proj", "q_proj"],
        rank_pattern={r"layers\.2\.conv\.in_proj": 3},
        layers_to_transform=[2, 3, 4],
    )
    targets = {target.path: target for target in find_trainable(params, config).targets}
    assert targets[CONV].ranks == (0, 3, 2)
    assert targets["model", "layers", "1,4", "self_attn", "q_proj"].ranks == (0, 2)
    assert layer_range(targets[CONV], [1, 2]) == "model.layers.{2-3}.conv.in_proj"
    assert layer_range(targets[CONV], [0]) == "model.layers.0.conv.in_proj"


def test_a_state_goes_on_in_one_text_only(tmp_path):
    model = random_model("lfm2", **FIELDS)
    tokens = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(UserError, match="texts of this model cannot share their starts"):
        model.module(model.params).hidden(
            tokens, positions=tokens, segment_ids=tokens, seen_until=tokens
        )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lfm2", **FIELDS}))
    config = make_config(f"model={tmp_path}", "data.share_prompts=true")
    with pytest.raises(UserError, match="share_prompts=true: layers of .* pass a state"):
        settle.describe_model(config, tmp_path)


@pytest.mark.parametrize("family", STATEFUL)
def test_rows_of_an_engine_have_states_and_adapters_of_their_own(error, family):
    """Two rows for five texts: a state of the text before would change the next one."""
    model = random_model(family, **FAMILIES[family].fields)
    ours = for_decoding(model)
    bank = lora.bank(ours.params, slots=3, rank=3, modules="all-linear")
    engine = Engine(ours, rows=2, max_length=48, bank=bank)
    trees = {None: model.params}
    for rank, name in ((2, "a"), (3, "b")):
        config = AdapterConfig(rank=rank, alpha=1.0, target_modules="all-linear")
        adapters = random_adapters(model, config, rank)
        engine.publish(name, adapters, config)
        trees[name] = lora.merge(lora.bind(model.params, adapters, config))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 97, n).tolist() for n in (20, 3, 17, 1, 6)]
    requests = [
        Request(prompt, 8, adapter=name, log_probs=0)
        for prompt, name in zip(prompts, ("a", None, "b", "a", "b"), strict=True)
    ]
    apply = jax.jit(lambda params, text: jax.nn.log_softmax(model.apply(params, text)))
    for request, answer in zip(requests, engine.answer(requests), strict=True):
        text = [*request.prompt, *answer.tokens]
        padded = np.asarray([text + [0] * (32 - len(text))], np.int32)  # behind it
        places = np.arange(len(request.prompt) - 1, len(text) - 1)
        own = np.asarray(apply(trees[request.adapter], padded))[0, places]
        assert answer.tokens == own.argmax(axis=-1).tolist()
        assert error(answer.log_probs.own, own.max(axis=-1)) < 1e-4
        base = np.asarray(apply(model.params, padded))[0, places]
        assert request.adapter is None or error(base, own) > 1e-2


def test_the_gate_of_a_shared_expert_is_no_router():
    params = describe("qwen3_next", **FAMILIES["qwen3_next"].fields).params
    leaves = tree.flatten(params)
    routers = {path[-2] for path in leaves if tree.is_router(path, leaves)}
    assert routers == {"gate"}
    found = find_trainable(params, AdapterConfig(rank=3, target_modules="all-linear"))
    names = {name for target in found.targets for name in target.names}
    assert "model.layers.1.mlp.shared_expert_gate" in names
    assert "model.layers.1.mlp.gate" not in names
    with pytest.raises(UserError, match="rank=3 is larger than .*shared_expert_gate allows"):
        find_trainable(params, AdapterConfig(rank=3, init="pissa", target_modules="all-linear"))


def test_layers_of_three_shapes_have_a_stack_each():
    params = describe("qwen3_next", **FAMILIES["qwen3_next"].fields).params
    assert {*params["model"]["layers"]} == {"0-0", "1,4", "2-3"}


def test_heads_that_do_not_share_evenly_are_refused():
    with pytest.raises(UserError, match="linear_num_value_heads=3 is not a multiple of"):
        describe("qwen3_next", **FAMILIES["qwen3_next"].fields | dict(linear_num_value_heads=3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(layer_types=["conv"] * 5), f"no layer has {FULL}"),
        (dict(layer_types=["conv", FULL]), "must name full_attention or conv for each of 5"),
        (dict(layer_types=["conv", FULL, "conv", "conv", "mamba"]), "'mamba'.* must name"),
        (dict(layer_types=None, full_attn_idxs=[1, "2"]), "is not a list of layers"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ],
)
def test_kinds_of_layers_that_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        describe("lfm2", **FIELDS | fields)
