"""Answers of an engine, and adapters for it, for tests that compare them with an oracle."""

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import lora
from lora_jax.generate import Engine, Request
from lora_jax.nn.virtual import placeholders


def open_engine(model, prompts, count, *, params=None, prefix=None, rows=2):
    """An engine with room for prompts and answers of `count` tokens."""
    length = placeholders(prefix) + max(map(len, prompts)) + count
    engine = Engine(model, rows=rows, max_length=length)
    engine.use(model.params if params is None else params, prefix)
    return engine


def complete(model, prompts, count, stops=(), *, engine=None, **options):
    """Tokens of the answers to prompts, in fewer rows than there are prompts."""
    engine = engine or open_engine(model, prompts, count, **options)
    requests = [Request(prompt, count, stops, number=i) for i, prompt in enumerate(prompts)]
    return [found.tokens for found in engine.answer(requests)]


def random_adapters(model, config, seed):
    """Adapters of a config, with noise on everything, so that they change the model."""
    _, adapters = lora.init(jax.random.key(seed), model.params, config)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(x + 0.3 * rng.standard_normal(x.shape), jnp.float32), adapters
    )
