"""Prompt tuning (arXiv 2104.08691) and prefix tuning (arXiv 2101.00190): virtual tokens.

params    untouched
adapters  prompt_embeddings (p, d), or
          prefix_{keys,values} (layers, p, k * h) and prefix_gate (layers,)
forward   model.apply(params, tokens, prefix=adapters.prefix(adapters, config))

They start as tokens of the vocabulary, as a text, or at random. `as_model_sees` runs the model to
find the embeddings, or keys and values, of tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.config import AdapterConfig
from lora_jax.errors import UserError
from lora_jax.nn.virtual import Prefix, Prompt, Virtual
from lora_jax.targets import Trainable, as_trainable

Leaves = dict[str, jax.Array]


def init(key: jax.Array, params: Mapping, found: Trainable, calibrate: Callable | None) -> Leaves:
    """Return fresh virtual tokens in float32; a gate is zero. Random ones are standard normal, as
    in PEFT; all others come from `calibrate` (`as_model_sees`), given `params` and the key.

    Raises:
        UserError: they start as tokens, and there is no `calibrate`.
    """
    start = found.config.prompt_init
    if start == "random":
        keys = jax.random.split(key, len(found.virtual))
        leaves = {
            name: jax.random.normal(own, shape)
            for own, (name, shape) in zip(keys, found.virtual.items(), strict=True)
        }
    elif calibrate is None:
        raise UserError(
            f"prompt_init={start} runs the model: give calibrate=as_model_sees(model, config, "
            "tokens), or start at random"
        )
    else:
        leaves = calibrate(params, key)
    gate = found.virtual.get("prefix_gate")
    return leaves if gate is None else leaves | {"prefix_gate": jnp.zeros(gate)}


def as_model_sees(
    model: Any, config: AdapterConfig | Trainable, tokens: Sequence[int] | None = None
) -> Callable[[Mapping, jax.Array], Leaves]:
    """Return a function (params, key) -> the leaves of the method, computed from tokens.

    `tokens` are cut or repeated to the number of virtual tokens; without any, random ones of the
    vocabulary are drawn. A prompt takes their embeddings, a prefix their keys and values in every
    layer, as for a text that begins at position 0.
    """
    found = as_trainable(model.params, config)
    shape = next(iter(found.virtual.values()))
    count = shape[-2]

    @jax.jit
    def leaves(params: Mapping, key: jax.Array) -> Leaves:
        if tokens is None:
            ids = jax.random.randint(key, (1, count), 0, model.config.vocab_size)
        else:
            ids = jnp.resize(jnp.asarray(tokens, jnp.int32), (1, count))
        module = model.module(params)
        if found.config.trains_prompt:
            return {"prompt_embeddings": module.embed(ids, jnp.float32)[0]}
        _, cache = module.hidden(
            ids,
            positions=jnp.arange(count)[None],
            segment_ids=jnp.ones_like(ids),
            cache=model.empty_cache(1, count, jnp.float32),
        )
        # (layers, 1, k, p, h) -> (layers, p, k * h)
        keys, values = (x[:, 0].swapaxes(1, 2).reshape(shape) for x in (cache.keys, cache.values))
        return {"prefix_keys": keys, "prefix_values": values}

    return leaves


def value(adapters: Mapping[str, jax.Array], config: AdapterConfig) -> Virtual | None:
    """Return the virtual tokens that the forward takes; None for a method that has none."""
    match config.method:
        case "prompt":
            return Prompt(adapters["prompt_embeddings"])
        case "prefix":
            gate = adapters.get("prefix_gate")
            return Prefix(adapters["prefix_keys"], adapters["prefix_values"], gate)
    return None
