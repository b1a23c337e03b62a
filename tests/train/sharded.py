"""The same training on several meshes of eight virtual devices, told as one JSON object."""

import contextlib
import json
import os
import re
import sys
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from tiny import distance, make_config, random_adapters, random_batch, tiny_model

from lora_jax import adapters as methods
from lora_jax import sharding, tree
from lora_jax.config import MeshConfig
from lora_jax.errors import UserError
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.setup import check_attention, prepare
from lora_jax.train.step import make_eval_step, make_train_step

LAYERS = 5  # no other axis is as long
MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
FIELDS = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64}
OVERRIDES = ("adapter.rank=4", "train.batch_size=16", "train.learning_rate=1e-2", "train.steps=5")


def train(mesh, micro):
    """Losses of five steps, the first gradient's norm, final adapters, and how things lie."""
    config = make_config(*OVERRIDES, *([f"train.micro_batch_size={micro}"] if micro else []))
    model = tiny_model(**FIELDS)
    params = sharding.place(
        model.params, sharding.param_specs(model.params, model.rules, mesh), mesh
    )
    _, adapters = methods.init(jax.random.key(0), params, config.adapter)
    adapters = random_adapters(adapters)
    adapters = sharding.place(
        adapters, sharding.adapter_specs(adapters, params, model.rules, mesh), mesh
    )
    optimizer = make_optimizer(config.train)
    state = sharding.replicate_scalars(optimizer.init(adapters), mesh)
    placement = jax.tree.map(lambda leaf: leaf.sharding, (adapters, state))
    step = make_train_step(model, config, optimizer, placement)
    evaluate = make_eval_step(model, config)
    placed = {path: leaf.sharding for path, leaf in tree.flatten(adapters).items()}
    losses, norms, first_moments = [], [], None
    with jax.set_mesh(mesh):
        for i in range(5):
            batch = random_batch(16, 12, seed=i)
            for row in range(16):
                batch["loss_weights"][row, : row // 2] = 0  # ragged
            batch = sharding.place_batch(batch, mesh)
            if i == 0:
                nll, weight = evaluate(adapters, params, batch)
            adapters, state, metrics = step(adapters, state, params, batch, jax.random.key(i))
            if i == 0:
                first_moments = jax.tree.map(np.asarray, state)
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
    kept = {path: leaf.sharding for path, leaf in tree.flatten(adapters).items()}
    moments = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.ndim:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            moments[name] = leaf.sharding
    return {
        "evaluated": float(nll / weight),
        "losses": losses,
        "norms": norms,
        "first_moments": first_moments,  # (1 - beta1) times the clipped gradient
        "adapters": jax.tree.map(np.asarray, adapters),
        "stays": all(kept[path].is_equivalent_to(placed[path], 3) for path in placed),
        "moments_follow": len(moments) == 2 * len(placed)
        and all(
            any(
                name.endswith(tree.dotted(p)) and where.is_equivalent_to(placed[p], 3)
                for p in placed
            )
            for name, where in moments.items()
        ),
        "split_adapters": sum(not where.is_fully_replicated for where in placed.values()),
        "compiled": step._cache_size(),
    }


def collectives(mesh):
    """Shapes of what the devices exchange in a step over five layers, by the kind of exchange."""
    config, model = make_config(*OVERRIDES), tiny_model(**FIELDS, num_hidden_layers=LAYERS)
    params = sharding.place(
        model.params, sharding.param_specs(model.params, model.rules, mesh), mesh
    )
    adapters = methods.init(jax.random.key(0), params, config.adapter)[1]
    specs = sharding.adapter_specs(adapters, params, model.rules, mesh)
    adapters = sharding.place(adapters, specs, mesh)
    optimizer = make_optimizer(config.train)
    state = sharding.replicate_scalars(optimizer.init(adapters), mesh)
    placement = jax.tree.map(lambda leaf: leaf.sharding, (adapters, state))
    step = make_train_step(model, config, optimizer, placement)
    with jax.set_mesh(mesh):
        batch = sharding.place_batch(random_batch(16, 24), mesh)
        lowered = step.lower(adapters, state, params, batch, jax.random.key(0))
    text = re.sub(r"/\*.*?\*/", "", lowered.compile().as_text())
    found = {}
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for shapes, kind in re.findall(rf" = ([^=\n]*?) ({kinds})(?:-start)?\(", text):
        sizes = re.findall(r"\[([\d,]*)\]", shapes)
        found.setdefault(kind, set()).update(sizes)
    return {kind: sorted(sizes) for kind, sizes in found.items()}


def message(call):
    try:
        call()
    except UserError as error:
        return str(error)
    return None


def notes(mesh, *overrides, **fields):
    """What a run says of the heads of a model on a mesh."""
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere, width=500, record=True)
        check_attention(make_config(*overrides), tiny_model(**FIELDS | fields), mesh, console)
        return console.export_text()


def main():
    result = {}
    jax.config.update("jax_disable_most_optimizations", True)
    for micro, meshes in ((None, MESHES), (8, MESHES[-1:])):
        alone = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        expected = train(alone, micro)
        result["one device"] = {"compiled": expected["compiled"]}
        for shape in meshes:
            found = train(sharding.make_mesh(MeshConfig(*shape)), micro)
            name = "x".join(map(str, shape)) + (f" micro {micro}" if micro else "")
            numbers = ("evaluated", "losses", "norms", "first_moments", "adapters")
            result[name] = {key: distance(found[key], expected[key]) for key in numbers}
            result[name] |= {
                key: found[key] for key in ("stays", "moments_follow", "split_adapters", "compiled")
            }
    result["collectives"] = {
        "x".join(map(str, shape)): collectives(sharding.make_mesh(MeshConfig(*shape)))
        for shape in MESHES[1:]
    }
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    shapes = tiny_model(**FIELDS, tie_word_embeddings=False, attention_bias=True).params
    rules = tiny_model(**FIELDS).rules
    specs = tree.flatten(sharding.param_specs(shapes, rules, mesh))
    result["specs"] = {tree.dotted(path): str(tuple(spec)) for path, spec in specs.items()}
    odd = tree.flatten(
        sharding.param_specs({"lm_head": {"kernel": np.ones((32, 17))}}, rules, mesh)
    )
    result["odd"] = str(tuple(odd["lm_head", "kernel"]))
    config = {"data.train": "rows.jsonl", "output_dir": "/dev/null/never"}

    def start(**changes):
        settings = (f"{key}={value}" for key, value in (config | changes).items())
        prepare(make_config(*settings), contextlib.ExitStack())

    result["errors"] = {
        "no rule": message(
            lambda: sharding.param_specs(
                {"model": {"extra": {"kernel": np.ones(3)}, "other": np.ones(2)}}, rules, mesh
            )
        ),
        "mesh": message(lambda: start(**{"mesh.data": 3})),
        "mesh left": message(lambda: start(**{"mesh.data": -1, "mesh.tensor": 3})),
        "batch": message(lambda: start(**{"train.batch_size": 12})),
        "micro": message(lambda: start(**{"train.batch_size": 16, "train.micro_batch_size": 4})),
        "eval": message(lambda: start(**{"eval.batch_size": 12})),
        "length": message(lambda: start(**{"mesh.tensor": 8, "data.max_length": 12})),
        "attention": message(lambda: notes(mesh, "train.attention=splash")),
    }
    result["notes"] = {
        "split": notes(mesh),
        "kv": notes(mesh, num_key_value_heads=1),
        "none": notes(mesh, num_attention_heads=3, num_key_value_heads=3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
