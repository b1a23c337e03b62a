"""Five training steps of families on meshes of eight virtual devices and on one, told as one JSON
object. Arguments: rows of `ROWS` with their meshes, as in `gemma2:1x1x8,2x2x2`; none: all rows on
all meshes, which takes minutes.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/parity/sharded_families.py
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from encoders import ENCODERS  # the tables of tests
from families import FAMILIES, random_model
from methods import stirred

from lora_jax import AdapterConfig, Config, quantize, sharding
from lora_jax import adapters as methods
from lora_jax.config import VIRTUAL_TOKEN_METHODS, MeshConfig, TrainConfig
from lora_jax.nn import kernels
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.step import make_train_step

# Every axis can be split in two, and no two are equal: queries 8 x 6, keys 2 x 6. Eight devices
# split queries, features and vocabulary.
EVEN = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
EVEN |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6}
EVEN_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_head": 4, "n_inner": 40, "n_layer": 2}
EVEN_ENCODER = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40}
EVEN_ENCODER |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40}
MESHES = ("8x1x1", "1x8x1", "1x1x8", "2x2x2")
ROWS_OF_BATCH, TIME = 8, 16
VIRTUAL = {"num_virtual_tokens": 8, "prompt_init": "random"}


@dataclass(frozen=True)
class Row:
    """A family, and what it is trained with."""

    family: str
    adapter: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    scheme: str | None = None
    kernel: str = "xla"
    model: dict[str, Any] = field(default_factory=dict)


# Texts are 3 to 11 tokens long: some are short to it, and some are long.
LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0}
LONGROPE |= {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 7.0]}

ROWS = {
    name: Row(name)
    for name in (*FAMILIES, "bert", "roberta", "distilbert", "electra", "modernbert")
} | {
    "llama, DoRA, NF4": Row("llama", {"use_dora": True}, scheme="nf4"),
    "mixtral, router loss": Row("mixtral", train={"router_aux_loss_coef": 0.02}),
    "gpt2, DoRA, all biases": Row("gpt2", {"use_dora": True, "bias": "all"}),
    "mistral, prefix": Row("mistral", {"method": "prefix", **VIRTUAL}),
    "qwen2, prompt": Row("qwen2", {"method": "prompt", **VIRTUAL}),
    "gemma2, splash": Row("gemma2", kernel="splash"),
    "qwen3, splash": Row("qwen3", kernel="splash"),
    "gpt_oss, splash": Row("gpt_oss", kernel="splash"),
    "phi3, longrope": Row(
        "phi3", model={"original_max_position_embeddings": 6, "rope_parameters": LONGROPE}
    ),
}


def make_model(family, more):
    if family in ENCODERS:
        row = ENCODERS[family]
        model = random_model(family, **row.named(EVEN_ENCODER), num_labels=3)
        return model, AdapterConfig(rank=4, modules_to_save=[*row.saved])
    fields = FAMILIES[family].fields | more
    kinds = {"layer_types": fields["layer_types"][:2]} if "layer_types" in fields else {}
    fields = fields | (EVEN_GPT2 if family == "gpt2" else EVEN | kinds)
    return random_model(family, **fields), AdapterConfig(
        rank=4, target_modules=FAMILIES[family].targets
    )


def make_batch(seed, model):
    """Rows of two texts and padding, of which a part is supervised."""
    rng = np.random.default_rng(seed)
    shape = (ROWS_OF_BATCH, TIME)
    first, last = rng.integers(3, 7, (ROWS_OF_BATCH, 1)), rng.integers(9, 15, (ROWS_OF_BATCH, 1))
    time = np.arange(TIME)[None]
    segments = np.where(time < first, 1, np.where(time < last, 2, 0))
    positions = np.where(segments == 1, time, np.where(segments == 2, time - first, 0))
    labels = len(model.labels)
    tokens = rng.integers(0, labels, shape) if labels else rng.integers(0, 96, shape)
    weights = (rng.random(shape) < 0.7) & (segments > 0) & (positions > 0)
    arrays = {"tokens": tokens, "segment_ids": segments, "positions": positions}
    return {name: x.astype(np.int32) for name, x in arrays.items()} | {
        "loss_weights": weights.astype(np.float32)
    }


def train(row, mesh):
    """Losses, norms, gradients (in the moments of the first step) and the final adapters, and how
    many leaves of the base are split.
    """
    model, adapter = make_model(row.family, row.model)
    soft = row.adapter.get("method") in VIRTUAL_TOKEN_METHODS
    adapter = AdapterConfig(**({} if soft else vars(adapter)) | row.adapter)
    specs = sharding.param_specs(model.params, model.rules, mesh)
    params = sharding.place(model.params, specs, mesh)
    if row.scheme is not None:
        params = quantize.quantize_tree(params, row.scheme)
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    _, fresh = methods.init(jax.random.key(0), params, adapter)
    adapters = fresh if soft else stirred(params, fresh, adapter, 0)
    specs = sharding.adapter_specs(adapters, model.params, model.rules, mesh)
    adapters = sharding.place(jax.tree.map(np.asarray, adapters), specs, mesh)
    settings = TrainConfig(
        batch_size=ROWS_OF_BATCH,
        learning_rate=1e-2,
        steps=5,
        grad_clip=None,
        schedule="constant",
        loss_chunk=48,
        epsilon=1e-3,  # without it Adam divides rounding by rounding where a gradient is near zero
        **row.train,
    )
    optimizer = make_optimizer(settings, adapter)
    state = sharding.replicate_scalars(optimizer.init(adapters), mesh)
    placement = jax.tree.map(lambda leaf: leaf.sharding, (adapters, state))
    kernels.choose = lambda *_: row.kernel  # splash is for TPUs; here it is interpreted
    step = make_train_step(model, Config(adapter=adapter, train=settings), optimizer, placement)
    losses, norms, moments = [], [], None
    with jax.set_mesh(mesh):
        for i in range(5):
            batch = sharding.place_batch(make_batch(i, model), mesh)
            adapters, state, metrics = step(adapters, state, params, batch, jax.random.key(i))
            # (1 - beta1) times the gradient, and its square
            moments = moments or jax.tree.map(lambda x: 10 * np.asarray(x), state)
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
    return {
        "losses": np.asarray(losses),
        "norms": np.asarray(norms),
        "gradients": moments,
        "adapters": jax.tree.map(np.asarray, adapters),
    }, split


def distance(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(x - y).max() / max(1.0, np.abs(y).max())) for x, y in pairs)


def main():
    jax.config.update("jax_disable_most_optimizations", True)
    alone = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    result = {}
    for argument in sys.argv[1:] or [f"{name}:{','.join(MESHES)}" for name in ROWS]:
        name, _, meshes = argument.rpartition(":")
        expected, none = train(ROWS[name], alone)
        result[name] = {"moved": float(abs(expected["losses"][-1] - expected["losses"][0]))}
        result[name]["norm"] = float(expected["norms"].min())
        for mesh in meshes.split(","):
            axes = MeshConfig(*map(int, mesh.split("x")))
            found, split = train(ROWS[name], sharding.make_mesh(axes))
            distances = {key: distance(found[key], expected[key]) for key in expected}
            result[name][mesh] = {"distances": distances, "split": split - none}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
