"""Adapters for a user's own Flax module, NNX or Linen, of which the library knows nothing."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from lora_jax import AdapterConfig, UserError, lora, tree
from lora_jax.config import TrainConfig
from lora_jax.train.optimizer import join, label_tree, make_optimizer
from lora_jax.weights import embed, linear

ROOT = Path(__file__).parents[1]
VOCAB, D, F, BLOCKS = 13, 32, 48, 2
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 8))


def attend(q, k, v):
    scores = jnp.where(jnp.tri(q.shape[1]), q @ k.swapaxes(1, 2) * D**-0.5, -1e9)
    return jax.nn.softmax(scores) @ v


class FastLinear(nnx.Linear):
    def __call__(self, x):
        return linear(x, self.kernel.get_value()) + self.bias.get_value()


class FastEmbed(nnx.Embed):
    def __call__(self, ids):
        return embed(ids, self.embedding.get_value())


class Block(nnx.Module):
    def __init__(self, dense, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.q, self.k, self.v = (dense(D, D, rngs=rngs) for _ in range(3))
        self.gate = dense(D, F, rngs=rngs)  # no router: there are no experts beside it
        self.down = dense(F, D, rngs=rngs)

    def __call__(self, x):
        y = self.norm(x)
        x = x + attend(self.q(y), self.k(y), self.v(y))
        return x + self.down(jax.nn.gelu(self.gate(x)))


class Net(nnx.Module):
    def __init__(self, dense=nnx.Linear, table=nnx.Embed, blocks=BLOCKS, *, rngs):
        self.embed = table(VOCAB, D, rngs=rngs)
        self.conv = nnx.Conv(1, 1, (3, 3), rngs=rngs)
        self.blocks = nnx.List([Block(dense, rngs) for _ in range(blocks)])
        self.out = dense(D, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.conv(x[..., None])[..., 0]
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class FastDense(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return linear(x, kernel) + self.param("bias", nn.initializers.zeros, shape[1:])


class LinenBlock(nn.Module):
    dense: type

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm")(x)
        x = x + attend(*(self.dense(D, name=name)(y) for name in "qkv"))
        return x + self.dense(D, name="down")(jax.nn.gelu(self.dense(F, name="gate")(x)))


class LinenNet(nn.Module):
    dense: type = nn.Dense

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, D, name="embed")(tokens)
        x = x + nn.Conv(1, (3, 3), name="conv")(x[..., None])[..., 0]
        for i in range(BLOCKS):
            x = LinenBlock(self.dense, name=f"blocks_{i}")(x)
        return self.dense(VOCAB, name="out")(x)


def nnx_functions(model):
    graphdef, state = nnx.split(model)
    return lambda params, tokens: nnx.merge(graphdef, params)(tokens), nnx.to_pure_dict(state)


def random_params(params, seed=1):
    """Biases and norms too."""
    rng = np.random.default_rng(seed)
    leaves = [leaf + 0.1 * rng.standard_normal(leaf.shape) for leaf in jax.tree.leaves(params)]
    leaves = [jnp.asarray(leaf, jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


@pytest.fixture(scope="module", params=["nnx", "linen"])
def net(request):
    """(forward of unchanged modules, forward of modules that call `linear`, params, the path of
    block i).
    """
    if request.param == "nnx":
        plain, params = nnx_functions(Net(rngs=nnx.Rngs(0)))
        fast, _ = nnx_functions(Net(FastLinear, FastEmbed, rngs=nnx.Rngs(0)))
        return plain, fast, random_params(params), "blocks.{}".format
    models = LinenNet(), LinenNet(FastDense)
    params = models[0].init(jax.random.key(0), TOKENS)["params"]
    plain, fast = (
        lambda params, tokens, model=model: model.apply({"params": params}, tokens)
        for model in models
    )
    return plain, fast, random_params(params), "blocks_{}".format


def moved(adapters, seed=2):
    """No no-op: every trainable leaf a little off."""
    return random_params(adapters, seed)


CONFIGS = {
    "all-linear": AdapterConfig(rank=2, alpha=4),
    "dora": AdapterConfig(rank=2, alpha=4, use_dora=True),
    "embedding too": AdapterConfig(rank=2, target_modules=["embed", "q", "down"]),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merged_and_factored_forward_are_equal(net, config, error):
    plain, fast, params, _ = net
    base, adapters = lora.init(jax.random.key(0), params, config)

    @jax.jit
    def forwards(adapters):
        bound = lora.bind(base, adapters, config)
        # The last: unchanged modules take bound leaves as they are, too.
        return plain(lora.merge(bound), TOKENS), fast(bound, TOKENS), plain(bound, TOKENS)

    before = jax.jit(plain)(params, TOKENS)
    assert max(error(found, before) for found in forwards(adapters)) < 1e-5
    merged, factored, unmerged = forwards(moved(adapters))
    assert error(merged, before) > 0.05
    assert error(factored, merged) < 1e-5
    assert error(unmerged, merged) < 1e-5


LINEARS = ("q", "k", "v", "gate", "down")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [f"{i}.{name}" for i in range(BLOCKS) for name in LINEARS] + ["out"]),
        (
            {"exclude_modules": ["out"]},
            [f"{i}.{name}" for i in range(BLOCKS) for name in LINEARS],
        ),
        ({"target_modules": ["q", "gate"]}, ["0.q", "0.gate", "1.q", "1.gate"]),
        ({"target_modules": ["{1}.v", "out"]}, ["1.v", "out"]),
        ({"target_modules": r".*[kv]"}, ["0.k", "0.v", "1.k", "1.v"]),
    ],
    ids=["all-linear", "without the head", "suffix", "path", "regex"],
)
def test_targets(net, fields, expected):
    _, _, params, block = net
    fields = {
        field: [entry.replace("{1}", block(1)) for entry in value]
        if isinstance(value, list)
        else value
        for field, value in fields.items()
    }
    found = lora.find_targets(params, AdapterConfig(rank=2, **fields))
    names = {name for target in found for name in target.names}
    assert names == {re.sub(r"^(\d)", lambda match: block(match[1]), name) for name in expected}


@pytest.mark.parametrize("name", ["conv", "norm", "cov"])
def test_what_is_no_linear_cannot_be_named(net, name):
    config = AdapterConfig(rank=2, target_modules=[name])
    message = rf"target_modules=\['{name}'\] matches no weight; the model has: down, gate, k, out"
    with pytest.raises(UserError, match=message):
        lora.find_targets(net[2], config)


@pytest.mark.parametrize("config", [CONFIGS["all-linear"], CONFIGS["dora"]], ids=["lora", "dora"])
def test_only_adapters_learn(net, config):
    _, fast, params, _ = net
    base, adapters = lora.init(jax.random.key(0), params, config)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(adapters, state):
        def loss(adapters):
            logits = fast(lora.bind(base, adapters, config), TOKENS[:, :-1])
            each = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:])
            return each.mean()

        value, gradients = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(adapters, updates), state, value, gradients

    kept, state, losses = jax.tree.map(jnp.copy, base), optimizer.init(adapters), []
    for _ in range(8):
        adapters, state, value, gradients = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    assert jax.tree.structure(gradients) == jax.tree.structure(adapters)
    for path, gradient in tree.flatten(gradients).items():
        assert path[-1] in ("lora_a", "lora_b", "magnitude")
        assert np.abs(gradient).max() > 1e-6, path
    jax.tree.map(np.testing.assert_array_equal, base, kept)


def test_one_optimizer_over_base_and_adapters_leaves_the_base(net):
    _, _, params, _ = net
    config = CONFIGS["dora"]
    base, adapters = lora.init(jax.random.key(0), params, config)
    adapters = moved(adapters)
    both = join(base, adapters)
    labels = label_tree(both)
    assert jax.tree.structure(labels) == jax.tree.structure(both)
    assert sum(label != "frozen" for label in jax.tree.leaves(labels)) == len(
        jax.tree.leaves(adapters)
    )
    optimizer = make_optimizer(TrainConfig(learning_rate=1e-2), config)

    @jax.jit
    def updates_of(parameters):
        gradients = jax.tree.map(jnp.ones_like, parameters)
        return optimizer.update(gradients, optimizer.init(parameters), parameters)[0]

    updates, expected = tree.flatten(updates_of(both)), tree.flatten(updates_of(adapters))
    for path, update in updates.items():
        wanted = expected.get(path, np.zeros(update.shape))
        np.testing.assert_allclose(update, wanted, rtol=1e-6, err_msg=str(path))


def test_the_factored_form_costs_less(net):
    """Of a training step, by the compiler's count; these modules have no loops, so it is whole."""
    plain, fast, params, _ = net
    config = CONFIGS["all-linear"]
    base, adapters = lora.init(jax.random.key(0), params, config)

    def flops(forward):
        step = jax.jit(jax.grad(lambda a: jnp.square(forward(lora.bind(base, a, config))).sum()))
        return step.lower(adapters).compile().cost_analysis()["flops"]

    factored = flops(lambda bound: fast(bound, TOKENS))
    assert factored < 0.8 * flops(lambda bound: plain(lora.merge(bound), TOKENS))


def test_lists_of_more_than_ten_layers_keep_their_order(error):
    """As text, "10" comes before "2", and `nnx.merge` takes arrays in the order of their keys."""
    model = Net(blocks=12, rngs=nnx.Rngs(3))
    forward, params = nnx_functions(model)
    config = AdapterConfig(rank=1, target_modules=["q"])
    base, adapters = lora.init(jax.random.key(0), params, config)
    bound = lora.bind(base, adapters, config)
    trees = base, adapters, bound, lora.merge(bound), tree.unflatten(tree.flatten(params))
    for found in trees:
        assert list(found["blocks"]) == list(range(12))
    assert error(jax.jit(forward)(lora.merge(bound), TOKENS), nnx.jit(model)(TOKENS)) < 1e-6


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)


def names_of(**modules):
    params = nnx.to_pure_dict(nnx.state(nnx.Dict(**modules)))
    found = lora.find_targets(params, AdapterConfig(rank=1))
    return {name for target in found for name in target.names}


def test_names_that_mean_stacks_elsewhere():
    rngs = nnx.Rngs(0)
    assert names_of(h=nnx.Linear(4, 6, rngs=rngs)) == {"h"}
    lists = nnx.List([nnx.Linear(4, 6, rngs=rngs) for _ in range(2)])
    assert names_of(experts=lists) == {"experts.0", "experts.1"}
    inside = nnx.Sequential(Pair(rngs), nnx.Linear(4, 6, rngs=rngs))
    expected = {"blocks.layers.0.one", "blocks.layers.0.two", "blocks.layers.1"}
    assert names_of(blocks=inside) == expected


@pytest.mark.parametrize("name", ["blocks", "layers", "experts"])
def test_matrices_where_stacks_are_expected_are_refused(name):
    message = rf"{name}.one.kernel has shape \(4, 6\): weights below a module called '{name}' are"
    with pytest.raises(UserError, match=message):
        names_of(**{name: Pair(nnx.Rngs(0))})


def test_the_page_runs(capsys):
    text = (ROOT / "docs" / "any-flax-model.md").read_text(encoding="utf-8")
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, scope)
    first, last, ratio = map(float, capsys.readouterr().out.split())
    assert last < 0.7 * first and ratio < 0.9
