"""The step: what it leaves alone, what it costs, and that its sums do not depend on how they are
split.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import adapters as methods
from lora_jax import data, sharding, tree
from lora_jax.objectives import Outputs, cross_entropy
from lora_jax.train import optimizer as optimizers
from lora_jax.train.step import batch_sums, make_eval_step, make_train_step

from .tiny import distance, make_config, random_adapters, random_batch, tiny_model

# An optimizer that moves nothing and whose state is the last gradient.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)

FEW = "adapter.target_modules=[q_proj, down_proj]"  # quicker to compile, where it does not matter


def start(config, seed=1, **fields):
    """A tiny model and adapters that already do something."""
    model = tiny_model(**fields)
    _, adapters = methods.init(jax.random.key(0), model.params, config.adapter)
    return model, random_adapters(adapters, seed)


def step_once(model, config, adapters, batch, key=0):
    """Metrics and gradients of one step."""
    step = make_train_step(model, config, KEEP_GRADIENT)
    own, state = (jax.tree.map(jnp.copy, adapters) for _ in range(2))
    _, grads, metrics = step(own, state, model.params, batch, jax.random.key(key))
    return metrics, grads


def sums_and_gradients(model, config, adapters, batch):
    """Summed loss and weights of a batch, and the gradient of the sum."""

    def total(adapters):
        bound = methods.bind(model.params, adapters, config.adapter)
        return batch_sums(model, bound, batch, config)

    return jax.jit(jax.value_and_grad(total, has_aux=True))(adapters)


# What the step leaves alone, and what it holds


def test_frozen_base_is_bit_identical_after_fifty_steps():
    config = make_config("train.remat=none", "train.learning_rate=1e-2", "train.steps=50")
    model, adapters = start(config)
    before = jax.tree.map(lambda x: np.array(x).tobytes(), model.params)
    optimizer = optimizers.make_optimizer(config.train)
    step, state = make_train_step(model, config, optimizer), optimizer.init(adapters)
    batch, first = random_batch(), jax.tree.map(np.array, adapters)
    losses = []
    for i in range(50):
        adapters, state, metrics = step(adapters, state, model.params, batch, jax.random.key(i))
        losses.append(float(metrics["loss"]))
    assert jax.tree.map(lambda x: np.array(x).tobytes(), model.params) == before
    assert losses[-1] < 0.5 * losses[0]
    assert all(
        (x != y).any()
        for x, y in zip(jax.tree.leaves(adapters), jax.tree.leaves(first), strict=True)
    )


def test_step_returns_adapters_and_optimizer_state_in_place_and_nothing_else():
    config = make_config("adapter.rank=8")
    model, adapters = start(config)
    optimizer = optimizers.make_optimizer(config.train)
    state = optimizer.init(adapters)
    step = make_train_step(model, config, optimizer)
    compiled = step.lower(adapters, state, model.params, random_batch(), jax.random.key(0))
    memory = compiled.compile().memory_analysis()
    kept = tree.nbytes(adapters) + tree.nbytes(state)
    assert memory.alias_size_in_bytes == kept
    leaves = len(jax.tree.leaves((adapters, state))) + 3
    scalars = 3 * 4  # loss, grad_norm, supervised_tokens
    assert (
        0 <= memory.output_size_in_bytes - kept - scalars <= 8 * (leaves + 1)
    )  # tuple of pointers
    assert memory.output_size_in_bytes < kept + 4096 < kept + tree.nbytes(model.params)


def test_optimizer_arrays_exist_for_trainable_leaves_only():
    config = make_config()
    model, adapters = start(config)
    optimizer = optimizers.make_optimizer(config.train)
    for parameters in (adapters, optimizers.join(model.params, adapters)):
        state = optimizer.init(parameters)
        arrays = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
        moments = [leaf.shape for leaf in jax.tree.leaves(adapters)] * 2
        assert arrays == sorted(moments)
        assert tree.nbytes(state) <= 2 * tree.nbytes(adapters) + 64


def test_five_steps_compile_once():
    config = make_config("train.remat=none", FEW)
    model, adapters = start(config)
    optimizer = optimizers.make_optimizer(config.train)
    chex.clear_trace_counter()
    once = chex.assert_max_traces(optimizer.update, n=1)
    step = make_train_step(model, config, optax.GradientTransformation(optimizer.init, once))
    state = optimizer.init(adapters)
    for i in range(5):
        batch = random_batch(seed=i)
        adapters, state, _ = step(adapters, state, model.params, batch, jax.random.key(i))


# FLOPs, as the compiler counts them. A scan of one trip is counted once, so the model has one
# layer.

WIDE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def plain_loss(params, adapters, batch, scale):
    """The same one-layer model by hand: dense logits, W and a, b as plain arrays; `adapters` None
    is the bare model.
    """
    weights = {
        name: params["model"]["layers"][part][name]["kernel"][0]
        for part, names in LINEARS.items()
        for name in names
    }

    def project(x, name):
        y = x @ weights[name]
        if adapters is None:
            return y
        part = "mlp" if name in LINEARS["mlp"] else "self_attn"
        own = adapters["model"]["layers"][part][name]
        return y + (x @ own["lora_a"][0]) @ (own["lora_b"][0] * scale)

    def norm(x, leaf):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * leaf

    def turn(x, cos, sin):
        first, second = jnp.split(x, 2, axis=-1)
        return x * cos + jnp.concatenate([-second, first], axis=-1) * sin

    layers, table = params["model"]["layers"], params["model"]["embed_tokens"]["embedding"]
    rows, time = batch["tokens"].shape
    x = table[batch["tokens"].reshape(-1)]
    size = 64
    inverse = 10000.0 ** (-jnp.arange(0, size, 2) / size)
    angles = jnp.arange(time)[:, None] * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)[None, None]
    h = norm(x, layers["input_layernorm"]["scale"][0])
    q, k, v = (
        project(h, name).reshape(rows, time, -1, size).swapaxes(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    q, k = (turn(y, jnp.cos(angles), jnp.sin(angles)) for y in (q, k))
    group = q.shape[1] // k.shape[1]
    q = q.reshape(rows, k.shape[1], group * time, size)
    scores = jnp.einsum("bkqh,bksh->bkqs", q, k).reshape(rows, -1, group, time, time) * size**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((time, time), bool)), scores, -1e30)
    chosen = jax.nn.softmax(scores, axis=-1).reshape(rows, -1, group * time, time)
    mixed = jnp.einsum("bkqs,bksh->bkqh", chosen, v).reshape(rows, -1, time, size)
    x = x + project(mixed.swapaxes(1, 2).reshape(rows * time, -1), "o_proj")
    h = norm(x, layers["post_attention_layernorm"]["scale"][0])
    x = x + project(jax.nn.silu(project(h, "gate_proj")) * project(h, "up_proj"), "down_proj")
    logits = norm(x, params["model"]["norm"]["scale"]) @ table.T
    log_p = jax.nn.log_softmax(logits.reshape(rows, time, -1)[:, :-1])
    picked = jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(picked * batch["loss_weights"][:, 1:]) / batch["loss_weights"][:, 1:].sum()


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_step_costs_what_a_factored_step_by_hand_costs_and_far_less_than_full_fine_tuning():
    config = make_config("adapter.rank=16", "train.remat=none", "train.loss_chunk=256")
    model, adapters = start(config, **WIDE)
    batch = random_batch(1, 256, WIDE["vocab_size"], weights=(1.0,))
    optimizer = optimizers.make_optimizer(config.train)
    state = optimizer.init(adapters)

    def by_hand(adapters, state, params, batch):
        loss, grads = jax.value_and_grad(plain_loss, argnums=1)(params, adapters, batch, 1.0)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, loss

    def full(params, batch):
        return jax.value_and_grad(plain_loss)(params, None, batch, 1.0)

    step = make_train_step(model, config, optimizer)
    ours = flops(step, adapters, state, model.params, batch, jax.random.key(0))
    reference = flops(by_hand, adapters, state, model.params, batch)
    everything = flops(full, model.params, batch)
    assert ours <= 1.02 * reference, f"{ours / reference:.4f} of a step by hand"
    assert ours <= 0.75 * everything, f"{ours / everything:.4f} of full fine-tuning"
    # The three compute the same thing.
    expected = jax.jit(plain_loss)(model.params, adapters, batch, 1.0)
    nll, weight = make_eval_step(model, config)(adapters, model.params, batch)
    assert distance(nll / weight, expected) <= 1e-5


# The optimizer over the joint tree


def test_joint_tree_and_adapters_alone_get_the_same_update():
    config = make_config("train.grad_clip=0.5", "train.weight_decay=0.1", "adapter.rank=4")
    model, adapters = start(config)
    joint = optimizers.join(model.params, adapters)
    optimizer = optimizers.make_optimizer(config.train)
    batch = random_batch()

    def loss(joint):
        own = tree.flatten(joint)
        params = {path: leaf for path, leaf in own.items() if path in tree.flatten(model.params)}
        small = {path: leaf for path, leaf in own.items() if path not in params}
        bound = methods.bind(tree.unflatten(params), tree.unflatten(small), config.adapter)
        nll, weight = batch_sums(model, bound, batch, config)
        return nll / weight

    grads = tree.flatten(jax.jit(jax.grad(loss))(joint))
    grads = {path: 100 * g if path[-1] == "lora_b" else g for path, g in grads.items()}
    small = {path: g for path, g in grads.items() if path in tree.flatten(adapters)}
    frozen = [path for path in grads if path not in small]
    assert any(np.abs(grads[path]).max() > 0 for path in frozen)
    assert optax.tree.norm(small) > 10 * config.train.grad_clip

    joint_state, own_state = optimizer.init(joint), optimizer.init(adapters)
    for _ in range(3):  # later steps see moments: a clip by group would show there
        small, grads = (
            {path: g * (1 + len(path[-2]) / 4) for path, g in old.items()} for old in (small, grads)
        )
        of_joint, joint_state = optimizer.update(tree.unflatten(grads), joint_state, joint)
        of_own, own_state = optimizer.update(tree.unflatten(small), own_state, adapters)
    of_joint, of_own = tree.flatten(of_joint), tree.flatten(of_own)
    assert all(not np.any(of_joint[path]) for path in frozen)
    assert all(np.array_equal(of_joint[path], of_own[path]) for path in of_own)
    moments = [leaf for leaf in jax.tree.leaves(own_state) if leaf.ndim]
    assert all(
        np.array_equal(x, y)
        for x, y in zip(
            moments, [leaf for leaf in jax.tree.leaves(joint_state) if leaf.ndim], strict=True
        )
    )


def test_clipping_is_one_norm_over_all_trainable_leaves():
    config = make_config("train.grad_clip=0.5", "train.beta1=0", "adapter.rank=4")
    _, adapters = start(config)
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), adapters)
    grads = tree.unflatten(
        {p: 100 * g if p[-1] == "lora_b" else g for p, g in tree.flatten(grads).items()}
    )
    optimizer = optimizers.make_optimizer(config.train)
    _, state = optimizer.update(grads, optimizer.init(adapters), adapters)
    first = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    norm = optax.tree.norm(grads)
    # With beta1 = 0 the first moments are the clipped gradients themselves.
    clipped = {leaf.shape: leaf for leaf in first}
    assert norm > 100
    found = sorted(float(jnp.abs(leaf).max()) for leaf in first)
    expected = sorted(
        value
        for g in jax.tree.leaves(grads)
        for clip in [float(jnp.abs(g).max() * 0.5 / norm)]
        for value in (clip, (1 - config.train.beta2) * clip**2)
    )
    assert clipped and np.allclose(found, expected, rtol=1e-4)


# Sums that do not depend on how the batch is split


@pytest.fixture(scope="module")
def whole_batch():
    """A ragged batch of eight rows, one without supervised tokens, and its step in one piece."""
    config = make_config("train.batch_size=8", "train.remat=none", "adapter.rank=4")
    model, adapters = start(config)
    batch = random_batch(8, 16)
    for row, supervised in enumerate((1, 2, 15, 0, 7, 3, 11, 5)):
        batch["loss_weights"][row] = np.arange(16) >= 16 - supervised
        batch["segment_ids"][row, 14 - row :] *= row % 2  # some rows end in padding
    batch["loss_weights"] *= batch["segment_ids"]
    return model, adapters, batch, step_once(model, config, adapters, batch)


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_ragged_micro_batches_are_one_batch(whole_batch, micro):
    model, adapters, batch, (metrics, grads) = whole_batch
    config = make_config(
        "train.batch_size=8",
        "train.remat=none",
        "adapter.rank=4",
        f"train.micro_batch_size={micro}",
    )
    found, found_grads = step_once(model, config, adapters, batch)
    assert distance(found, metrics) <= 1e-5
    assert distance(found_grads, grads) <= 1e-5
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-2


@pytest.fixture(scope="module")
def summed():
    """Sums and gradients of any batch of eight rows of 16 tokens, compiled once."""
    config = make_config("adapter.rank=4", FEW)
    model, adapters = start(config)

    def total(adapters, batch):
        bound = methods.bind(model.params, adapters, config.adapter)
        return batch_sums(model, bound, batch, config)

    compiled = jax.jit(jax.value_and_grad(total, has_aux=True))
    return lambda batch: compiled(adapters, batch)


def packed_and_alone(lengths, seed):
    """Two batches of eight rows of 16 tokens: the same examples packed, and one to a row."""
    rng = np.random.default_rng(seed)
    examples = [
        data.Example(
            rng.integers(0, 272, n).astype(np.int32), rng.choice([0, 1], n).astype(np.float32), ""
        )
        for n in lengths
    ]

    def stack(rows):
        rows = [[examples[i] for i in row] for row in rows]
        built = [data.to_row(row, 16) for row in rows + [[]] * (8 - len(rows))]
        return {name: np.stack([row[name] for row in built]) for name in built[0]}

    return stack(data.pack(lengths, 16)), stack([[i] for i in range(len(examples))])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_packed_rows_are_the_same_examples_unpacked(summed, lengths, seed):
    packed, alone = packed_and_alone(lengths, seed)
    assert distance(summed(packed), summed(alone)) <= 1e-5


@pytest.mark.parametrize("seed", [0, 1])
def test_packing_that_leaks_would_be_seen(summed, seed):
    packed, alone = packed_and_alone([5, 9, 3, 12, 7, 4, 8], seed)
    assert packed["segment_ids"].max() > 1
    one_segment = {"segment_ids": np.minimum(packed["segment_ids"], 1)}
    counted_on = {"positions": np.tile(np.arange(16, dtype=np.int32), (8, 1))}
    assert distance(summed(packed | one_segment), summed(alone)) > 1e-3
    # Rotary positions are relative: to count on is harmless where nothing leaks.
    assert distance(summed(packed | counted_on), summed(alone)) <= 1e-5


@pytest.fixture(scope="module")
def untied():
    """A model with its own output head, adapted too, and fractional weights."""
    config = make_config("adapter.rank=4", "adapter.target_modules=[q_proj, down_proj, lm_head]")
    model, adapters = start(config, tie_word_embeddings=False)
    batch = random_batch(4, 13, weights=(0.0, 0.25, 1.0, 1.5))
    batch["loss_weights"][2] = 0
    batch["loss_weights"][0, :9] = 0
    return config, model, adapters, batch


def hidden_of(untied, adapters):
    config, model, _, batch = untied
    module = model.module(methods.bind(model.params, adapters, config.adapter))
    inputs = {name: batch[name] for name in ("positions", "segment_ids")}
    return module, module.hidden(batch["tokens"], **inputs)[0]


@pytest.fixture(scope="module")
def dense(untied):
    """Sums and gradient of the cross-entropy from all logits at once."""
    batch = untied[-1]

    def loss(adapters):
        module, hidden = hidden_of(untied, adapters)
        log_p = jax.nn.log_softmax(module.logits(hidden)[:, :-1])
        picked = jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        weights = jnp.asarray(batch["loss_weights"])[:, 1:]
        return -jnp.sum(picked * weights), weights.sum()

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(untied[2])


@pytest.mark.parametrize("chunk", [1, 20, 52, 1000])  # of 4 x 13 tokens: 1, 5, 13, 13 in a row
def test_chunked_cross_entropy_is_the_dense_one(untied, dense, chunk):
    batch = jax.tree.map(jnp.asarray, untied[-1])

    def chunked(adapters):
        outputs = Outputs(*hidden_of(untied, adapters), batch, chunk)
        return cross_entropy.plain_sums(outputs)[:2]

    found = jax.jit(jax.value_and_grad(chunked, has_aux=True))(untied[2])
    assert distance(found, dense) <= 1e-5
    if chunk == 20:  # without a gradient it is another program
        assert distance(jax.jit(chunked)(untied[2]), dense[0]) <= 1e-5
    assert all(float(jnp.abs(leaf).max()) > 1e-2 for leaf in dense[1]["lm_head"].values())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "head"])
def test_a_vocabulary_as_wide_as_the_hidden_states_trains_on_a_mesh(tied):
    config = make_config("adapter.rank=4", "adapter.target_modules=all-linear")
    model, adapters = start(config, vocab_size=32, hidden_size=32, tie_word_embeddings=tied)
    batch = random_batch(4, 13, vocab=32)
    alone = sums_and_gradients(model, config, adapters, batch)
    with jax.set_mesh(sharding.make_mesh(config.mesh, jax.devices()[:1])):
        assert distance(sums_and_gradients(model, config, adapters, batch), alone) <= 1e-5


def test_remat_changes_neither_loss_nor_gradients():
    results = {}
    for remat in ("none", "full", "dots", "offload"):
        config = make_config("adapter.rank=4", FEW, f"train.remat={remat}")
        model, adapters = start(config)
        results[remat] = step_once(model, config, adapters, random_batch())
    assert all(distance(result, results["none"]) <= 1e-6 for result in results.values())


# Dropout and precision


def test_dropout_depends_on_the_key_alone_and_evaluation_ignores_it():
    config = make_config("adapter.rank=4", FEW, "adapter.dropout=0.5", "train.remat=none")
    still = make_config("adapter.rank=4", FEW)
    model, adapters = start(config)
    batch = random_batch()
    step = make_train_step(model, config, KEEP_GRADIENT)

    def gradients(key):
        own, state = (jax.tree.map(jnp.copy, adapters) for _ in range(2))
        _, grads, metrics = step(own, state, model.params, batch, jax.random.key(key))
        return grads, metrics["loss"]

    first, again, other = gradients(0), gradients(0), gradients(1)
    assert distance(first, again) == 0 < abs(first[1] - other[1])
    assert all(
        np.abs(x - y).max() > 0
        for x, y in zip(jax.tree.leaves(first[0]), jax.tree.leaves(other[0]), strict=True)
    )
    with_rate, without = (
        make_eval_step(model, c)(adapters, model.params, batch) for c in (config, still)
    )
    assert distance(with_rate, without) == 0 and abs(first[1] - with_rate[0] / with_rate[1]) > 1e-3


def test_dropout_differs_between_micro_batches():
    options = ("adapter.dropout=0.5", "train.batch_size=2", "adapter.rank=4", FEW)
    config = make_config(*options, "train.micro_batch_size=1", "train.remat=none")
    model, adapters = start(config)
    row = random_batch(1)
    twice = {name: np.concatenate([value, value]) for name, value in row.items()}
    metrics, _ = step_once(model, config, adapters, twice)

    @jax.jit
    def loss_of(key):
        bound = methods.bind(model.params, adapters, config.adapter, key)
        nll, weight = batch_sums(model, bound, row, config)
        return nll / weight

    losses = [float(loss_of(key)) for key in jax.random.split(jax.random.key(0), 2)]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert distance(metrics["loss"], np.mean(losses)) <= 1e-5


def test_bfloat16_computes_with_float32_adapters_and_gradients():
    wide = make_config("adapter.rank=4", FEW, "train.remat=none")
    narrow = make_config("adapter.rank=4", FEW, "train.remat=none", "train.compute_dtype=bfloat16")
    model, adapters = start(wide)
    batch = random_batch()
    expected, _ = step_once(model, wide, adapters, batch)
    metrics, grads = step_once(model, narrow, adapters, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in metrics.values()} == {jnp.dtype("float32")}
    assert 0 < abs(metrics["loss"] - expected["loss"]) <= 0.02 * expected["loss"]
