"""Loops of one's own compile their step once: nothing changes its place after the first step."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import AdapterConfig, formats, lora

from .train.tiny import random_adapters, write_model

README = Path(__file__).parents[1] / "README.md"
EVERY_START = (
    {"target_modules": "all-linear"},
    {"use_dora": True, "modules_to_save": ["embed_tokens"]},
    {"init": "pissa", "target_modules": ["q_proj"]},
    {"method": "prompt", "num_virtual_tokens": 3},
    {"method": "prefix", "num_virtual_tokens": 3},
    {"method": "full"},
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("files") / "model")


def make_step(model, config, optimizer):
    """A plain training step as a user would write it, and the list of its traces."""
    traces = []

    def loss(adapters, params, tokens):
        bound, prefix = lora.bind(params, adapters, config), lora.prefix(adapters, config)
        logits = model.apply(bound, tokens, prefix=prefix)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    @jax.jit
    def step(adapters, state, params, tokens):
        traces.append(0)
        value, gradients = jax.value_and_grad(loss)(adapters, params, tokens)
        updates, state = optimizer.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    return step, traces


def test_the_loop_of_the_readme_is_compiled_once(directory, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    names = {}
    exec(code.replace("demo:smollm2-135m-instruct", str(directory)), names)
    losses = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert names["step"]._cache_size() == 1


@pytest.mark.parametrize("fields", EVERY_START, ids=str)
def test_every_kind_of_adapter_is_compiled_once(directory, fields):
    model, config = formats.load(directory), AdapterConfig(rank=4, **fields)
    soft = fields.get("method") in ("prompt", "prefix")
    calibrate = lora.as_model_sees(model, config) if soft else None
    params, adapters = lora.init(jax.random.key(0), model.params, config, calibrate)
    optimizer = optax.adam(1e-2)
    step, traces = make_step(model, config, optimizer)
    state = optimizer.init(adapters)
    for _ in range(3):
        adapters, state, _ = step(adapters, state, params, np.arange(8)[None])
    assert len(traces) == step._cache_size() == 1


def test_several_adapters_at_once_are_compiled_once(directory):
    model, config = formats.load(directory), AdapterConfig(rank=4)
    keys = jax.random.split(jax.random.key(0), 3)
    several = jax.vmap(lambda key: lora.init(key, model.params, config)[1])(keys)
    optimizer = optax.adam(1e-2)
    one, traces = make_step(model, config, optimizer)
    step = jax.jit(jax.vmap(one, in_axes=(0, 0, None, 0)))
    state = jax.vmap(optimizer.init)(several)
    tokens = np.arange(24).reshape(3, 1, 8)
    for _ in range(3):
        several, state, losses = step(several, state, model.params, tokens)
    assert losses.shape == (3,) and len(traces) == step._cache_size() == 1


def test_swapping_adapters_compiles_nothing(directory, tmp_path, error):
    model, config = formats.load(directory), AdapterConfig(rank=4, target_modules="all-linear")
    params, fresh = lora.init(jax.random.key(0), model.params, config)
    trained = random_adapters(fresh)
    target = tmp_path / "adapter"
    formats.write_adapter(target, trained, params, config, base_model="tiny")
    loaded, _ = formats.read_adapter(target, params)
    forward = jax.jit(lambda a, p, t: model.apply(lora.bind(p, a, config), t))
    tokens = np.arange(8)[None]
    base, own, again = (forward(a, params, tokens) for a in (fresh, trained, loaded))
    assert forward._cache_size() == 1
    assert error(again, own) == 0 and error(own, base) > 0.01


def test_on_a_mesh(on_eight_devices):
    found = on_eight_devices(Path(__file__).parent / "train" / "own_loop.py")
    assert found.pop("devices") == 8
    # By mesh: traces, programs, and whether adapters are split like their weights from the start.
    assert set(found) == {"default", "split", "split, int8", "split, vmap", "split, loaded"}
    assert all(value == [1, 1, True] for value in found.values()), found


def test_shapes_and_traced_parameters_are_left_alone(directory):
    model, config = formats.load(directory), AdapterConfig(rank=4)
    adapters = jax.jit(lambda params: lora.init(jax.random.key(0), params, config)[1])(model.params)
    plain = lora.init(jax.random.key(0), model.params, config)[1]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, adapters, plain))
    state = optax.adam(1e-2).init(plain)
    assert lora.place_state(state, model.params) is state
