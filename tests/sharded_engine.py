"""Answers of an engine with adapters on meshes of eight virtual devices and on one, told as one
JSON object: {family: {mesh: {answers, log_probs, programs}}}.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/sharded_engine.py llama gpt2
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, random_model
from methods import stirred

from lora_jax import AdapterConfig, lora, sharding
from lora_jax.config import MeshConfig
from lora_jax.generate import Engine, Request, Sampling, for_decoding

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from sharded_families import EVEN, EVEN_GPT2

MESHES = {"1x1x1": (1, 1, 1), "2x2x2": (2, 2, 2), "1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8)}
ADAPTERS = {
    "small": AdapterConfig(rank=2, alpha=4, target_modules="all-linear"),
    "wide": AdapterConfig(rank=6, alpha=8, target_modules="all-linear", use_rslora=True),
}


def answers(model, trees, mesh, form):
    devices = jax.devices()[: mesh.size]
    assert len(devices) == mesh.size
    specs = sharding.param_specs(model.params, model.rules, mesh)
    model = form(model.replace(params=sharding.place(model.params, specs, mesh)))
    bank = lora.bank(model.params, slots=3, rank=8)
    engine = Engine(model, rows=4, max_length=32, bank=bank, max_terms=2)
    for name, tree in trees.items():
        engine.publish(name, *tree)
    programs = engine.warm_up()
    rng = np.random.default_rng(0)
    names = [None, "small", "wide", {"small": 0.5, "wide": -0.3}, "small", None]
    drawn = Sampling(temperature=0.7, top_k=9, seed=2)
    requests = [
        Request(
            rng.integers(1, 96, 3 + 3 * i).tolist(),
            9,
            sampling=drawn if i % 2 else Sampling(),
            adapter=name,
            log_probs=0,
            prompt_log_probs=0,
        )
        for i, name in enumerate(names)
    ]
    found = engine.answer(requests)
    return {
        "answers": [one.tokens for one in found],
        "log_probs": [
            np.concatenate([one.prompt_log_probs.own, one.log_probs.own]).tolist() for one in found
        ],
        "programs": [programs, engine.compiled_programs],
    }


def main(families):
    result = {}
    for number, family in enumerate(families):
        fields = FAMILIES[family].fields
        kinds = {"layer_types": fields["layer_types"][:2]} if "layer_types" in fields else {}
        even = EVEN_GPT2 if family == "gpt2" else EVEN | kinds
        model = random_model(family, **(fields | even))
        trees = {}
        for name, config in ADAPTERS.items():
            _, fresh = lora.init(jax.random.key(3), model.params, config)
            trees[name] = stirred(model.params, fresh, config, 4), config
        form = (for_decoding, lambda model: model)[number % 2]
        result[family] = {
            name: answers(
                model,
                trees,
                sharding.make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))]),
                form,
            )
            for name, axes in MESHES.items()
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
