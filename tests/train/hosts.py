"""One of several hosts with two devices each: which examples of three batches lie on the mesh.

python hosts.py PORT HOSTS HOST

Prints the tokens and weights of all rows, in the order of the mesh, gathered from all hosts.
"""

import json
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from lora_jax import sharding
from lora_jax.config import MeshConfig
from lora_jax.data import Example, Loader

ROWS = 16


def main(port: str, hosts: str, host: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 2)
    if int(hosts) > 1:
        jax.distributed.initialize(f"localhost:{port}", int(hosts), int(host))
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=2))
    lengths = np.random.RandomState(0).randint(3, 30, 150)
    examples = [
        Example(np.full(n, i, np.int32), np.full(n, 0.5, np.float32), str(i))
        for i, n in enumerate(lengths)
    ]
    loader = Loader(examples, ROWS, 64, seed=7)
    mine = sharding.local_rows(ROWS, mesh)
    assert len(mine) == ROWS // int(hosts), mine
    for step in (0, 1, 5):
        placed = sharding.place_batch(loader.batch(step, mine), mesh, ROWS)
        whole = {
            name: np.asarray(multihost_utils.process_allgather(x, tiled=True)).tolist()
            for name, x in placed.items()
        }
        if host == "0":
            print(json.dumps(whole))


if __name__ == "__main__":
    main(*sys.argv[1:])
