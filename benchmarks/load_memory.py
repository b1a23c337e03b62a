"""Peak host memory of loading a model; prints one JSON line. Linux only.

    python benchmarks/load_memory.py
    python benchmarks/load_memory.py --layers 4 --devices 4
    python benchmarks/load_memory.py --layers 4 --hosts 2

Writes a random llama in bfloat16 as safetensors shards of 500 MB into a temporary directory (2.1 GB
with the 20 layers of the default), loads it in a fresh process with `formats.load`, split by fsdp
over so many devices of the CPU, and removes it again; with `--hosts` in so many processes that
share it, of which the one with the highest peak is printed. `peak` is the most anonymous memory
(RssAnon) during the load over what it was before; pages of mapped files are not in it. The aim is
peak <= placed + 1.2 * shard, `shard` being the largest share that one device has of one leaf.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import random_llama

SHAPE = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def load(directory: Path) -> dict[str, float]:
    """Load in this process: MB placed, of the largest shard, at the peak."""
    import jax
    import jax.numpy as jnp

    from lora_jax import formats
    from lora_jax.config import MeshConfig
    from lora_jax.sharding import make_mesh

    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    jax.block_until_ready(jnp.ones(()) + 1)  # what the backend keeps for itself comes first
    before, peak, done = anonymous(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    model = jax.block_until_ready(formats.load(directory, mesh=mesh).params)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    shards = [
        shard.data.nbytes for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards
    ]
    placed, largest, peak = sum(shards), max(shards), peak - before
    return {
        "placed MB": round(placed / 1e6, 1),
        "shard MB": round(largest / 1e6, 1),
        "peak MB": round(peak / 1e6, 1),
        "peak over placed, in shards": round((peak - placed) / largest, 3),
        "seconds": round(seconds, 1),
    }


def environment(host: int, hosts: int) -> dict[str, str]:
    """Return the environment variables that number a process of several."""
    if hosts == 1:
        return {}
    address = f"localhost:{20_000 + os.getpid() % 20_000}"
    numbers = {"JAX_NUM_PROCESSES": str(hosts), "JAX_PROCESS_ID": str(host)}
    return {"JAX_COORDINATOR_ADDRESS": address, **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--devices", type=int, default=1, help="of the CPU, which share the model")
    parser.add_argument("--hosts", type=int, default=1, help="processes that share the model")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # the fresh process
    options = parser.parse_args()
    if options.load:
        from lora_jax import hosts
        from lora_jax.config import HostsConfig

        with hosts.joined(HostsConfig()):
            print(json.dumps(load(options.load)))
        return
    flags = f"--xla_force_host_platform_device_count={options.devices}"
    with tempfile.TemporaryDirectory(prefix="load_memory-") as directory:
        random_llama.write(Path(directory), SHAPE | {"num_hidden_layers": options.layers})
        children = [
            subprocess.Popen(
                [sys.executable, __file__, "--load", directory],
                env=os.environ
                | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
                | environment(host, options.hosts),
                stdout=subprocess.PIPE,
                text=True,
            )
            for host in range(options.hosts)
        ]
        found = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    worst = max(found, key=lambda one: one["peak over placed, in shards"])
    about = {"layers": options.layers, "devices": options.devices, "hosts": options.hosts}
    print(json.dumps(about | worst))


if __name__ == "__main__":
    main()
