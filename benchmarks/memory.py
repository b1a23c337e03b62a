"""Memory of the compiled train step by method and base, reported by the compiler; prints a JSON
line per row. Nothing is run, and no weight is read.

    python benchmarks/memory.py
    python benchmarks/memory.py train.batch_size=8 data.max_length=1024 adapter.rank=64

Arguments are base, adapters, optimizer state and batch; temporaries are all other memory of a step.
"""

import json
import sys

import jax
import jax.numpy as jnp

from lora_jax import config as configs
from lora_jax import formats, lora, tree
from lora_jax.quantize import SCHEMES, quantize_tree
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.step import make_train_step

MODEL = "demo:smollm2-135m-instruct"
ROWS = {
    "lora, float32": (),
    "lora, bfloat16": ("base_dtype=bfloat16",),
    "lora, int8": ("base_dtype=int8",),
    "lora, nf4": ("base_dtype=nf4",),
    "dora, float32": ("adapter.use_dora=true",),
    "dora, nf4": ("adapter.use_dora=true", "base_dtype=nf4"),
    "full, float32": ("adapter.method=full",),
}


def base_shapes(params: dict, base_dtype: str | None) -> dict:
    """Return the shapes of the base as a run with `base_dtype` stores it."""
    if base_dtype in SCHEMES:
        return jax.eval_shape(lambda params: quantize_tree(params, str(base_dtype)), params)
    dtype = jnp.dtype(base_dtype or "float32")
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)


def measure(settings: list[str]) -> dict[str, float]:
    """Return MB of the base, arguments and temporaries of one compiled step."""
    config = configs.parse({"model": MODEL, "adapter": {"rank": 16, "alpha": 32}}, settings)
    model = formats.describe(formats.resolve(MODEL, weights=False))
    params = base_shapes(model.params, config.base_dtype)
    adapters = lora.shapes(params, config.adapter)
    if config.adapter.trains_everything:
        params = jax.eval_shape(
            lambda params: lora.init(jax.random.key(0), params, config.adapter)[0], model.params
        )
    optimizer = make_optimizer(config.train, config.adapter)
    shape = (config.train.batch_size, config.data.max_length)
    names = ("tokens", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    batch["loss_weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(optimizer.init, adapters)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_train_step(model, config, optimizer)
    memory = step.lower(adapters, state, params, batch, key).compile().memory_analysis()
    sizes = {
        "base": tree.nbytes(params),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs beyond arguments": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    return {f"{name} MB": round(size / 1e6, 3) for name, size in sizes.items()}


def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        sys.exit(__doc__)
    for name, settings in ROWS.items():
        usual = ["train.batch_size=1", "train.remat=full"]
        found = measure([*usual, *settings, *sys.argv[1:]])
        print(json.dumps({"row": name, **found}), flush=True)


if __name__ == "__main__":
    main()
