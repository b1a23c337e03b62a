"""Merges measured on eight virtual devices and on one, told as one JSON object."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from sharded_methods import FIELDS, Row, place_base, stirred, tiny_model

from lora_jax import lora, sharding
from lora_jax.config import MeshConfig
from lora_jax.data import Example
from lora_jax.report import merge as merge_report
from lora_jax.targets import find_trainable
from lora_jax.train import probe


def measure(model, base, adapters, config, mesh):
    """Figures of every module, the two KLs, and whether weights were split."""
    base = place_base(model.replace(params=base), mesh)
    specs = sharding.adapter_specs(adapters, model.params, model.rules, mesh)
    adapters = sharding.place(adapters, specs, mesh)

    @jax.jit
    def trees(base, adapters):
        bound = lora.bind(base, adapters, config)
        merged = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lora.merge(bound))
        return bound, lora.initial_params(base, adapters, config), merged

    rng = np.random.default_rng(0)
    rows = [
        Example(rng.integers(0, 96, length).astype(np.int32), np.ones(length, np.float32), "row")
        for length in (5, 8, 3)
    ]
    with jax.set_mesh(mesh):
        bound, start, merged = trees(base, adapters)
        found = find_trainable(base, config)
        fits = merge_report.measure(found, bound, start, merged)
        others = {"merged": merged, "base": start}
        kl = probe.divergences(model, bound, others, rows, mesh, batch_size=2, chunk=4)
    numbers = [x for fit in fits.values() for x in fit.numbers().values()]
    split = any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(merged))
    return {"numbers": numbers, "kl": list(kl.values()), "split": split}


def main():
    jax.config.update("jax_disable_most_optimizations", True)
    alone = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    row = Row(
        {
            "target_modules": ["embed_tokens", "lm_head", "q_proj"],
            "use_dora": True,
            "ensure_weight_tying": False,
        },
        tied=True,
        scheme="nf4",
    )
    model = tiny_model(row.hf_config | FIELDS, 0, row.scheme)
    base, adapters = lora.init(jax.random.key(0), model.params, row.config)
    adapters = stirred(base, adapters, row.config, 0)
    both = (sharding.make_mesh(MeshConfig(2, 2, 2)), alone)
    print(json.dumps([measure(model, base, adapters, row.config, mesh) for mesh in both]))


if __name__ == "__main__":
    main()
