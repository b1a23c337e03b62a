"""Every method and valid combination: no change at the start, live = merged, what trains and what
never does, counts, and that each is exact where it says so.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import AdapterConfig, Config, lora, tree
from lora_jax.adapters import low_rank as low_rank
from lora_jax.adapters.inits import draw
from lora_jax.config import TrainConfig
from lora_jax.errors import UserError
from lora_jax.models import describe
from lora_jax.quantize import SCHEMES, dequantize, quantize, quantize_tree
from lora_jax.targets import find_trainable
from lora_jax.train.optimizer import join, label_tree, make_optimizer
from lora_jax.train.step import make_train_step
from lora_jax.weights import LoraWeight, linear

from . import methods
from .methods import QUICK, ROWS, SVD, VIRTUAL, make_batch, names_of, stirred, tiny_model, trains

SEEDS = (0, 1)
STEPS = 20
# The base of LoftQ is quantised after its init: it has tests of its own.
CHANGING = [n for n, r in ROWS.items() if r.config.changes_base and r.config.init != "loftq"]


@functools.cache
def plain_logits(tied, bias):
    """Logits of plain, quantised or merged parameters."""
    row = dataclasses.replace(ROWS["LoRA"], tied=tied, bias=bias)
    return jax.jit(describe(row.hf_config).apply, compiler_options=QUICK)


def live_and_merged(row, model):
    """A jitted function of (base, adapters, tokens): live logits, and the merged tree."""

    def both(base, adapters, tokens):
        bound = lora.bind(base, adapters, row.config)
        return model.apply(bound, tokens), lora.merge(bound)

    return jax.jit(both, compiler_options=QUICK)


def as_bytes(params):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def start(row, seed):
    """A model, the base that its adapters stand on, and fresh adapters."""
    model = tiny_model(row.hf_config, seed, row.scheme)
    return model, *methods.start(row, model, seed)


@pytest.fixture(scope="module", params=ROWS | VIRTUAL)
def case(request):
    row = (ROWS | VIRTUAL)[request.param]
    return row, [start(row, seed) for seed in SEEDS]


@pytest.mark.parametrize("case", ROWS, indirect=True)
def test_nothing_changes_at_first_and_live_equals_merged(case, error):
    row, starts = case
    logits = plain_logits(row.tied, row.bias)
    both = live_and_merged(row, starts[0][0])
    for seed, (model, base, adapters) in enumerate(starts):
        tokens = make_batch(seed)["tokens"]
        expected = logits(model.params, tokens)
        first, merged = both(base, adapters, tokens)
        assert error(first, expected) <= row.start
        assert error(logits(merged, tokens), expected) <= row.start
        moved = stirred(base, adapters, row.config, seed)
        live, merged = both(base, moved, tokens)
        assert error(live, logits(merged, tokens)) <= 1e-5
        assert error(live, expected) > 1e-2


def test_twenty_steps_move_what_trains_and_nothing_else(case):
    row, starts = case
    rate = 3e-3 if row.config.method in ("lora", "full") else 3e-2  # few numbers have a longer way
    train = TrainConfig(
        batch_size=4, learning_rate=rate, schedule="constant", grad_clip=10.0, remat="none"
    )
    optimizer = make_optimizer(train, row.config)
    step = None
    for seed, (model, base, adapters) in enumerate(starts):
        before = as_bytes(base)
        batch, state = make_batch(seed), optimizer.init(adapters)
        if step is None:
            traced = make_train_step(model, Config(adapter=row.config, train=train), optimizer)
            key = jax.random.key(0)
            step = traced.lower(adapters, state, base, batch, key).compile(QUICK)
        masks = trains(adapters, find_trainable(model.params, row.config))
        trainable = [mask.shape for mask in masks.values() if mask.any()]
        moments = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
        assert moments == sorted(2 * trainable)

        first = {path: np.array(leaf) for path, leaf in tree.flatten(adapters).items()}
        losses = []
        for i in range(STEPS):
            adapters, state, metrics = step(adapters, state, base, batch, jax.random.key(i))
            losses.append(float(metrics["loss"]))
        assert as_bytes(base) == before
        assert np.isfinite(losses).all()
        assert losses[-1] < losses[0] - 0.05, losses
        for path, leaf in tree.flatten(adapters).items():
            old, new, mask = first[path], np.asarray(leaf), masks[path]
            assert old[~mask].tobytes() == new[~mask].tobytes(), path
            moved = (old != new)[mask].mean() if mask.any() else 1
            # Tokens that do not occur have no gradient in an embedding that is no head.
            assert moved > (0 if "embed_tokens" in path else 0.9), path


# One optimizer over the joint tree. Rows that hold all kinds of leaves, and integers in the base.


def split(joint, params):
    leaves, base = tree.flatten(joint), tree.flatten(params)
    small = {path: leaf for path, leaf in leaves.items() if path not in base}
    return tree.unflatten({path: leaves[path] for path in base}), tree.unflatten(small)


@pytest.mark.parametrize(
    "name",
    [
        "LoRA-FA, DoRA, LoRA+",
        "biased layer whole, bias all",
        "tokens, tied",
        "LoRA+, NF4",
    ],
)
def test_joint_tree_and_adapters_alone_get_the_same_update(name):
    row = ROWS[name]
    _, base, adapters = start(row, 0)
    adapters = stirred(base, adapters, row.config, 0)
    train = TrainConfig(grad_clip=0.01, weight_decay=0.1, learning_rate=1e-2)
    optimizer, joint = make_optimizer(train, row.config), join(base, adapters)

    def loss(joint):
        merged = lora.merge(lora.bind(*split(joint, base), row.config))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(merged))

    grads = jax.jit(jax.grad(loss, allow_int=True), compiler_options=QUICK)(joint)
    floats, zeros = jax.dtypes.float0, jnp.zeros_like
    grads = jax.tree.map(lambda g, x: zeros(x) if g.dtype == floats else g, grads, joint)
    of_base, small = split(grads, base)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(of_base)) > 0.1
    assert optax.tree.norm(small) > 2 * train.grad_clip
    joint_state, own_state = optimizer.init(joint), optimizer.init(adapters)
    update = jax.jit(optimizer.update, compiler_options=QUICK)
    for factor in (1, 3):  # the second step sees moments
        grads, small = (jax.tree.map(lambda g, f=factor: f * g, t) for t in (grads, small))
        of_joint, joint_state = update(grads, joint_state, joint)
        of_own, own_state = update(small, own_state, adapters)
    frozen, trained = split(of_joint, base)
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(frozen))
    jax.tree.map(np.testing.assert_array_equal, trained, of_own)
    sizes = [
        sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
        for state in (joint_state, own_state)
    ]
    assert sizes[0] == sizes[1]


def test_labels_of_every_leaf():
    leaves = (
        *("lora_a", "lora_b", "init_a", "init_b", "magnitude", "full_kernel", "full_scale"),
        *("full_bias", "full_embedding", "trainable_tokens", "kernel", "embedding", "bias"),
    )
    tree_of = {"x": dict.fromkeys(leaves, 0)}
    full = dict.fromkeys((n for n in leaves if n.startswith("full_")), "full")
    own = {name: name for name in ("lora_a", "lora_b", "magnitude")}
    expected = dict.fromkeys(leaves, "frozen") | own | full | {"trainable_tokens": "full"}
    assert label_tree(tree_of)["x"] == expected
    assert label_tree(tree_of, freeze_a=True)["x"] == expected | {"lora_a": "frozen"}


# LoRA+


@pytest.mark.parametrize("fields", [{}, {"freeze_a": True}])
def test_lora_plus_moves_b_by_its_ratio_and_nothing_else(fields):
    shape = (3, 4)
    names = ("lora_a", "lora_b", "magnitude", "full_kernel", "trainable_tokens", "init_a")
    adapters = {"x": {name: jnp.ones(shape) for name in names}}
    rng = np.random.default_rng(0)
    grads = {"x": {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name in names}}
    train = TrainConfig(learning_rate=1e-2, weight_decay=0.1, schedule="constant")

    def update(ratio):
        optimizer = make_optimizer(train, AdapterConfig(lora_plus_ratio=ratio, **fields))
        return optimizer.update(grads, optimizer.init(adapters), adapters)[0]["x"]

    one, sixteen = update(1.0), update(16.0)
    np.testing.assert_allclose(sixteen["lora_b"], 16 * one["lora_b"], rtol=1e-6)
    for name in set(names) - {"lora_b"}:
        np.testing.assert_array_equal(sixteen[name], one[name])
        frozen = name == "init_a" or (name == "lora_a" and fields)
        assert not np.any(one[name]) if frozen else np.all(one[name]), name
    assert np.all(one["lora_b"])


# What LoRA promises of its scale


def toy(layers, rows, columns, seed=0):
    """A stack of equal matrices: slices differ in their draws alone."""
    kernel = np.random.default_rng(seed).standard_normal((1, rows, columns)) * rows**-0.5
    kernel = jnp.asarray(np.repeat(kernel, layers, axis=0), jnp.float32)
    return {"model": {"layers": {"q_proj": {"kernel": kernel}}}}


def kernel_of(bound):
    return lora.merge(bound)["model"]["layers"]["q_proj"]["kernel"]


def first_update(rank, use_rslora):
    """The mean over 8,000 draws of A of what the first step of Adam does to a matrix (in, out)."""
    rows, columns = 12, 9
    params = toy(8000, rows, columns)
    config = AdapterConfig(rank=rank, alpha=8.0, use_rslora=use_rslora)
    params, adapters = lora.init(jax.random.key(rank), params, config)
    gradient = jnp.asarray(np.random.default_rng(1).standard_normal((rows, columns)), jnp.float32)

    def loss(adapters):
        return jnp.sum(kernel_of(lora.bind(params, adapters, config)) * gradient)

    train = TrainConfig(learning_rate=1e-3, schedule="constant", grad_clip=None)
    optimizer = make_optimizer(train, config)
    updates, _ = optimizer.update(jax.grad(loss)(adapters), optimizer.init(adapters), adapters)
    moved = optax.apply_updates(adapters, updates)
    change = kernel_of(lora.bind(params, moved, config)) - kernel_of(params)
    return np.asarray(change, np.float64).mean(axis=0)


def test_the_expected_first_update_does_not_depend_on_the_rank():
    """With alpha / rank, that is; with alpha / sqrt(rank) it grows with sqrt(rank)."""
    size = np.linalg.norm
    one = first_update(1, False)
    for rank in (3, 8):
        assert size(first_update(rank, False) - one) < 0.1 * size(one)
        growth = size(first_update(rank, True)) / size(first_update(1, True))
        assert abs(growth / rank**0.5 - 1) < 0.05
    assert size(one) > 1e-4


@pytest.mark.parametrize(("p", "q"), [(4.0, 2.0), (0.5, 16.0), (8.0, 0.125)])
def test_rescaling_alpha_init_and_both_rates_leaves_training_alone(p, q, error):
    """alpha / (p q), p A, q B, rates p and q times as large: Adam without epsilon sees no
    difference.
    """
    params, rng = toy(2, 12, 9), np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((20, n)), jnp.float32) for n in (12, 9))

    def run(p, q):
        config = AdapterConfig(rank=3, alpha=8.0 / (p * q), lora_plus_ratio=q / p)
        _, adapters = lora.init(jax.random.key(0), params, config)
        own = adapters["model"]["layers"]["q_proj"]
        b = np.random.default_rng(1).standard_normal(own["lora_b"].shape)  # no gradient is 0
        own |= {"lora_a": p * own["lora_a"], "lora_b": q * jnp.asarray(b, jnp.float32)}
        train = TrainConfig(
            steps=8, learning_rate=1e-2 * p, schedule="constant", epsilon=0.0, grad_clip=None
        )
        optimizer = make_optimizer(train, config)
        state = optimizer.init(adapters)

        def loss(adapters):
            kernel = lora.bind(params, adapters, config)["model"]["layers"]["q_proj"]["kernel"]
            outputs = jax.vmap(lambda w: linear(x, w))(kernel)
            return jnp.mean((outputs - y) ** 2)

        @jax.jit
        def step(adapters, state):
            value, grads = jax.value_and_grad(loss)(adapters)
            updates, state = optimizer.update(grads, state, adapters)
            return optax.apply_updates(adapters, updates), state, value

        losses = []
        for _ in range(train.steps):
            adapters, state, value = step(adapters, state)
            losses.append(float(value))
        return np.asarray(losses)

    expected = run(1.0, 1.0)
    assert error(run(p, q), expected) <= 1e-5
    assert expected[0] - expected[-1] > 0.1


# Inits


@pytest.mark.parametrize("init", ["default", "gaussian"])
@pytest.mark.parametrize("leaf", ["kernel", "embedding"])
def test_draws_have_the_deviation_they_promise(init, leaf):
    params = {"model": {"embed_tokens": {"embedding": jnp.zeros((901, 60))}}}
    if leaf == "kernel":
        params = {"model": {"q_proj": {"kernel": jnp.zeros((901, 60))}}}
    config = AdapterConfig(rank=20, init=init, target_modules=["q_proj", "embed_tokens"][:1])
    name = "q_proj" if leaf == "kernel" else "embed_tokens"
    config = dataclasses.replace(config, target_modules=[name])
    if leaf == "embedding":
        params["lm_head"] = {"kernel": jnp.zeros((60, 901))}
    for seed in SEEDS:
        own = lora.init(jax.random.key(seed), params, config)[1]["model"][name]
        drawn, zero = ("lora_a", "lora_b") if leaf == "kernel" else ("lora_b", "lora_a")
        values = np.asarray(own[drawn])
        deviation = {"default": (3 * 901) ** -0.5, "gaussian": 1 / 20}[init]
        deviation = 1.0 if leaf == "embedding" else deviation
        assert abs(values.std() / deviation - 1) < 0.05
        assert abs(values.mean()) < 0.1 * deviation
        assert not np.any(own[zero])
        edge = np.abs(values).max() / deviation
        assert edge < 3**0.5 + 1e-3 if init == "default" and leaf == "kernel" else edge > 3


def test_gaussian_divides_by_the_rank_of_each_layer():
    params = toy(3, 400, 300)
    config = AdapterConfig(rank=16, init="gaussian", rank_pattern={r"1\.q_proj": 4})
    a = lora.init(jax.random.key(0), params, config)[1]["model"]["layers"]["q_proj"]["lora_a"]
    for i, rank in enumerate((16, 4, 16)):
        assert abs(np.asarray(a[i, :, :rank]).std() * rank - 1) < 0.06
        assert not np.any(a[i, :, rank:])


def test_zero_a_draws_the_other_half():
    """lora_a is zero, lora_b uniform by the rank of its layer, and the model unchanged."""
    params = toy(3, 40, 300)
    config = AdapterConfig(rank=16, init="zero_a", rank_pattern={r"1\.q_proj": 4})
    adapters = lora.init(jax.random.key(0), params, config)[1]
    own = adapters["model"]["layers"]["q_proj"]
    assert not np.any(own["lora_a"])
    for i, rank in enumerate((16, 4, 16)):
        values = np.asarray(own["lora_b"][i, :rank])
        assert abs(values.std() * (3 * rank) ** 0.5 - 1) < 0.06
        assert np.abs(values).max() <= rank**-0.5
        assert not np.any(own["lora_b"][i, rank:])
    merged = lora.merge(lora.bind(params, adapters, config))
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    with pytest.raises(UserError, match="init=zero_a and freeze_a=true"):
        AdapterConfig(init="zero_a", freeze_a=True)


def test_orthogonal_halves_have_no_product_at_any_rank_of_a_stack(error):
    params = toy(3, 40, 30)
    config = AdapterConfig(
        rank=6, init="orthogonal", rank_pattern={r"1\.q_proj": 2}, layers_to_transform=[0, 1]
    )
    for seed in SEEDS:
        _, adapters = lora.init(jax.random.key(seed), params, config)
        a, b = (adapters["model"]["layers"]["q_proj"][n] for n in ("lora_a", "lora_b"))
        assert float(jnp.abs(a @ b).max()) < 1e-6
        for i, rank in enumerate((6, 2, 0)):
            of_a, of_b = np.asarray(a[i]), np.asarray(b[i])
            assert np.linalg.matrix_rank(of_a) == np.linalg.matrix_rank(of_b) == rank // 2
            assert not np.any(of_a[:, rank:]) and not np.any(of_b[rank:])
            assert np.all(of_a[:, :rank]) and np.all(of_b[:rank])
        assert np.abs(np.asarray(a[0] - a[1])[:, :2]).max() > 1e-3


@pytest.mark.parametrize("name", CHANGING)
def test_residual_and_update_are_the_weight_and_can_be_told_apart_again(name, error):
    """init's base + scale a b = W; `residual` finds that base again; `as_plain` is the same model
    with twice the rank over W.
    """
    row = ROWS[name]
    for seed in SEEDS:
        model, base, adapters = start(row, seed)
        found = find_trainable(model.params, row.config)
        assert tree.flatten(base).keys() == tree.flatten(model.params).keys()
        original, left = tree.flatten(model.params), tree.flatten(base)
        small = tree.flatten(adapters)
        for target in found.targets:
            path, scale = (*target.path, target.leaf), target.scales(row.config.use_rslora)
            a, b = (np.asarray(small[(*target.path, n)], np.float64) for n in ("init_a", "init_b"))
            weight = np.asarray(original[path], np.float64)
            assert error(np.asarray(left[path], np.float64) + scale * a @ b, weight) <= 1e-6
            chosen = np.asarray(target.ranks) > 0
            gone = np.abs(weight - left[path]).max(axis=(-2, -1))
            assert np.all((gone > 1e-2) == (chosen if target.stacked else chosen[0])), path
            if row.config.init == "pissa":
                slices = weight if target.stacked else weight[None]
                for i, rank in enumerate(target.ranks):
                    values = np.linalg.svd(slices[i], compute_uv=False)
                    rest = np.asarray(left[path] if not target.stacked else left[path][i])
                    largest = np.linalg.svd(rest, compute_uv=False)[0]
                    assert abs(largest - values[rank]) < 1e-5
        untouched = set(left) - {(*target.path, target.leaf) for target in found.targets}
        assert all(left[path] is original[path] for path in untouched)

        moved = stirred(base, adapters, row.config, seed)
        again = tree.flatten(lora.residual(model.params, moved, row.config))
        assert all(np.array_equal(again[path], left[path]) for path in left)

        plain, doubled = low_rank.as_plain(tree.flatten(moved), found)
        assert not any(path[-1].startswith("init_") for path in plain)
        expected = lora.merge(lora.bind(base, moved, row.config))
        bound = low_rank.bind(original, plain, doubled, low_rank.factors, None)
        for target in found.targets:
            path = (*target.path, target.leaf)
            assert error(lora.merge({"x": bound[path]})["x"], tree.flatten(expected)[path]) <= 1e-5
        for target, twice in zip(found.targets, doubled.targets, strict=True):
            assert twice.ranks == tuple(2 * rank for rank in target.ranks)
            scales = [t.scales(row.config.use_rslora) for t in (target, twice)]
            np.testing.assert_allclose(*scales, rtol=1e-6)
            a = np.asarray(plain[(*target.path, "lora_a")])
            assert not np.any(a * (1 - twice.rank_mask()))
        assert doubled.config.init == "default"
        if max(map(max, (t.ranks for t in doubled.targets))) <= 16:
            as_config = lora.bind(model.params, tree.unflatten(plain), doubled.config)
            bound_too = tree.flatten(as_config)
            for path, leaf in bound.items():
                if isinstance(bound_too[path], LoraWeight):
                    np.testing.assert_array_equal(bound_too[path].b, leaf.b)


def test_a_draw_depends_on_the_key_and_the_path_alone():
    params = tiny_model(ROWS["LoRA"].hf_config).params
    own = []
    for fields in ({"target_modules": ["q_proj"]}, {"target_modules": "all-linear"}):
        config = AdapterConfig(rank=4, **fields)
        (target,) = (t for t in find_trainable(params, config).targets if t.path[-1] == "q_proj")
        own.append(draw(jax.random.key(3), target, None, "default", False)[0])
        given = lora.init(jax.random.key(3), params, config)[1]
        np.testing.assert_array_equal(
            own[-1], given["model"]["layers"]["self_attn"]["q_proj"]["lora_a"]
        )
    np.testing.assert_array_equal(*own)


# DoRA's norm


def float_shapes(jaxpr):
    """Shapes of all float arrays that a program makes, those of its inner programs too."""
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            if jnp.issubdtype(out.aval.dtype, jnp.floating):
                yield out.aval.shape
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from float_shapes(inner)


@pytest.mark.parametrize("name", ["DoRA, NF4", "NF4", "DoRA, int8, rsLoRA", "DoRA"])
def test_a_quantised_base_is_dequantised_one_layer_at_a_time(name):
    """In the whole train step, DoRA's norms and the gradient among it. Over floats the same search
    finds nothing either: no product of the size of a weight is ever made for a stack.
    """
    row = ROWS[name]
    model, base, adapters = start(row, 0)
    config = Config(adapter=row.config, train=TrainConfig(batch_size=4))
    optimizer = make_optimizer(config.train, row.config)
    step = make_train_step(model, config, optimizer)
    program = jax.make_jaxpr(step)(
        adapters, optimizer.init(adapters), base, make_batch(0), jax.random.key(0)
    )
    made = set(float_shapes(program.jaxpr))
    targets = find_trainable(model.params, row.config).targets
    stacks = {(len(target.ranks), *target.shape) for target in targets}
    assert made & stacks == set()
    if row.scheme:
        assert {target.shape for target in targets} <= made  # one of them, in the scans
    merging = jax.make_jaxpr(lambda p, a: lora.merge(lora.bind(p, a, row.config)))(base, adapters)
    assert stacks <= set(float_shapes(merging.jaxpr))  # the search does see them


# Tied embeddings


# Over what a quantised base was before


@pytest.mark.parametrize("name", ["PiSSA", "OLoRA"])
def test_a_quantised_residual_is_nearer_to_the_weight_than_the_quantised_weight(name):
    """Section 4 of the PiSSA paper; for OLoRA only that the sum is what was asked for."""
    row = dataclasses.replace(ROWS[name], fields=ROWS[name].fields | {"rank": 16})
    model, base, adapters = start(row, 0)
    found = find_trainable(model.params, row.config)
    original, left, small = (tree.flatten(t) for t in (model.params, base, adapters))
    for target in found.targets:
        path = (*target.path, target.leaf)
        update = small[(*target.path, "lora_a")] @ small[(*target.path, "lora_b")]
        update = update * target.scales(row.config.use_rslora)
        ours = dequantize(quantize(left[path], "nf4")) + update - original[path]
        naive = dequantize(quantize(original[path], "nf4")) - original[path]
        ratio = float(jnp.linalg.norm(ours) / jnp.linalg.norm(naive))
        assert ratio < (0.95 if name == "PiSSA" else 1.5), ratio


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True, "use_rslora": True}], ids=names_of)
def test_what_an_init_left_can_be_quantised_and_trains(scheme, fields, error):
    """The order of a run: init over floats, then the residual is quantised."""
    row = dataclasses.replace(ROWS["PiSSA"], fields={"init": "pissa", **fields})
    model, floats, adapters = start(row, 0)
    base, tokens = quantize_tree(floats, scheme), make_batch(0)["tokens"]
    both, logits = live_and_merged(row, model), plain_logits(row.tied, row.bias)
    first, _ = both(base, adapters, tokens)
    expected = logits(model.params, tokens)
    assert 1e-4 < error(first, expected) < error(logits(base, tokens), expected)
    live, merged = both(base, stirred(base, adapters, row.config, 0), tokens)
    assert error(live, logits(merged, tokens)) <= 1e-5
    again = lora.residual(model.params, adapters, row.config)
    assert as_bytes(quantize_tree(again, scheme)) == as_bytes(base)


# bfloat16


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"init": "pissa"}, {"bias": "all"}])
def test_adapters_are_float32_over_a_bfloat16_base(fields, error):
    row = dataclasses.replace(ROWS["LoRA"], fields=fields, bias=True)
    model = tiny_model(row.hf_config)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    base, adapters = lora.init(jax.random.key(0), half, row.config)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    merged = lora.merge(lora.bind(base, stirred(base, adapters, row.config, 0), row.config))
    kernels = [leaf for path, leaf in tree.flatten(merged).items() if path[-1] == "kernel"]
    assert {leaf.dtype for leaf in kernels} == {jnp.dtype("bfloat16")}


def test_every_row_is_a_different_combination():
    rows = [(str(row.fields), row.tied, row.bias, row.scheme) for row in ROWS.values()]
    assert all(one != other for one, other in itertools.combinations(rows, 2))
    assert {row.config.init for row in ROWS.values()} == {
        "default",
        "zero_a",
        "gaussian",
        "orthogonal",
        "pissa",
        "olora",
        "loftq",
        "eva",
        "lora_ga",
    }
    assert SVD in {row.start for row in ROWS.values()}
