"""A step of K members of a sweep, and K steps of lone runs, in turns; prints one JSON line.

    python benchmarks/sweep.py --model demo:smollm2-135m-instruct --members 8 --rows 1 --length 128

Rows are full (no padding) and all tokens are supervised. Both sides are warm, in one process on an
otherwise idle machine; the result is the ratio of the step of all members to K lone steps.
"""

import argparse
import dataclasses
import json
import statistics
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import config as configs
from lora_jax import formats, lora
from lora_jax.adapters import member as padding
from lora_jax.sweep import groups, program
from lora_jax.targets import find_trainable
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.step import make_train_step


def batch_of(options: argparse.Namespace, vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    shape = (options.rows, options.length)
    ones = np.ones(shape, np.int32)
    return {
        "tokens": np.random.default_rng(seed).integers(0, vocabulary, shape).astype(np.int32),
        "loss_weights": ones.astype(np.float32),
        "segment_ids": ones,
        "positions": np.tile(np.arange(options.length, dtype=np.int32), (options.rows, 1)),
    }


def stack(trees: list) -> object:
    return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(one) for one in x]), *trees)


def config_of(options: argparse.Namespace, seed: int) -> configs.Config:
    train = {"batch_size": options.rows, "remat": options.remat, "schedule": "constant"}
    adapter = {"rank": options.rank, "alpha": 2 * options.rank}
    content = {"model": options.model, "adapter": adapter, "train": train, "seed": seed}
    return configs.parse(content)


def make_sides(options: argparse.Namespace) -> dict:
    """Return a function for each side that takes its steps and waits for them."""
    model = formats.load(options.model, dtype=jnp.float32)
    members, batches, alone = [], [], []
    for seed in range(options.members):
        config = config_of(options, seed)
        found = find_trainable(model.params, config.adapter)
        members.append(SimpleNamespace(number=seed, config=config, trainable=found, shapes={}))
        batches.append(batch_of(options, model.config.vocab_size, seed))
        _, adapters = lora.init(groups.init_key(config), model.params, config.adapter)
        alone.append(adapters)
    (group,) = groups.make_groups(members)
    values = [group.values(one) for one in members]
    padded = stack([padding.pad(one, group.joint) for one in alone])
    states = [program.init_state(v, group, a) for v, a in zip(values, alone, strict=True)]
    every = {"state": (padded, stack(states)), "values": stack(values), "batch": stack(batches)}
    every["values"] = dataclasses.replace(
        every["values"], moves=jnp.ones(options.members, bool), step=every["values"].step + 1
    )
    step_of_all = program.make_step(model, group, len(group.members))
    config = members[0].config
    optimizer = make_optimizer(config.train, config.adapter)
    step_of_one = make_train_step(model, config, optimizer)
    own = [(one, optimizer.init(one)) for one in jax.tree.map(jnp.copy, alone)]
    placed = jax.device_put(batches)

    def together() -> None:
        *state, metrics = step_of_all(
            every["values"], *every["state"], model.params, every["batch"]
        )
        every["state"] = tuple(state)
        jax.block_until_ready(metrics)

    def one_by_one() -> None:
        for i, batch in enumerate(placed):
            *state, metrics = step_of_one(*own[i], model.params, batch, jax.random.key(i))
            own[i] = tuple(state)
            jax.block_until_ready(metrics)

    return {"together": together, "one by one": one_by_one}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    sides = make_sides(options)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.turns + 1):
        for name, take in sides.items():
            start = time.perf_counter()
            take()
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    found = {name: statistics.median(own) for name, own in seconds.items()}
    ratio = found["together"] / found["one by one"]
    print(json.dumps({**vars(options), "seconds": found, "ratio": ratio}))


if __name__ == "__main__":
    main()
