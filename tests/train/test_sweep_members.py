"""Members of one program: each computes what it computes alone."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as lora
from lora_jax import quantize
from lora_jax.adapters import member as padding
from lora_jax.plan import program as planning
from lora_jax.sweep import groups, program
from lora_jax.targets import find_trainable
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.step import make_train_step

from .tiny import distance, make_config, random_batch, tiny_model

STEPS = 50
COMMON = ("train.batch_size=2", f"train.steps={STEPS}", "train.remat=none")


def members_of(model, settings, common=COMMON):
    """Members with these overrides over a model with its weights."""
    found = []
    for number, overrides in enumerate(settings):
        config = make_config(*common, *overrides)
        trainable = find_trainable(model.params, config.adapter)
        found.append(SimpleNamespace(number=number, config=config, trainable=trainable, shapes={}))
    return found


def batches_of(member, steps=STEPS):
    """Batches of a member, drawn from its seed."""
    seed = 1000 * member.config.seed
    return [random_batch(rows=2, time=8, seed=seed + step) for step in range(steps)]


def train_alone(model, member, batches):
    """Losses and adapters of a lone run."""
    config = member.config
    params, adapters = lora.init(groups.init_key(config), model.params, config.adapter)
    optimizer = make_optimizer(config.train, config.adapter)
    step = make_train_step(model, config, optimizer)
    adapters = jax.tree.map(jnp.copy, adapters)
    state, key, losses = optimizer.init(adapters), groups.dropout_key(config), []
    for number, batch in enumerate(batches):
        own = jax.random.fold_in(key, number + 1)
        adapters, state, measured = step(adapters, state, params, batch, own)
        losses.append(float(measured["loss"]))
    return losses, adapters


def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(one) for one in x]), *trees)


def start_together(model, group):
    """Values, adapters and optimizer states of all members before the first step."""
    values = [group.values(one) for one in group.members]
    own = [
        lora.init(groups.init_key(one.config), model.params, one.config.adapter)[1]
        for one in group.members
    ]
    padded = [padding.pad(one, group.joint) for one in own]
    states = [program.init_state(v, group, a) for v, a in zip(values, padded, strict=True)]
    return stack(values), stack(padded), stack(states)


def train_together(model, group, batches, moves=None):
    """Losses (steps, members) and adapters of each member in its own shapes."""
    values, adapters, state = start_together(model, group)
    step = program.make_step(model, group, len(group.members))
    rates = np.stack([groups.rates(one.config.train) for one in group.members], axis=1)
    moves = np.ones(len(group.members), bool) if moves is None else moves
    losses = []
    for number, own in enumerate(zip(*batches, strict=True)):
        now = dataclasses.replace(
            values,
            optimizer=dataclasses.replace(values.optimizer, rate=rates[number]),
            step=np.full(len(own), number + 1, np.int32),
            moves=moves,
        )
        batch = {name: np.stack([one[name] for one in own]) for name in own[0]}
        adapters, state, measured = step(now, adapters, state, model.params, batch)
        losses.append(np.asarray(measured["loss"]))
    assert step._cache_size() == 1
    found = [
        padding.cut(jax.tree.map(lambda x, i=i: x[i], adapters), one.trainable)
        for i, one in enumerate(group.members)
    ]
    return np.asarray(losses), found


def check_equal(model, settings, most=1e-5):
    members = members_of(model, settings)
    (group,) = groups.make_groups(members)
    batches = [batches_of(one) for one in members]
    losses, adapters = train_together(model, group, batches)
    for i, member in enumerate(members):
        alone, own = train_alone(model, member, batches[i])
        assert distance(losses[:, i], np.asarray(alone)) <= most, member.number
        assert distance(adapters[i], own) <= most, member.number


PLAIN = [
    ["adapter.rank=4", "train.learning_rate=5e-3", "seed=1"],  # more grows rounding
    ["adapter.rank=2", "adapter.alpha=3", "adapter.target_modules=[q_proj,down_proj]", "seed=2"]
    + ["adapter.dropout=0.2", "train.weight_decay=0.1", "train.beta1=0.8", "train.beta2=0.99"],
    ["adapter.rank=1", "adapter.use_rslora=true", "adapter.lora_plus_ratio=4", "seed=3"]
    + ["adapter.alpha=1", "adapter.init=gaussian", "train.grad_clip=0.1"]
    + ["train.schedule=cosine"],
    ["adapter.rank=3", "adapter.layers_to_transform=[1]", "train.grad_clip=null"]
    + ["train.warmup_steps=5", "train.label_smoothing=0.1", "seed=4"],
]


def test_each_member_equals_its_lone_run():
    check_equal(tiny_model(num_hidden_layers=2), PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_members_over_a_small_base(base):
    model = tiny_model(hidden_size=64, intermediate_size=64)
    params = (
        quantize.quantize_tree(model.params, "nf4")
        if base == "nf4"
        else jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    )
    calm = [*PLAIN[0], "train.learning_rate=1e-3"]  # at more, 50 steps multiply each rounding
    check_equal(model.replace(params=params), [calm, PLAIN[1]])


@pytest.mark.slow
def test_members_with_dora():
    settings = [[*one, "adapter.use_dora=true"] for one in PLAIN[:2]]
    check_equal(tiny_model(), settings)


@pytest.mark.slow
def test_a_start_that_changes_the_base_is_the_member_s_own():
    settings = [["adapter.rank=4", "adapter.init=pissa", "seed=1"], ["adapter.rank=2"]]
    check_equal(tiny_model(), [*settings, ["adapter.rank=3", "adapter.init=olora"]], most=1e-4)


def test_what_one_member_does_leaves_the_others_bit_identical():
    model = tiny_model()
    quiet = [["adapter.rank=2", "seed=1"], ["adapter.rank=2", "seed=2"]]
    wild = [[*quiet[0], "train.weight_decay=0.5", "train.learning_rate=1e30"], quiet[1]]
    found = []
    for settings in (quiet, wild):
        (group,) = groups.make_groups(members_of(model, settings))
        batches = [batches_of(one, 6) for one in group.members]
        found.append(train_together(model, group, batches))
    assert not np.isfinite(found[1][0][-1, 0])
    np.testing.assert_array_equal(found[0][0][:, 1], found[1][0][:, 1])
    for x, y in zip(*(jax.tree.leaves(one[1][1]) for one in found), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_member_that_does_not_move_keeps_its_state():
    model = tiny_model()
    (group,) = groups.make_groups(members_of(model, [["adapter.rank=2"], ["adapter.rank=1"]]))
    batches = [batches_of(one, 2) for one in group.members]
    own = start_together(model, group)[1]
    _, adapters = train_together(model, group, batches, np.array([False, True]))
    before = padding.cut(jax.tree.map(lambda x: x[0], own), group.members[0].trainable)
    assert distance(adapters[0], before) == 0


def test_padding_stays_zero_and_cut_inverts_pad():
    model = tiny_model()
    members = members_of(model, [["adapter.rank=3"], ["adapter.rank=1", *PLAIN[1][2:3]]])
    (group,) = groups.make_groups(members)
    own = lora.init(jax.random.key(0), model.params, members[1].config.adapter)[1]
    padded = padding.pad(own, group.joint)
    assert {x.shape for x in jax.tree.leaves(padded)} == {
        x.shape for x in jax.tree.leaves(group.joint.shapes)
    }
    assert distance(padding.cut(padded, members[1].trainable), own) == 0


def test_groups_by_what_the_program_computes():
    model = tiny_model()
    settings = [["adapter.rank=2"], ["adapter.use_dora=true"], ["train.batch_size=4"]]
    found = groups.make_groups(members_of(model, [*settings, ["adapter.rank=8"]]))
    assert [[one.number for one in group.members] for group in found] == [[0, 3], [1], [2]]
    assert groups.reasons(found) == "adapter.use_dora, train.batch_size"


def compile_step(model, settings, common, rows, time):
    """Memory of the compiled step of some members, from shapes alone, and bytes of its parts."""
    (group,) = groups.make_groups(members_of(model, settings, common))
    count = len(settings)
    values, adapters = group.values(group.members[0]), group.joint.shapes
    state = jax.eval_shape(functools.partial(program.init_state, values, group), adapters)
    own = (values, adapters, state, random_batch(rows=rows, time=time))
    values, adapters, state, batch = jax.tree.map(lambda x: shape_of(x, count), own)
    parts = {"base": model.params, "members": (adapters, state), "batch": (values, batch)}
    step = program.make_step(model, group, count)
    lowered = step.lower(values, adapters, state, model.params, batch)
    stats = lowered.compile().memory_analysis()
    found = {name: sum(map(bytes_of, jax.tree.leaves(tree))) for name, tree in parts.items()}
    return stats, found


def shape_of(x, count):
    return jax.ShapeDtypeStruct((count, *x.shape), x.dtype)


def bytes_of(x):
    return math.prod(x.shape) * x.dtype.itemsize


SMOLLM2 = pytest.param("demo:smollm2-135m-instruct", 16, 256, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "rank", "time"), [("tiny", 4, 16), SMOLLM2])
def test_memory_is_the_base_and_so_many_members(name, rank, time):
    """Nothing but adapters, moments and batches grows with the members; with remat, temporaries do
    not grow faster than these.
    """
    config = make_config(f"model={name}")
    model = tiny_model() if name == "tiny" else planning.open_shapes(config)[1]
    common = ("train.batch_size=1", "train.remat=full", "adapter.target_modules=all-linear")
    settings = [[f"adapter.rank={rank}", f"seed={seed}"] for seed in range(8)]
    found = [compile_step(model, settings[:count], common, 1, time) for count in (1, 8)]
    (one, alone), (eight, parts) = found
    assert parts["members"] == 8 * alone["members"] and parts["base"] == alone["base"]
    for stats, own in found:
        # The step does not read every array of the values, and small ones are padded.
        assert abs(stats.argument_size_in_bytes - sum(own.values())) <= 16 * 1024
    assert eight.temp_size_in_bytes <= 8 * one.temp_size_in_bytes
