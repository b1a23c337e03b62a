"""Losses of DPO over five steps by the order and grouping of eight virtual devices, as JSON."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from tiny import distance, make_config, tiny_model

from lora_jax import adapters as methods
from lora_jax import data, sharding
from lora_jax.config import MeshConfig
from lora_jax.data.examples import Example
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.step import make_train_step

MESHES = {  # order of the devices, and axes
    "as they are": (range(8), (2, 2, 2)),
    "permuted": ((3, 7, 0, 5, 2, 6, 1, 4), (2, 2, 2)),
    "regrouped": (range(8), (1, 8, 1)),
    "one device": (range(1), (1, 1, 1)),
}
MODEL = {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8}


def make_batch(seed, share):
    """Eight rows of two pairs."""
    rng = np.random.default_rng(seed)

    def text(prompt):
        tokens = np.r_[prompt, rng.integers(3, 272, rng.integers(2, 6))].astype(np.int32)
        weights = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
        return Example(tokens, weights, "row")

    def pair():
        prompt = rng.integers(3, 272, 4)
        return data.join(text(prompt), text(prompt), (data.CHOSEN, data.REJECTED))

    return data.stack([[pair(), pair()] for _ in range(8)], 40, share)


def train(order, axes, *overrides, share=False):
    """Losses and final adapters of five steps on a mesh of the devices in this order."""
    config = make_config("train.objective=dpo", "train.batch_size=8", "train.steps=5", *overrides)
    mesh = sharding.make_mesh(MeshConfig(*axes), [jax.devices()[i] for i in order])
    model = tiny_model(**MODEL)
    specs = sharding.param_specs(model.params, model.rules, mesh)
    params = sharding.place(model.params, specs, mesh)
    with jax.set_mesh(mesh):
        _, adapters = methods.init(jax.random.key(0), params, config.adapter)
        specs = sharding.adapter_specs(adapters, params, model.rules, mesh)
        adapters = sharding.place(adapters, specs, mesh)
        optimizer = make_optimizer(config.train)
        state = sharding.replicate_scalars(optimizer.init(adapters), mesh)
        placement = jax.tree.map(lambda leaf: leaf.sharding, (adapters, state))
        step = make_train_step(model, config, optimizer, placement)
        losses = []
        for i in range(5):
            batch = sharding.place_batch(make_batch(i % 2, share), mesh)
            adapters, state, metrics = step(adapters, state, params, batch, jax.random.key(i))
            losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, adapters)


found = {}
for init in ("default", "zero_a"):
    options = (f"adapter.init={init}", "adapter.rank=4", "train.learning_rate=1e-3")
    curves = {name: train(*mesh, *options) for name, mesh in MESHES.items()}
    curves["shared"] = train(*MESHES["as they are"], *options, share=True)
    (losses, adapters), *others = curves.values()
    found[init] = {"losses": losses}
    for name, (ours, own) in zip([*curves][1:], others, strict=True):
        apart = max(abs(a - b) for a, b in zip(losses, ours, strict=True))
        found[init][name] = {"losses": apart, "adapters": distance(own, adapters)}
print(json.dumps(found))
