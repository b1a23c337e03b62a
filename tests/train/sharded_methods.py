"""Methods on eight virtual devices and on one, told as one JSON object."""

import contextlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `methods`
sys.path.insert(0, str(Path(__file__).parent))
from methods import PATTERNS, ROWS, VIRTUAL, Row, calibrate_on, make_batch, stirred, tiny_model
from tiny import distance

from lora_jax import Config, lora, sharding, tree
from lora_jax.config import DATA_INITS, MeshConfig, TrainConfig
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.step import make_train_step

MESHES = {"2x2x2": MeshConfig(2, 2, 2), "8x1x1": MeshConfig(8, 1, 1)}
# Every axis can be split in two, and no two are equal: queries 8 x 6, keys 2 x 6.
FIELDS = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "head_dim": 6,
}
# Rows that hold every kind of leaf, on every kind of weight.
CASES = {
    "DoRA, rsLoRA, patterns, bias": Row(
        {"use_dora": True, "use_rslora": True, "bias": "all", **PATTERNS}, bias=True
    ),
    "PiSSA, LoRA-FA, head": Row(
        {"init": "pissa", "freeze_a": True, "target_modules": ["lm_head", "o_proj", "gate_proj"]}
    ),
    "orthogonal, LoRA+, head whole": Row(
        {"init": "orthogonal", "lora_plus_ratio": 4.0, "modules_to_save": ["lm_head", "1.mlp"]}
        | {"target_modules": ["v_proj"]}
    ),
    "norm whole, embedding whole, head by LoRA": Row(
        ROWS["embedding whole, head by LoRA"].fields
        | {"modules_to_save": ["embed_tokens", "norm"]},
        tied=True,
    ),
    **{
        name: ROWS[name]
        for name in (
            *("embedding, DoRA, tied", "embedding and head, DoRA, untied"),
            *("tokens, tied", "DoRA, NF4", "full, tied", "EVA", "LoRA-GA, rsLoRA, patterns"),
            "VeRA, layers, bias all, norm whole",
        )
    },
    **VIRTUAL,
}


def place_base(model, mesh):
    """The base as it is loaded: the arrays of a quantised leaf lie as its kernel does."""

    def fit(spec, shape):
        axes = (*spec, *(None,) * (len(shape) - len(spec)))
        sizes = [
            np.prod([mesh.shape[a] for a in np.atleast_1d(axis)]) if axis else 1 for axis in axes
        ]
        return P(
            *(a if n % size == 0 else None for a, n, size in zip(axes, shape, sizes, strict=True))
        )

    specs = tree.flatten(sharding.param_specs(model.params, model.rules, mesh))
    return tree.unflatten({
        path: jax.tree.map(
            lambda part, spec=specs[path]: jax.device_put(
                part, NamedSharding(mesh, fit(spec, part.shape))
            ),
            leaf,
        )
        for path, leaf in tree.flatten(model.params).items()
    })  # fmt: skip


def spans(adapters):
    """In place of directions what they span: two that explain nearly as much of the variance turn
    into each other by rounding.
    """
    leaves = tree.flatten(adapters)
    return {p: x @ x.swapaxes(-1, -2) if p[-1] == "lora_a" else x for p, x in leaves.items()}


def train(row, mesh):
    """What init gives, losses of five steps, norms of their gradients, and what they changed."""
    model = tiny_model(row.hf_config | FIELDS, 0, row.scheme)
    calibrate = None
    if row.config.init in DATA_INITS:
        batch = sharding.place_batch(make_batch(9, rows=8, vocab=96), mesh)
        calibrate = calibrate_on(model, row, batch)
    with contextlib.nullcontext() if calibrate is None else jax.set_mesh(mesh):
        placed = place_base(model, mesh)
        base, adapters = lora.init(jax.random.key(0), placed, row.config, calibrate)
    fresh = jax.tree.map(np.asarray, adapters)
    adapters = stirred(base, jax.tree.map(jax.numpy.asarray, fresh), row.config, 0)
    specs = sharding.adapter_specs(adapters, model.params, model.rules, mesh)
    adapters = sharding.place(adapters, specs, mesh)
    start = jax.tree.map(np.array, adapters)
    settings = TrainConfig(
        batch_size=8,
        learning_rate=1e-2,
        steps=5,
        grad_clip=0.5,
        schedule="constant",
        remat="none",
        epsilon=1e-3,  # without it Adam divides rounding by rounding where a gradient is near zero
    )
    optimizer = make_optimizer(settings, row.config)
    state = sharding.replicate_scalars(optimizer.init(adapters), mesh)
    placement = jax.tree.map(lambda leaf: leaf.sharding, (adapters, state))
    step = make_train_step(model, Config(adapter=row.config, train=settings), optimizer, placement)
    placed = jax.tree.map(lambda leaf: leaf.sharding, adapters)
    losses, norms, gradients = [], [], None
    with jax.set_mesh(mesh):
        for i in range(5):
            batch = sharding.place_batch(make_batch(i, rows=8, vocab=96), mesh)
            adapters, state, metrics = step(adapters, state, base, batch, jax.random.key(i))
            gradients = gradients or jax.tree.map(np.asarray, state)
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
    stays = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), adapters, placed)
    numbers = {
        "fresh": spans(fresh) if row.config.init == "eva" else fresh,
        "losses": losses,
        "norms": norms,
        "gradients": gradients,  # clipped, in the moments after the first step
        "learnt": jax.tree.map(lambda x, y: np.asarray(x) - y, adapters, start),
    }
    return numbers, {
        "stays": all(jax.tree.leaves(stays)),
        "compiled": step._cache_size(),
        "moved": abs(losses[0] - losses[-1]),
        "specs": {tree.dotted(p): str(tuple(s)) for p, s in tree.flatten(specs).items()},
    }


def main():
    jax.config.update("jax_disable_most_optimizations", True)
    alone = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    result = {}
    for name, row in CASES.items():
        expected, _ = train(row, alone)
        for mesh, config in MESHES.items():
            found, facts = train(row, sharding.make_mesh(config))
            distances = {key: distance(found[key], expected[key]) for key in expected}
            result.setdefault(name, {})[mesh] = {"distances": distances, **facts}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
