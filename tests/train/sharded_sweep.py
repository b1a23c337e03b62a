"""Members of a sweep on eight virtual devices, beside the same on one, as JSON."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from tiny import distance, make_config, random_batch, tiny_model

from lora_jax import sharding
from lora_jax.config import MeshConfig
from lora_jax.sweep import groups
from lora_jax.sweep.places import Places
from lora_jax.targets import find_trainable

STEPS = 5
MODEL = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8}
SETTINGS = (
    ("adapter.rank=4", "seed=1"),
    ("adapter.rank=2", "adapter.dropout=0.1", "adapter.target_modules=[q_proj,up_proj]", "seed=2"),
    ("adapter.rank=1", "train.weight_decay=0.1", "adapter.alpha=4", "seed=3"),
)


def member(model, number, overrides):
    config = make_config("train.batch_size=8", f"train.steps={STEPS}", *overrides)
    batches = [random_batch(8, 16, seed=100 * number + step) for step in range(STEPS)]
    return SimpleNamespace(
        number=number,
        config=config,
        trainable=find_trainable(model.params, config.adapter),
        shapes={},
        loader=SimpleNamespace(batch=lambda step: batches[step]),
        session=SimpleNamespace(loaded=None, model=model),
        material=SimpleNamespace(train=None, encoder=None, held_out={}),
    )


def train(axes, devices):
    """Losses (steps, members) and adapters of all members on a mesh."""
    mesh = sharding.make_mesh(MeshConfig(*axes), devices)
    model = tiny_model(**MODEL)
    specs = sharding.param_specs(model.params, model.rules, mesh)
    model = model.replace(params=sharding.place(model.params, specs, mesh))
    members = [member(model, i, overrides) for i, overrides in enumerate(SETTINGS)]
    (group,) = groups.make_groups(members)
    places = Places(group, model, mesh, len(members), "", None)
    for k, one in enumerate(members):
        places.enter(k, one)
    losses = []
    for _ in range(STEPS):
        measured = places.step()
        losses.append([measured[k]["loss"] for k in range(len(members))])
    adapters = [places.adapters_of(k) for k in range(len(members))]
    whole = jax.tree.map(sharding.gather_to_host, adapters)
    return np.asarray(losses), whole, places.programs


def main():
    one = train((1, 1, 1), jax.devices()[:1])
    found = {}
    for axes in ((2, 2, 2), (8, 1, 1), (1, 8, 1)):
        own = train(axes, jax.devices())
        found[str(axes)] = {
            "losses": distance(own[0], one[0]),
            "adapters": distance(own[1], one[1]),
            "programs": own[2],
        }
    print(json.dumps(found))


main()
