"""Inits that look at data or at the quantised base: what they count, what they need, what they
refuse.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterConfig, Config, lora, tree
from lora_jax import config as configs
from lora_jax.adapters import eva
from lora_jax.config import MeshConfig, TrainConfig
from lora_jax.errors import UserError
from lora_jax.models import describe
from lora_jax.quantize import quantize_tree
from lora_jax.sharding import make_mesh
from lora_jax.targets import find_trainable
from lora_jax.train import calibration
from lora_jax.train.calibration import calibrate_on
from lora_jax.weights import Probe, linear, materialize

from .families import FAMILIES, random_model
from .methods import ROWS, Row, make_batch, start, tiny_model

LAYER = {"target_modules": ["q_proj"]}
UNTIED = ROWS["LoRA"].hf_config
TIED = UNTIED | {"tie_word_embeddings": True}


def test_a_probe_counts_its_inputs_and_changes_nothing(error):
    rng = np.random.default_rng(0)
    x, w, q = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((11, 7), (7, 5), (7, 3))
    )
    counted = jnp.asarray(rng.integers(0, 2, 11), jnp.float32)

    def loss(x, moments, counted):
        return jnp.sum(jnp.sin(linear(x, Probe(w, q, moments, counted))))

    zeros = jnp.zeros((8, 5))
    slope, found = jax.grad(loss, argnums=(0, 1))(x, zeros, counted)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ w)))(x)
    assert error(slope, expected) <= 1e-6
    own = np.asarray(x)[np.asarray(counted) > 0]
    assert 2 < len(own) < 10
    left = np.concatenate([own, np.ones((len(own), 1))], axis=1)
    sizes = np.sum(own**2, axis=1, keepdims=True)
    right = np.concatenate([own @ np.asarray(q), np.ones((len(own), 1)), sizes], axis=1)
    assert error(found, left.T @ right) <= 1e-5
    assert error(jax.grad(loss, argnums=1)(x, zeros, None)[-1, -2], 11) == 0
    np.testing.assert_array_equal(materialize(Probe(w, q, zeros)), w)


def test_every_token_is_counted_once_however_the_pass_is_split(error):
    """Two batches, of which the loss counts a part; remat runs the forward pass twice."""
    row = Row({})
    model = tiny_model(row.hf_config)
    batches = [jax.tree.map(jnp.asarray, make_batch(seed)) for seed in (0, 1)]
    path = ("model", "layers", "self_attn", "q_proj", "kernel")
    found = []
    for fields in ({"remat": "none"}, {"remat": "full", "micro_batch_size": 2}):
        config = Config(adapter=row.config, train=TrainConfig(batch_size=4, **fields))
        calibrate = calibrate_on(model, config, batches)
        moments = eva._count_inputs(
            {path: jnp.broadcast_to(jnp.eye(36), (3, 36, 36))}, model.params, calibrate
        )
        found.append((calibrate(model.params), moments[path]))
    assert error(found[1][0], found[0][0]) <= 1e-6
    assert error(found[1][1], found[0][1]) <= 1e-5
    supervised = sum(int((batch["loss_weights"] > 0).sum()) for batch in batches)
    np.testing.assert_array_equal(found[0][1][:, -1, -2], supervised)


def test_a_sketch_finds_what_an_exact_pass_finds(monkeypatch):
    """Of 72 inputs, from 20 columns; the spectrum falls as those of real models do."""
    rng = np.random.default_rng(0)
    sizes = 0.8 ** np.arange(72)
    x = rng.standard_normal((200, 72)) * sizes @ np.linalg.qr(rng.standard_normal((72, 72)))[0]
    x = jnp.asarray(x + 3, jnp.float32)
    params = {"x": {"kernel": jnp.ones((72, 5))}}

    def calibrate(params):
        return jnp.sum(linear(x, params["x"]["kernel"]))

    found = []
    for spare in (12, 100):
        monkeypatch.setattr(eva, "_SPARE", spare)
        (spectrum,) = eva.measure(
            jax.random.key(0), params, {("x", "kernel"): 4}, jax.tree_util.Partial(calibrate)
        ).values()
        found.append([np.asarray(part) for part in spectrum])
    centred = np.asarray(x, np.float64) - np.asarray(x, np.float64).mean(axis=0)
    values, right = np.linalg.svd(centred)[1:]
    shares = values[:4] ** 2 / np.sum(values**2)
    for directions, explained in found:
        np.testing.assert_allclose(explained, shares, rtol=1e-4)
        assert np.abs(np.abs(np.sum(directions * right[:4].T, axis=0)) - 1).max() < 1e-4
        assert (directions[np.abs(directions).argmax(axis=0), range(4)] > 0).all()


def family_model(family):
    return random_model(family, **FAMILIES[family].fields)


def loss_of(model, config):
    batch = jax.tree.map(jnp.asarray, make_batch(0))
    run = Config(adapter=config, train=TrainConfig(batch_size=4, remat="none"))
    return batch, calibrate_on(model, run, [batch])


@pytest.mark.parametrize("init", ["eva", "lora_ga", "loftq"])
def test_parts_of_a_fused_projection_start_from_their_own_columns(error, init):
    """EVA: all parts read the same inputs. The others: the factors of each part lie in its columns,
    and with them the start is the model (or, over NF4, nearer to it).
    """
    model, rounds = family_model("phi3"), {"loftq_iter": 2} if init == "loftq" else {}
    targets = ["qkv_proj.q", "qkv_proj.v", "gate_up_proj.up"]
    config = AdapterConfig(rank=3, init=init, target_modules=targets, **rounds)
    batch, calibrate = loss_of(model, config)
    calibrate = None if init == "loftq" else calibrate
    base, adapters = lora.init(jax.random.key(0), model.params, config, calibrate, scheme="nf4")
    small = {tree.dotted(path): leaf for path, leaf in tree.flatten(adapters).items()}
    q, v = (small[f"model.layers.self_attn.qkv_proj.{part}.lora_a"] for part in "qv")
    assert (error(q, v) <= 1e-6) == (init == "eva")
    expected = model.apply(model.params, batch["tokens"])
    if init == "loftq":
        base, plain = (quantize_tree(params, "nf4") for params in (base, model.params))
        found = model.apply(lora.bind(base, adapters, config), batch["tokens"])
        lost = model.apply(plain, batch["tokens"])
        assert jnp.linalg.norm(found - expected) < 0.98 * jnp.linalg.norm(lost - expected)
    else:
        found = model.apply(lora.bind(base, adapters, config), batch["tokens"])
        assert error(found, expected) <= 1e-5
        again = lora.residual(model.params, adapters, config)
        jax.tree.map(np.testing.assert_array_equal, again, base)


def test_lora_ga_over_experts_starts_as_the_model(error):
    model = family_model("mixtral")
    config = AdapterConfig(rank=2, init="lora_ga", target_modules=["experts.down_proj", "gate"])
    batch, calibrate = loss_of(model, config)
    base, adapters = lora.init(jax.random.key(0), model.params, config, calibrate)
    bound, expected = lora.bind(base, adapters, config), model.apply(model.params, batch["tokens"])
    assert error(model.apply(bound, batch["tokens"]), expected) <= 1e-5
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(adapters))


def test_loftq_is_nearer_to_the_weight_with_every_round():
    """|W - Q - s a b| against what plain quantisation loses."""
    lost = []
    for rounds in (0, 1, 4):
        fields = {"rank": 8, "init": "loftq", "loftq_iter": max(1, rounds)}
        row = Row(fields | {"target_modules": ["v_proj"]})
        model = tiny_model(UNTIED)
        base, adapters = start(row, model, 0)
        merged = lora.merge(base if rounds == 0 else lora.bind(base, adapters, row.config))
        original, found = (
            params["model"]["layers"]["self_attn"]["v_proj"]["kernel"]
            for params in (model.params, merged)
        )
        lost.append(float(jnp.linalg.norm(original - found)))
    assert lost[2] < lost[1] < 0.85 * lost[0]


def test_what_loftq_trains_on_is_found_again():
    """As a run that goes on does: the base from the original weights and the checkpoint."""
    row = ROWS["LoftQ of three rounds, DoRA, patterns"]
    model = tiny_model(row.hf_config)
    base, adapters = start(row, model, 0)
    again = quantize_tree(lora.residual(model.params, adapters, row.config), "nf4")
    jax.tree.map(np.testing.assert_array_equal, again, base)


def test_a_function_of_any_kind_can_calibrate(error):
    """Here it is no `Partial` and holds its data."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((50, 12), (50, 9)))
    kernel = jnp.asarray(rng.standard_normal((12, 9)), jnp.float32)
    params = {"x": {"kernel": kernel}}
    config = AdapterConfig(rank=3, init="lora_ga", target_modules=["x"])
    loss = lambda params: jnp.mean((linear(x, params["x"]["kernel"]) - y) ** 2)  # noqa: E731
    base, adapters = lora.init(jax.random.key(0), params, config, loss)
    left, values, right = np.linalg.svd(2 * np.asarray(x.T @ (x @ kernel - y)) / y.size)
    own = adapters["x"]
    assert error(np.abs(own["lora_a"]), np.abs(left[:, :3])) <= 1e-4
    rows = np.abs(values[3:6, None] * right[3:6]) * 9**0.25 / 4
    assert error(np.abs(own["lora_b"]), rows) <= 1e-4
    assert error(base["x"]["kernel"], kernel - 16 / 3 * own["lora_a"] @ own["lora_b"]) <= 1e-6


# What is refused


REFUSED = [
    (UNTIED, "eva", {"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens, which is an em"),
    (UNTIED, "eva", {"target_modules": ["lm_head"]}, "lm_head, which is an output head"),
    (UNTIED, "loftq", {"target_modules": ["lm_head"]}, "lm_head, which is never quantised"),
    (UNTIED, "lora_ga", {"target_modules": ["v_proj"], "rank": 9}, "has 16 directions, and needs"),
    (
        TIED,
        "lora_ga",
        {"target_modules": ["lm_head"], "ensure_weight_tying": False},
        "init=lora_ga does not support lm_head, which is an embedding",
    ),
]


@pytest.mark.parametrize(("hf_config", "init", "fields", "text"), REFUSED)
def test_weights_without_a_start_are_named(hf_config, init, fields, text):
    config = AdapterConfig(init=init, **{"rank": 4} | fields)
    with pytest.raises(UserError, match=text):
        find_trainable(describe(hf_config).params, config)


def test_experts_have_no_start_of_some_kinds():
    params = describe(FAMILIES["mixtral"].fields | {"model_type": "mixtral"}).params
    for init, target, text in (
        ("eva", "experts.down_proj", "experts.down_proj, which is a stack of experts"),
        ("loftq", "gate", "gate, which is never quantised"),
    ):
        with pytest.raises(UserError, match=text):
            find_trainable(params, AdapterConfig(rank=2, init=init, target_modules=[target]))


def test_what_an_init_needs_is_asked_for():
    model, key = tiny_model(UNTIED), jax.random.key(0)
    for init in ("eva", "lora_ga"):
        with pytest.raises(UserError, match=f"init={init} needs data: pass calibrate"):
            lora.init(key, model.params, AdapterConfig(init=init, **LAYER))
    rho = AdapterConfig(init="eva", eva_rho=2.0, **LAYER)
    with pytest.raises(UserError, match="init=eva needs data"):
        lora.redistribute(key, model.params, rho, None)
    config = AdapterConfig(init="loftq", **LAYER)
    with pytest.raises(UserError, match=r"pass scheme, .*\(int8 or nf4"):
        lora.init(key, model.params, config)
    with pytest.raises(UserError, match="Did you mean 'nf4'"):
        lora.init(key, model.params, config, scheme="nf5")
    with pytest.raises(UserError, match="init on float weights first"):
        lora.init(key, quantize_tree(model.params, "nf4"), config, scheme="nf4")


def test_too_few_tokens_and_inputs_that_nobody_counts_are_named():
    model, key = tiny_model(UNTIED), jax.random.key(0)
    config = AdapterConfig(rank=8, init="eva", **LAYER)
    batch = make_batch(0, rows=1, time=9)
    batch["loss_weights"][:] = np.arange(9) > 2
    run = Config(adapter=config, train=TrainConfig(batch_size=1))
    few = calibrate_on(model, run, [jax.tree.map(jnp.asarray, batch)])
    with pytest.raises(UserError, match="needs 8 directions of 6 supervised tokens"):
        lora.init(key, model.params, config, few)
    blind = lambda params: jnp.sum(  # noqa: E731
        materialize(params["model"]["layers"]["self_attn"]["q_proj"]["kernel"])
    )
    with pytest.raises(UserError, match="q_proj.kernel cannot be counted"):
        lora.init(key, model.params, config, blind)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["adapter.init=loftq"], "adapter.init=loftq corrects the error of a quantised base"),
        (
            ["adapter.init=loftq", "base_dtype=nf4", "export.merged=true"]
            + ["export.quantized_base=original"],
            "set it to dequantized",
        ),
        (["adapter.eva_rho=2"], "adapter.eva_rho=2.0 is for adapter.init=eva, and it is default"),
        (["adapter.loftq_iter=2"], "loftq_iter=2 is for adapter.init=loftq"),
        (["adapter.calibration_batches=3"], "is for adapter.init=eva and lora_ga"),
        (["adapter.init=eva", "adapter.calibration_batches=0"], "must be at least 1"),
        (["adapter.init=eva", "adapter.eva_rho=0.5"], "adapter.eva_rho=0.5 must be at least 1"),
        (["adapter.method=full", "adapter.calibration_batches=2"], "is a setting of adapters"),
    ],
)
def test_settings_that_say_nothing_or_contradict(overrides, text):
    with pytest.raises(UserError, match=text):
        configs.parse({"model": "tiny"}, overrides)


def test_batches_without_a_supervised_token_are_refused(monkeypatch):
    batch = make_batch(0) | {"loss_weights": np.zeros((4, 13), np.float32)}

    class Loader:
        def batch(self, step, rows):
            return batch

    monkeypatch.setattr(calibration.sets, "make_loader", lambda *_: Loader())
    config = configs.parse({"model": "tiny", "train": {"batch_size": 4}}, ["adapter.init=eva"])
    given: Any = None
    with pytest.raises(UserError, match="the first 4 rows of data.train have no supervised token"):
        calibration.make_calibrate(config, given, given, given, make_mesh(MeshConfig()))
    plain = dataclasses.replace(config, adapter=AdapterConfig())
    assert calibration.make_calibrate(plain, given, given, given, make_mesh(MeshConfig())) is None
