"""Loss and adapter gradients of families on eight virtual devices and on one, told as one JSON
object; arguments: which families.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import FAMILIES, random_model

from lora_jax import AdapterConfig, lora, sharding
from lora_jax.config import MeshConfig

# Every axis can be split in two, and no two are equal: queries 8 x 6, keys 2 x 6.
EVEN = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
EVEN |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6}
EVEN_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_head": 4, "n_inner": 40, "n_layer": 2}


def even_fields(family):
    fields = FAMILIES[family].fields
    if family == "gpt2":
        return fields | EVEN_GPT2
    kinds = {"layer_types": fields["layer_types"][:2]} if "layer_types" in fields else {}
    return fields | EVEN | kinds


def on_mesh(family, mesh):
    """Mean loss and the gradients of adapters, and how many leaves of the base are split."""
    model = random_model(family, **even_fields(family))
    config = AdapterConfig(rank=4, target_modules=FAMILIES[family].targets)
    specs = sharding.param_specs(model.params, model.rules, mesh)
    params = sharding.place(model.params, specs, mesh)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32),
        lora.init(jax.random.key(0), model.params, config)[1],
    )
    specs = sharding.adapter_specs(adapters, params, model.rules, mesh)
    adapters = sharding.place(adapters, specs, mesh)

    @jax.jit
    def evaluate(adapters, params, tokens):
        def mean_loss(adapters):
            logits = model.apply(lora.bind(params, adapters, config), tokens)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], tokens[:, 1:]
            ).mean()

        return jax.value_and_grad(mean_loss)(adapters)

    with jax.set_mesh(mesh):
        tokens = sharding.place_batch(
            {"tokens": rng.integers(0, 96, (8, 12)).astype(np.int32)}, mesh
        )["tokens"]
        loss, gradients = jax.tree.map(np.asarray, evaluate(adapters, params, tokens))
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    return [loss, *jax.tree.leaves(gradients)], split


def main():
    jax.config.update("jax_disable_most_optimizations", True)
    alone = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    result = {}
    for family in sys.argv[1:]:
        expected, none = on_mesh(family, alone)
        found, split = on_mesh(family, mesh)
        distances = [
            float(np.abs(x - y).max() / max(1.0, np.abs(y).max()))
            for x, y in zip(found, expected, strict=True)
        ]
        smallest = min(float(np.abs(y).max()) for y in expected)
        result[family] = {"worst": max(distances), "smallest": smallest, "split": split - none}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
