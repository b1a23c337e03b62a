"""Mixed batches of banks on meshes of eight virtual devices and on one, as one JSON object.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/sharded_bank.py
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, random_model
from methods import stirred
from parity.sharded_families import EVEN, EVEN_GPT2

from lora_jax import AdapterConfig, lora, sharding
from lora_jax import bank as banks
from lora_jax.config import MeshConfig
from lora_jax.generate.form import separate

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# family -> modules of the bank, form of the parameters, mesh
ROWS = {
    "qwen2": ([*LINEAR, "embed_tokens", "lm_head"], dict, "2x2x2"),  # tied
    "mixtral": ("all-linear", separate, "1x8x1"),
    "gpt2": ("all-linear", dict, "1x1x8"),
    "phi3": ("all-linear", separate, "2x2x2"),
}
TIED = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": False}


def run(family, mesh):
    """Logits of a mixed batch, what of the slots is split, and whether writes keep their places."""
    modules, form, _ = ROWS[family]
    fields = FAMILIES[family].fields
    kinds = {"layer_types": fields["layer_types"][:2]} if "layer_types" in fields else {}
    sizes = EVEN_GPT2 if family == "gpt2" else EVEN | kinds
    model = random_model(family, **fields | sizes)
    specs = sharding.param_specs(model.params, model.rules, mesh)
    params = form(sharding.place(model.params, specs, mesh))
    with jax.set_mesh(mesh):
        bank = lora.bank(params, 5, 8, modules, use_dora=True)
        before = [leaf.sharding for leaf in jax.tree.leaves(bank.factors)]
        banks._write.clear_cache()
        adapters = [{}, {"use_dora": True}, {"init": "pissa"}]
        adapters += [TIED if family == "qwen2" else {"use_rslora": True}]
        for slot, own in enumerate(adapters, start=1):
            config = AdapterConfig(rank=4, **own)
            base, fresh = lora.init(jax.random.key(slot), model.params, config)
            bank = bank.put(slot, stirred(base, fresh, config, slot), config)
        programs = banks._write._cache_size()
        after = [leaf.sharding for leaf in jax.tree.leaves(bank.factors)]
        tokens = np.random.default_rng(0).integers(0, 96, (8, 6)).astype(np.int32)
        ids = np.array([[1, 4], [0, 0], [2, 0], [3, 1], [4, 4], [0, 1], [3, 0], [2, 0]])
        shares = np.array([[0.7, -0.3]] + [[1.0, 1.0]] * 7, np.float32)
        forward = jax.jit(lambda bank, *rest: model.apply(bank.bind(params, *rest[1:]), rest[0]))
        batch = sharding.place_batch({"tokens": tokens, "ids": ids, "shares": shares}, mesh)
        logits = np.asarray(forward(bank, *batch.values()))
        plain = np.asarray(jax.jit(model.apply)(params, batch["tokens"]))
    split = sum(not place.is_fully_replicated for place in before)
    return logits, {
        "split": split / len(before),
        "stays": before == after,
        "programs": programs,
        "base": bool((logits[1] == plain[1]).all()),
        "moved": float(np.abs(logits - plain).max(axis=(1, 2))[[0, 2, 3, 4, 5, 6, 7]].min()),
    }


def main():
    jax.config.update("jax_disable_most_optimizations", True)
    result = {}
    for family, (_, _, name) in ROWS.items():
        alone, _ = run(family, sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
        mesh = sharding.make_mesh(MeshConfig(*map(int, name.split("x"))))
        logits, facts = run(family, mesh)
        distance = float(np.abs(logits - alone).max() / max(1.0, np.abs(alone).max()))
        result[family] = facts | {"distance": distance}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
