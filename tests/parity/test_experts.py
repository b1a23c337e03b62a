"""Adapters on routers and stacks of experts: products of rows with their experts, gradients and the
loss that balances routers against PEFT and transformers, methods over such models, and names.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lora_jax import AdapterConfig, Config, UserError, formats, lora, tree
from lora_jax import config as configs
from lora_jax.config import TrainConfig
from lora_jax.formats import peft_tensors
from lora_jax.objectives.router import load_balancing_loss
from lora_jax.quantize import dequantize, quantize, quantize_tree
from lora_jax.targets import find_trainable
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.step import make_train_step
from lora_jax.weights import LoraWeight, expert_linear

from ..families import FAMILIES, random_model
from ..formats.test_peft import fresh_peft_model, move, save
from ..methods import QUICK, make_batch

SEEDS = (0, 1)
IN, RANK, OUT = 7, 3, 5
# Rows of every expert: some without, blocks of 32 rows that are full, begun, and just too small.
SIZES = {
    "few rows": [0, 1, 0, 2],
    "one row": [0, 0, 1],
    "a full block": [32],
    "full and begun blocks": [0, 32, 33, 0, 31, 65, 1, 0],
    "more experts than rows": [0] * 20 + [3] + [0] * 20 + [2],
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def wide(x):
    return np.asarray(x, np.float64)


def stack(experts, seed=0, gain=False) -> LoraWeight:
    return LoraWeight(
        normal(seed, experts, IN, OUT),
        normal(seed + 1, experts, IN, RANK),
        normal(seed + 2, experts, RANK, OUT),
        1 + 0.3 * normal(seed + 3, experts, 1, OUT) if gain else None,
    )


def dense(w: LoraWeight) -> np.ndarray:
    return (wide(w.base) + wide(w.a) @ wide(w.b)) * (1 if w.gain is None else wide(w.gain))


times_experts = jax.jit(expert_linear)


def by_row(x, matrices, sizes):
    """Every row times the matrix of its expert, in NumPy."""
    experts = np.repeat(np.arange(len(sizes)), sizes)
    return np.einsum("ni,nio->no", wide(x), wide(matrices)[experts])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_rows_meet_the_matrix_of_their_expert(error, sizes):
    w, x = stack(len(sizes), gain=True), normal(9, sum(sizes), IN)
    groups = jnp.asarray(sizes, jnp.int32)
    y = times_experts(x, w, groups)
    assert error(y, by_row(x, dense(w), sizes)) < 1e-5
    plain = times_experts(x, w.base, groups)
    assert error(plain, by_row(x, w.base, sizes)) < 1e-5
    # What runs on other platforms.
    assert error(plain, jax.lax.ragged_dot(x, w.base, groups)) < 1e-5


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradients_of_rows_experts_and_factors(error, sizes):
    w, x = stack(len(sizes)), normal(9, sum(sizes), IN)
    slope = normal(8, sum(sizes), OUT)

    def loss(x, base, a, b):
        return jnp.sum(slope * expert_linear(x, LoraWeight(base, a, b), jnp.asarray(sizes)))

    of_x, of_base, of_a, of_b = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(x, w.base, w.a, w.b)
    whole = np.zeros((len(sizes), IN, OUT))
    ends = np.cumsum(sizes)
    for expert, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        whole[expert] = wide(x)[end - size : end].T @ wide(slope)[end - size : end]
    assert error(of_x, by_row(slope, dense(w).swapaxes(1, 2), sizes)) < 1e-5
    assert error(of_base, whole) < 1e-5
    assert error(of_a, whole @ wide(w.b).swapaxes(1, 2)) < 1e-5
    assert error(of_b, wide(w.a).swapaxes(1, 2) @ whole) < 1e-5
    assert np.abs(whole).max() > 0.1


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_quantised_stack_is_the_one_it_stands_for(error, scheme):
    sizes = SIZES["full and begun blocks"]
    w = stack(len(sizes), gain=True)
    base = jax.jit(quantize, static_argnums=1)(w.base, scheme)
    plain, coded = (dataclasses.replace(w, base=x) for x in (jax.jit(dequantize)(base), base))
    x, groups = normal(9, sum(sizes), IN), jnp.asarray(sizes)

    def loss(x, a, b, base):
        w = LoraWeight(base, a, b, coded.gain)
        return jnp.sum(jnp.sin(expert_linear(x, w, groups)))

    assert error(times_experts(x, coded, groups), by_row(x, dense(plain), sizes)) < 1e-5
    slopes = jax.jit(jax.grad(loss, (0, 1, 2)))
    found, expected = (slopes(x, w.a, w.b, base) for base in (coded.base, plain.base))
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < 1e-5


def test_experts_compute_in_the_dtype_of_the_rows(error):
    """And gradients of experts are summed up in float32: many blocks of ones stay exact."""
    sizes = SIZES["full and begun blocks"]
    w, x = stack(len(sizes)), normal(9, sum(sizes), IN).astype(jnp.bfloat16)
    y = times_experts(x, w, jnp.asarray(sizes))
    assert y.dtype == jnp.bfloat16
    assert error(y.astype(jnp.float32), by_row(x, dense(w), sizes)) < 0.05
    ones, rows = jnp.ones((1, 1, 1), jnp.bfloat16), jnp.ones((32 * 20, 1), jnp.bfloat16)
    total = jax.jit(jax.grad(lambda w: jnp.sum(expert_linear(rows, w, jnp.array([640])))))
    count = total(ones)
    assert float(count[0, 0, 0]) == 640  # in bfloat16 256 + 1 is 256


# What PEFT trains as parameters: the router, one stack and both.
PARITY = {
    "mixtral, everything": (
        "mixtral",
        ["q_proj"],
        ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        {},
    ),
    "qwen3_moe, ranks, rsLoRA": (
        "qwen3_moe",
        [],
        ["mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"],
        dict(use_rslora=True, rank_pattern={"gate_up_proj": 3}, alpha_pattern={"down_proj": 9}),
    ),
    "gpt_oss, everything": (
        "gpt_oss",
        ["q_proj"],
        ["mlp.router.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        {},
    ),
}


def small(family, **fields):
    return FAMILIES[family].size | dict(num_hidden_layers=2) | fields


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
@pytest.mark.parametrize(("family", "modules", "stacks", "fields"), PARITY.values(), ids=PARITY)
def test_logits_and_gradients_are_those_of_peft(
    tiny_model, tmp_path, error, family, modules, stacks, fields
):
    run, given = None, dict(rank=4, alpha=6, target_modules=modules, target_parameters=stacks)
    for seed in SEEDS:
        directory, oracle = tiny_model(family, seed, **small(family))
        theirs = move(fresh_peft_model(oracle, given | fields), seed)
        save(theirs, tmp_path / f"adapter{seed}")
        model = formats.load(directory)
        adapters, config = formats.read_adapter(tmp_path / f"adapter{seed}", model.params)
        tokens = make_batch(seed, rows=2)["tokens"]
        weights = np.random.default_rng(seed).standard_normal((*tokens.shape, 97))
        weights = (weights / tokens.size**0.5).astype(np.float32)

        def score(adapters, params, tokens, weights, model=model, config=config):
            logits = model.apply(lora.bind(params, adapters, config), tokens)
            return jnp.sum(logits * weights), logits

        run = run or jax.jit(jax.grad(score, has_aux=True), compiler_options=QUICK)
        gradients, logits = run(adapters, model.params, tokens, weights)
        expected = theirs(input_ids=torch.tensor(tokens).long(), use_cache=False).logits
        (expected * torch.tensor(weights)).sum().backward()
        assert error(logits, expected.detach().numpy()) <= 1e-5
        found = find_trainable(model.params, config)
        ours = peft_tensors.pack(tree.flatten(gradients), found)
        of_theirs = {
            name.replace(".default.", "."): parameter.grad.numpy()
            for name, parameter in theirs.named_parameters()
            if parameter.requires_grad
        }
        assert {*ours} == {*of_theirs}
        for name, gradient in of_theirs.items():
            assert np.abs(gradient).max() > 1e-3, name
            assert error(ours[name], gradient) <= 1e-5, name


@functools.cache
def moe(scheme=None, family="mixtral"):
    model = random_model(family, **small(family, num_local_experts=4, intermediate_size=20))
    if scheme is None:
        return model
    coded = jax.jit(quantize_tree, static_argnums=1, compiler_options=QUICK)
    return model.replace(params=coded(model.params, scheme))


@functools.cache
def applied(scheme=None):
    return jax.jit(moe(scheme).apply, compiler_options=QUICK)


def jit(function, config):
    return jax.jit(functools.partial(function, config=config), compiler_options=QUICK)


def fresh(model, config):
    """The base that fresh adapters stand on, and they."""
    return jit(lora.init, config)(jax.random.key(0), model.params)


def make_config(**fields) -> AdapterConfig:
    return AdapterConfig(**dict(rank=4, alpha=6.0, target_modules=r".*(_proj|mlp\.gate)") | fields)


# name -> (scheme of the base, fields of AdapterConfig)
METHODS = {
    "LoRA, int8": ("int8", dict(target_modules="all-linear")),
    "DoRA, rsLoRA, NF4": ("nf4", dict(use_dora=True, use_rslora=True)),
    "DoRA of a part, a layer": (
        None,
        dict(
            use_dora=True,
            target_modules=["gate_up_proj.up", "down_proj"],
            layers_to_transform=[1],
        ),
    ),
    "PiSSA, parts, patterns": (
        None,
        dict(
            init="pissa",
            target_modules=["gate_up_proj.gate", "down_proj", "mlp.gate"],
            rank_pattern={"down_proj": 2},
        ),
    ),
    "experts whole": (None, dict(target_modules=["gate"], modules_to_save=["mlp.experts"])),
}


def moved(adapters, seed=0, size=0.1):
    """With noise where there is no padding: a product with zero stays one."""
    rng = np.random.default_rng(seed)
    leaves = {
        path: leaf
        if path[-1].startswith("init_")
        else leaf + jnp.asarray(size * rng.standard_normal(leaf.shape), jnp.float32)
        for path, leaf in tree.flatten(adapters).items()
    }
    return tree.unflatten(leaves)


@pytest.mark.parametrize(("scheme", "fields"), METHODS.values(), ids=METHODS)
def test_a_run_starts_at_the_base_and_merges_into_what_it_trained(error, scheme, fields):
    model, config, run = moe(scheme), make_config(**fields), applied(scheme)
    base, adapters = fresh(model, config)
    tokens = make_batch(0, rows=2)["tokens"]
    plain = run(model.params, tokens)
    bind = jit(lora.bind, config)
    assert error(run(bind(base, adapters), tokens), plain) <= 1e-5
    bound = bind(base, moved(adapters))
    live = run(bound, tokens)
    assert error(live, plain) > 1e-2
    merged = jax.jit(lora.merge, compiler_options=QUICK)(bound)
    assert error(run(merged, tokens), live) <= 1e-5


@pytest.mark.parametrize("name", ["DoRA, rsLoRA, NF4", "PiSSA, parts, patterns"])
def test_steps_leave_the_base_as_it_was(name):
    """Router and experts too; with dropout, and all of what trains moves."""
    scheme, fields = METHODS[name]
    model, config = moe(scheme), make_config(**fields, dropout=0.1)
    base, adapters = fresh(model, config)
    train = TrainConfig(batch_size=2, learning_rate=1e-2, schedule="constant", remat="none")
    optimizer = make_optimizer(train, config)
    before = jax.tree.map(np.array, (base, adapters))
    state, step = optimizer.init(adapters), None
    for number in range(3):
        inputs = (adapters, state, base, make_batch(number, rows=2), jax.random.key(number))
        if step is None:
            traced = make_train_step(model, Config(adapter=config, train=train), optimizer)
            step = traced.lower(*inputs).compile(QUICK)
        adapters, state, metrics = step(*inputs)
        assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
        assert "router_aux_loss" not in metrics
    for now, then in zip(jax.tree.leaves(base), jax.tree.leaves(before[0]), strict=True):
        np.testing.assert_array_equal(now, then)
    was = tree.flatten(before[1])
    for path, leaf in tree.flatten(adapters).items():
        if path[-1] in ("lora_a", "lora_b"):
            assert np.abs(leaf - was[path]).max() > 1e-3, path


def test_dropout_of_experts_has_a_key_per_layer(error):
    model, config = moe(), make_config(dropout=0.4, target_modules=["down_proj", "gate"])
    base, adapters = fresh(model, config)
    adapters, tokens, run = moved(adapters), make_batch(0, rows=2)["tokens"], applied()
    stacks = [lora.bind(base, adapters, config, jax.random.key(seed)) for seed in (0, 0, 1)]
    keys = stacks[0]["model"]["layers"]["mlp"]["experts"]["down_proj"]["kernel"].key
    assert len({tuple(row) for row in np.asarray(jax.random.key_data(keys))}) == 2
    first, again, other = (run(bound, tokens) for bound in stacks)
    np.testing.assert_array_equal(first, again)
    silent = run(lora.bind(base, adapters, config), tokens)
    assert error(first, other) > 1e-2 < error(first, silent)


def adapted(**fields):
    """Last two parts of the paths that a config adapts in layer 1, and the trainable numbers."""
    found = find_trainable(moe().params, make_config(**fields))
    names = [n for t in found.targets for n, r in zip(t.names, t.ranks, strict=True) if r]
    return {".".join(n.split(".")[4:]) for n in names if ".1." in n}, found.parameters


@pytest.mark.parametrize(
    ("fields", "expected", "numbers"),
    [
        (dict(target_modules=["experts.down_proj"]), {"experts.down_proj"}, 4 * (20 + 36)),
        (dict(target_modules=["down_proj"]), {"experts.down_proj"}, 4 * (20 + 36)),
        (dict(target_modules=["gate"]), {"gate"}, 36 + 4),
        (
            dict(target_modules=r".*\.experts\..*_proj"),
            {"experts.down_proj", "experts.gate_up_proj"},
            4 * (20 + 36) + 4 * (36 + 40),
        ),
        (dict(target_modules=["gate_up_proj.up"]), {"experts.gate_up_proj.up"}, 4 * (36 + 20)),
        (
            dict(target_modules=["experts.gate_up_proj", "gate"]),
            {"experts.gate_up_proj", "gate"},
            4 * (36 + 40) + 36 + 4,
        ),
    ],
)
def test_experts_and_routers_are_named_like_modules(fields, expected, numbers):
    """`gate` is the router, not half of gate_up_proj; every expert counts."""
    names, parameters = adapted(**fields)
    assert names == expected
    assert parameters == 2 * 4 * numbers  # layers, rank


def test_all_linear_leaves_routers_alone():
    names, _ = adapted(target_modules="all-linear")
    assert names == {
        *(f"{x}_proj" for x in "qkvo"),
        "experts.gate_up_proj",
        "experts.down_proj",
    }


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            dict(target_modules=["gate_up_proj", "gate_up_proj.up"]),
            "names model.layers.mlp.experts.gate_up_proj and .*gate_up_proj.up, which is a part",
        ),
        (dict(target_modules=["expert.down_proj"]), r"\['expert.down_proj'\] matches no weight"),
        (
            dict(target_modules=["down_proj"], modules_to_save=["experts"]),
            "both name model.layers.0.mlp.experts.down_proj",
        ),
        (dict(target_modules=["gate"], rank=5), "rank=5 is larger than .*mlp.gate allows"),
    ],
)
def test_names_that_contradict_each_other_are_refused(fields, text):
    with pytest.raises(UserError, match=text):
        adapted(**fields)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_balancing_loss_is_that_of_transformers(tiny_model, error, family):
    """Over real tokens only, in value and in the gradient of an adapted router."""
    config, run = make_config(target_modules=["gate"]), None
    count = small(family).get("num_experts", 5)
    chosen = small(family).get("num_experts_per_tok", 2)
    for seed in SEEDS:
        directory, oracle = tiny_model(family, seed, **small(family))
        model = formats.load(directory)
        adapters = moved(fresh(model, config)[1], seed, size=0.3)
        batch = make_batch(seed, rows=3)
        real = np.ones_like(batch["tokens"])
        real[0, 9:], real[2, 4:] = 0, 0

        @functools.partial(jax.jit, compiler_options=QUICK)
        def compute(adapters, params, batch, real, model=model):
            def loss(adapters):
                module = model.module(lora.bind(params, adapters, config))
                routing = module.hidden_and_routing(
                    batch["tokens"], positions=batch["positions"], segment_ids=real
                )[2]
                return load_balancing_loss(routing)

            return jax.value_and_grad(loss)(adapters)

        run = run or compute
        value, slopes = run(adapters, model.params, batch, real)
        given = dict(rank=4, alpha=6, target_modules=[], target_parameters=["mlp.gate.weight"])
        theirs = fresh_peft_model(oracle, given)
        tensors = peft_tensors.pack(tree.flatten(adapters), find_trainable(model.params, config))
        parameters = {
            name.replace(".default.", "."): parameter
            for name, parameter in theirs.named_parameters()
            if parameter.requires_grad
        }
        assert {*parameters} == {*tensors}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.tensor(tensors[name]))
        mask = torch.tensor(real)
        logits = theirs(
            input_ids=torch.tensor(batch["tokens"]).long(),
            attention_mask=mask,
            output_router_logits=True,
            use_cache=False,
        ).router_logits
        expected = load_balancing_loss_func(logits, count, chosen, mask)
        expected.backward()
        assert error(value, expected.item()) <= 1e-5
        assert error(value, load_balancing_loss_func(logits, count, chosen).item()) > 1e-4
        ours = peft_tensors.pack(tree.flatten(slopes), find_trainable(model.params, config))
        for name, parameter in parameters.items():
            assert np.abs(parameter.grad.numpy()).max() > 1e-4
            assert error(ours[name], parameter.grad.numpy()) <= 1e-5


def step_of(coefficient, micro, inputs):
    """Slopes of one step (plain SGD at rate one, no clipping) and its metrics."""
    model, config, adapters, batch = inputs
    train = TrainConfig(
        batch_size=4, micro_batch_size=micro, router_aux_loss_coef=coefficient, remat="none"
    )
    optimizer = optax.sgd(1.0)
    given = (jax.tree.map(jnp.asarray, adapters), optimizer.init(adapters), model.params, batch)
    whole = Config(adapter=config, train=train)
    step = make_train_step(model, whole, optimizer).lower(*given, jax.random.key(0)).compile(QUICK)
    after, _, metrics = step(*given, jax.random.key(0))
    return jax.tree.map(lambda x, y: x - np.asarray(y), adapters, after), metrics


def test_the_step_adds_the_balancing_loss_of_its_micro_batches(error):
    model, config = moe(), make_config(target_modules=["gate", "q_proj"])
    adapters = jax.tree.map(np.array, moved(fresh(model, config)[1], size=0.3))
    batch = make_batch(0)
    batch["segment_ids"][1, 6:] = 0
    batch["loss_weights"][1, 6:] = 0
    inputs = (model, config, adapters, batch)
    plain, none = step_of(0.0, 2, inputs)
    assert "router_aux_loss" not in none

    @jax.jit
    def balance(adapters, batch):
        def loss(adapters):
            module = model.module(lora.bind(model.params, adapters, config))
            names = ("positions", "segment_ids")
            given = {name: batch[name] for name in names}
            return load_balancing_loss(module.hidden_and_routing(batch["tokens"], **given)[2])

        return jax.value_and_grad(loss)(adapters)

    found, metrics = step_of(0.7, 2, inputs)
    each = [balance(adapters, {name: x[i::2] for name, x in batch.items()}) for i in range(2)]
    value, slopes = jax.tree.map(lambda *x: sum(x) / len(x), *each)
    assert error(metrics["router_aux_loss"], value) <= 1e-5
    assert error(metrics["loss"], none["loss"]) <= 1e-5  # stays nats per supervised token
    for ours, usual, slope in zip(*map(jax.tree.leaves, (found, plain, slopes)), strict=True):
        assert error(ours, usual + 0.7 * slope) <= 1e-5
    router = [x["model"]["layers"]["mlp"]["gate"]["lora_a"] for x in (found, plain)]
    assert error(*router) > 1e-3


def test_a_coefficient_needs_experts_and_is_not_negative():
    dense = random_model("llama", **FAMILIES["llama"].size)
    train = TrainConfig(router_aux_loss_coef=0.01)
    whole = Config(adapter=make_config(), train=train)
    with pytest.raises(UserError, match="router_aux_loss_coef=0.01 is for experts, and the model"):
        make_train_step(dense, whole, make_optimizer(train, whole.adapter))
    for value in (-0.1, float("nan"), float("inf")):
        train = TrainConfig(router_aux_loss_coef=value)
        message = "train.router_aux_loss_coef=.*(must be at least 0|is not a finite number)"
        with pytest.raises(UserError, match=message):
            configs.check(Config(model="x", train=train))
