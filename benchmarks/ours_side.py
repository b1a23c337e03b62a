"""Our side of `vs_peft.py` and `gpu.py`: a job through the parts that a run is made of; prints a
JSON line. The scripts start it.
"""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from sides import Job, Watch, gflops, products, read_job

from lora_jax import config as configs
from lora_jax import formats
from lora_jax.data import sets
from lora_jax.errors import UserError
from lora_jax.report.usage import device_memory
from lora_jax.session import Session, open_session
from lora_jax.sharding import make_mesh, place_batch
from lora_jax.train.base import load_base
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.step import make_train_step
from lora_jax.train.trainer import State, place_state


def make_config(job: Job) -> configs.Config:
    """Return the config of a job."""
    return configs.parse(
        {
            "model": job.model,
            "base_dtype": "nf4" if job.method == "nf4" else job.dtype,
            "data": {
                "train": job.rows,
                "max_length": job.length,
                "too_long": "error",
                "packing": job.packing,
                "shuffle": job.shuffle,
                "share_prompts": job.share_prompts,
                "chat_template": "none",  # rows are tokens
                "cache": False,
            },
            "adapter": {
                "rank": job.rank,
                "alpha": job.alpha,
                "target_modules": "all-linear",
                "use_dora": job.method == "dora",
            },
            "train": {
                "steps": job.steps,
                "batch_size": job.batch,
                "learning_rate": job.learning_rate,
                "schedule": "linear",
                "compute_dtype": job.dtype,
                "remat": job.remat,
                "attention": job.attention,
            },
        }
    )


def train(job: Job, watch: Watch) -> tuple[Session, State]:
    """Take the steps of a job.

    Raises:
        SystemExit: the step was compiled more than once.
    """
    quiet = Console(quiet=True)
    session = open_session(make_config(job))
    encoder = session.make_encoder(quiet)
    train_data, _ = sets.read_sets(session.config, encoder)
    loader = sets.make_loader(session.config, train_data, encoder, None, quiet)
    mesh = make_mesh(session.config.mesh)
    config, params, adapters = load_base(
        session.config, session.source, session.model, mesh, jax.random.key(0)
    )
    session = session.with_config(config)
    optimizer = make_optimizer(config.train, config.adapter)
    state = place_state(config, session.model, mesh, optimizer, adapters)
    placement = jax.tree.map(lambda leaf: leaf.sharding, (state.adapters, state.opt_state))
    step = make_train_step(session.model, config, optimizer, placement)
    with jax.set_mesh(mesh):
        for number in range(job.steps):
            begin = time.perf_counter()
            batch = place_batch(loader.batch(number), mesh)
            state.adapters, state.opt_state, metrics = step(
                state.adapters, state.opt_state, params, batch, jax.random.key(number)
            )
            loss = float(metrics["loss"])
            seconds = time.perf_counter() - begin
            examples = sum(map(len, loader.indices(number)))
            watch.add(seconds, loss, round(float(metrics["supervised_tokens"])), examples)
    if (programs := step._cache_size()) != 1:
        raise SystemExit(f"error: the train step was compiled {programs} times")
    return session, state


def measure_products(job: Job) -> float:
    """Return the rate of XLA's products on the shapes of a step."""

    def prepare(m: int, k: int, n: int) -> Any:
        x, y = jnp.ones((m, k), job.dtype), jnp.ones((k, n), job.dtype)
        multiply = jax.jit(jnp.matmul)
        return lambda: multiply(x, y).block_until_ready()

    return gflops(products(job.model, job.product_tokens), prepare)


def count_flops(session: Session) -> int:
    """Return the operations of a step without recomputation, counted from shapes."""
    from lora_jax.plan import program, roofline  # a run does not import them

    config = session.config
    model = program.stored(config, session.model)
    return roofline.count(program.build(config, model, make_mesh(config.mesh))).model_flops


def main() -> None:
    job = read_job()
    if job.device != jax.default_backend():
        raise SystemExit(f"error: jax has no {job.device}, only: {jax.devices()}")
    watch = Watch(job.began)
    try:
        session, state = train(job, watch)
        if job.adapter is not None:
            params, config = session.model.params, session.config.adapter
            name = job.model
            formats.write_adapter(job.adapter, state.adapters, params, config, base_model=name)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    found = watch.report() | {"jax": jax.__version__, **device_memory()}
    found["model_flops"] = count_flops(session)
    if job.product_tokens:
        found["gflops"] = measure_products(job)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
