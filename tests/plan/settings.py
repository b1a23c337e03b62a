"""Train steps compiled for meshes of eight virtual devices, beside what shapes alone tell of them;
one JSON object. And a loop of collectives whose bytes are known.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import config as configs
from lora_jax import sharding
from lora_jax.config import MeshConfig
from lora_jax.plan import analytic, compiled, hlo, roofline
from lora_jax.plan.program import build, open_shapes

BFLOAT16 = ("base_dtype=bfloat16", "train.compute_dtype=bfloat16")
# A method with its base, a mesh, a remat policy and micro-batches.
SETTINGS = {
    "lora": (),
    "lora fsdp": ("mesh.fsdp=4", "train.remat=dots", "train.micro_batch_size=4", *BFLOAT16),
    "lora mesh": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
    "lora head": ("adapter.modules_to_save=[lm_head]", "mesh.data=2", "adapter.dropout=0.1"),
    "dora": ("adapter.use_dora=true", "mesh.fsdp=2", "mesh.tensor=2"),
    "dora none": ("adapter.use_dora=true", "train.remat=none", "train.micro_batch_size=8"),
    "nf4": ("base_dtype=nf4",),
    "nf4 fsdp": ("base_dtype=nf4", "mesh.fsdp=4", "train.remat=dots"),
    "full": ("adapter.method=full", "mesh.fsdp=8", "train.micro_batch_size=8"),
}


def measure(model: str, overrides: tuple[str, ...]) -> dict:
    common = [f"model={model}", "base_dtype=float32", "adapter.rank=16", "mesh.data=1"]
    common += ["data.max_length=512", "train.batch_size=16"]
    config = configs.parse({}, [*common, *overrides])
    settled, described = open_shapes(config)
    devices = jax.devices()[: config.mesh.data * config.mesh.fsdp * config.mesh.tensor]
    program = build(settled, described, sharding.make_mesh(config.mesh, devices))
    found = analytic.estimate(program, "cpu")
    real = compiled.compile_here(config, devices)
    kinds = ("arguments", "outputs", "total")
    return {
        "estimate": {kind: getattr(found, kind) for kind in kinds} | {"unread": found.unread},
        "compiled": {kind: getattr(real, kind) for kind in kinds} | {"aliased": real.aliased},
        "state": found.adapters + found.optimizer,
        "remat": config.train.remat,
        "gathered": roofline.count(program).gathered,
        "layer": 4 * analytic.layer_weights(program),
        "collectives": [dataclasses.asdict(one) for one in real.collectives],
    }


def known_collectives() -> list[dict]:
    """A loop that sums f32[16, 128] five times over four devices, and gathers it once."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))

    def run(x):
        def body(total, _):
            return jax.lax.psum(jnp.sin(total), "fsdp") / 4, None

        return jax.lax.all_gather(jax.lax.scan(body, x, length=5)[0], "fsdp")

    mapped = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    x = jax.ShapeDtypeStruct((32, 128), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    text = jax.jit(mapped).lower(x).compile().as_text()
    return [dataclasses.asdict(one) for one in hlo.collectives(text, 8)]


if __name__ == "__main__":
    steps = {name: measure(sys.argv[1], overrides) for name, overrides in SETTINGS.items()}
    print(json.dumps({"steps": steps, "known": known_collectives()}))
