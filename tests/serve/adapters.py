"""A tiny model, adapters of it on disk, and a store over an engine, for the tests of the server."""

import asyncio
import contextlib
import dataclasses

import jax
import numpy as np

from lora_jax import AdapterConfig, formats, lora
from lora_jax.generate import Engine, for_decoding
from lora_jax.serve.driver import Driver, Job
from lora_jax.serve.folder import Folder
from lora_jax.serve.reader import Limits, Reader
from lora_jax.serve.store import Store

from ..engines import random_adapters
from ..families import FAMILIES, random_model

CONFIGS = (
    AdapterConfig(rank=2, alpha=4, target_modules="all-linear"),
    AdapterConfig(rank=4, alpha=8, target_modules=["q_proj", "v_proj"]),
    AdapterConfig(rank=3, alpha=3, target_modules=["down_proj", "o_proj"], use_rslora=True),
)
DIGEST = "sha256:base"


def tiny_model(family="llama"):
    return random_model(family, **FAMILIES[family].fields)


def write(model, directory, seed, config=None):
    """Write a random adapter and return its tree and config."""
    config = config or CONFIGS[seed % len(CONFIGS)]
    adapters = random_adapters(model, config, seed)
    extra = {"fingerprint": {"base": DIGEST}}
    formats.write_adapter(directory, adapters, model.params, config, base_model="base", extra=extra)
    return adapters, config


def merged(model, adapters, config):
    """The model with an adapter merged into it."""
    return model.replace(params=lora.merge(lora.bind(model.params, adapters, config)))


def open_engine(model, rows=4, slots=4, **options):
    model = for_decoding(model)
    settings = {"rank": 4, **options.pop("bank", {})}
    bank = lora.bank(model.params, slots=slots + 1, **settings)
    return Engine(model, rows=rows, max_length=40, bank=bank, max_terms=3, **options)


def shapes_of(model):
    """The model without its weights, as the reader has it."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    return model.replace(params=shapes)


@contextlib.contextmanager
def serving(model, root, engine, limits=None, max_waiting=1000, **options):
    """A driver that runs, and a store over it; the thread ends with the block."""
    driver = Driver(engine, max_waiting=max_waiting)
    driver.start()
    reader = Reader(shapes_of(model), DIGEST, Folder(root), limits or Limits(rank=8))
    try:
        yield driver, Store(driver, reader, **options)
    finally:
        driver.stop()


async def ask(driver, store, terms, request):
    """Tokens of the answer of adapters, and the revision that gave it."""
    lease = await store.lease(terms)
    return await answer(driver, lease, request), lease.revision


async def answer(driver, lease, request):
    loop, tokens, done = asyncio.get_running_loop(), [], asyncio.get_running_loop().create_future()

    def on_event(event):
        def take():
            if isinstance(event, BaseException):
                done.set_exception(event)
                return
            tokens.extend(event.tokens)
            if event.finish_reason is not None:
                done.set_result(tokens)

        loop.call_soon_threadsafe(take)

    driver.submit(Job(dataclasses.replace(request, adapter=lease.adapter), lease, on_event))
    return await done


def prompt_of(number, length=6):
    return np.random.default_rng(number).integers(1, 97, length).tolist()
