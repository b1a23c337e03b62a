"""FLOPs of a DoRA step relative to a LoRA step, counted by the compiler; prints one JSON line.

    python benchmarks/dora_flops.py
    python benchmarks/dora_flops.py --rank 32 --tokens 2048

The model is one layer of SmolLM2-135M with a tiny vocabulary, so that each loop has one iteration
(the compiler counts a loop's body once). `peft` is PEFT's formulation in the same program: the
product a @ b as an identity matrix times both factors, and the norm of W plus it.
"""

import argparse
import json

import jax
import jax.numpy as jnp

from lora_jax import config as configs
from lora_jax import lora, models
from lora_jax.adapters import dora
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.step import make_train_step

SHAPE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def flops(overrides: tuple[str, ...], rank: int, tokens: int) -> float:
    """Return the FLOPs of one compiled optimizer step."""
    settings = ["train.batch_size=1", "train.remat=none", f"adapter.rank={rank}", *overrides]
    config = configs.parse({"model": "shapes"}, settings)
    model = models.describe(SHAPE)
    adapters = lora.shapes(model.params, config.adapter)
    optimizer = make_optimizer(config.train, config.adapter)
    batch = {
        name: jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        for name in ("tokens", "segment_ids", "positions")
    }
    batch["loss_weights"] = jax.ShapeDtypeStruct((1, tokens), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(optimizer.init, adapters)
    step = make_train_step(model, config, optimizer)
    compiled = step.lower(adapters, state, model.params, batch, key).compile()
    return compiled.cost_analysis()["flops"]


def peft_norms(target, weight, a, b):
    """Return the result of `dora.column_norms`, by the dense product that it avoids."""
    return jnp.linalg.norm(weight + (jnp.eye(weight.shape[-2]) @ a) @ b, axis=-2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    found = {"lora": flops((), options.rank, options.tokens)}
    found["dora"] = flops(("adapter.use_dora=true",), options.rank, options.tokens)
    ours, dora.column_norms = dora.column_norms, peft_norms
    found["peft"] = flops(("adapter.use_dora=true",), options.rank, options.tokens)
    dora.column_norms = ours
    ratios = {f"{name}_over_lora": count / found["lora"] for name, count in found.items()}
    print(json.dumps({**vars(options), **found, **ratios}))


if __name__ == "__main__":
    main()
