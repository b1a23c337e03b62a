"""Eight devices: traces and programs of a loop of one's own, by the mesh, printed as JSON."""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))
from lora_jax import AdapterConfig, formats, lora, sharding
from lora_jax.config import MeshConfig
from tests.train.tiny import write_model

CONFIG = AdapterConfig(rank=4, target_modules="all-linear")


def run(directory, mesh=None, dtype=None, several=False, loaded=None):
    """Three steps: [traces, programs, whether adapters were split as `adapter_specs` says]."""
    model, traces = formats.load(directory, mesh=mesh, dtype=dtype), []
    params, optimizer = model.params, optax.adam(1e-2)
    key = jax.random.key(0)
    if several:
        keys = jax.random.split(key, 3)
        adapters = jax.vmap(lambda key: lora.init(key, params, CONFIG)[1])(keys)
    elif loaded:
        adapters = formats.read_adapter(loaded, params)[0]
    else:
        adapters = lora.init(key, params, CONFIG)[1]

    def loss(adapters, params, tokens):
        logits = model.apply(lora.bind(params, adapters, CONFIG), tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    def step(adapters, state, params, tokens):
        traces.append(0)
        value, gradients = jax.value_and_grad(loss)(adapters, params, tokens)
        updates, state = optimizer.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    tokens = np.arange(8)[None]
    start = optimizer.init
    if several:
        step, tokens = jax.vmap(step, in_axes=(0, 0, None, 0)), np.arange(24).reshape(3, 1, 8)
        start = jax.vmap(start)
    state = lora.place_state(start(adapters), params)
    places = jax.tree.map(lambda x: x.sharding, (adapters, state))
    step = jax.jit(step, out_shardings=(*places, None) if mesh else None)
    split = True
    if mesh and not several:
        specs = sharding.adapter_specs(adapters, params, model.rules, mesh)
        wanted = sharding.shardings(specs, mesh)
        same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim), adapters, wanted)
        parted = [x for x in jax.tree.leaves(adapters) if not x.is_fully_replicated]
        split = jax.tree.all(same) and len(parted) > 0
    for _ in range(3):
        adapters, state, _ = step(adapters, state, params, tokens)
    return [len(traces), step._cache_size(), split]


if __name__ == "__main__":
    home = Path(tempfile.mkdtemp())
    directory = write_model(home / "model")
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
    model = formats.load(directory)
    params, adapters = lora.init(jax.random.key(1), model.params, CONFIG)
    formats.write_adapter(home / "adapter", adapters, params, CONFIG, base_model="tiny")
    found = {
        "devices": len(jax.devices()),
        "default": run(directory),
        "split": run(directory, mesh),
        "split, int8": run(directory, mesh, "int8"),
        "split, vmap": run(directory, mesh, several=True),
        "split, loaded": run(directory, mesh, loaded=home / "adapter"),
    }
    print(json.dumps(found))
