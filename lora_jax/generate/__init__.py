"""Text from a model: greedy or sampled, batched, with a key-value cache.

generate = make_generate(model)
answers  = generate(bound, prompts, max_new_tokens=64, stop_tokens={2})     # lists of token ids

Every token is that of a forward without a cache over the text so far. Where rotary frequencies
depend on the length of the text, the cache of a text is computed anew when its length changes them:
once for longrope, at the original length; for dynamic at every token beyond it, each of which costs
a forward over the whole text.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.config import UserError
from lora_jax.layers import Cache
from lora_jax.models.common import Model
from lora_jax.rope import changed
from lora_jax.sharding import whole
from lora_jax.virtual import Virtual, first_position, placeholders

_BUCKET = (
    32  # prompt lengths and answer lengths are rounded up to it, so that few shapes are compiled
)


def sample(logits: jax.Array, key: jax.Array, temperature: jax.Array) -> jax.Array:
    """Token ids (b,) from logits (b, vocab): the largest at temperature 0, a draw from
    softmax(logits / temperature) above.
    """
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def _make_decode(model: Model, compute_dtype: Any) -> Callable[..., jax.Array]:
    """The compiled part: prompts (b, t), padded on the left, to answers (b, slots)."""

    ropes = getattr(model.config, "ropes_by_length", ())

    @partial(jax.jit, static_argnames="slots")
    def decode(bound, prefix, tokens, segment_ids, limit, stops, temperature, key, slots: int):
        module, virtual = model.module(bound), {} if prefix is None else {"prefix": prefix}
        run = partial(module.hidden, compute_dtype=compute_dtype, **virtual)
        rows, time = tokens.shape

        def advance(cache, tokens, positions, segment_ids):
            hidden, cache = run(tokens, positions=positions, segment_ids=segment_ids, cache=cache)
            return module.logits(hidden[:, -1]).astype(jnp.float32), cache

        def pick(logits, step):
            return sample(logits, jax.random.fold_in(key, step), temperature)

        positions = _positions(segment_ids)
        logits, cache = advance(
            model.empty_cache(rows, time + slots, compute_dtype), tokens, positions, segment_ids
        )
        lengths = segment_ids.sum(axis=1)
        first = pick(logits, 0)
        answers = jnp.zeros((rows, slots), jnp.int32).at[:, 0].set(first)
        done = jnp.isin(first, stops)

        def unfinished(state):
            step, _, _, done, _ = state
            return (step < limit) & ~done.all()

        def next_token(state):
            step, answers, token, done, cache = state
            if ropes:
                length = lengths + step
                stale = [changed(own, length + first_position(prefix)) for own in ropes]
                stale = jnp.stack(stale).any(axis=0) & ~done
                texts = jnp.concatenate([tokens, answers], axis=1)
                empty = model.empty_cache(1, time + slots, compute_dtype)
                cache = _renew(run, cache, empty, texts, length, stale)
            logits, cache = advance(
                cache, token[:, None], (lengths + step - 1)[:, None], jnp.ones((rows, 1), jnp.int32)
            )
            token = pick(logits, step)
            answers = jax.lax.dynamic_update_slice(answers, token[:, None], (0, step))
            return step + 1, answers, token, done | jnp.isin(token, stops), cache

        return jax.lax.while_loop(
            unfinished, next_token, (jnp.int32(1), answers, first, done, cache)
        )[1]

    return decode


def _renew(
    run: Callable,
    cache: Cache,
    empty: Cache,
    texts: jax.Array,
    lengths: jax.Array,
    stale: jax.Array,
) -> Cache:
    """The cache with those rows that are `stale` (b,) computed anew from `texts` (b, s), one at a
    time in an `empty` one, with the frequencies of texts of `lengths` (b,).
    """

    def renew_one(state: tuple[Cache, jax.Array]) -> tuple[Cache, jax.Array]:
        cache, stale = state
        row = jnp.argmax(stale)
        text, real = (jax.lax.dynamic_slice_in_dim(x, row, 1) for x in (texts, cache.segment_ids))
        length = jnp.broadcast_to(lengths[row], text.shape)
        positions = _positions(real)
        _, new = run(text, positions=positions, segment_ids=real, lengths=length, cache=empty)
        this = (jnp.arange(len(stale)) == row)[:, None, None, None]
        keys = jnp.where(this, new.keys, cache.keys)
        values = jnp.where(this, new.values, cache.values)
        cache = dataclasses.replace(cache, keys=keys, values=values)
        return cache, stale.at[row].set(False)

    return jax.lax.while_loop(lambda state: state[1].any(), renew_one, (cache, stale))[0]


def _positions(segment_ids: jax.Array) -> jax.Array:
    """Positions (b, t) of rows of one text each, 1 where it is and 0 around it."""
    return jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)


def check_prompts(model: Model, prompts: Sequence[Sequence[int]]) -> None:
    """Raise for prompts that the model cannot read.

    Raises:
        UserError: a prompt that is empty or no list of tokens; as `Model.check_tokens`.
    """
    for number, prompt in enumerate(prompts):
        what = f"prompt {number}"
        if np.ndim(prompt) != 1:
            raise UserError(f"{what} must be a list of tokens, not {prompt!r}")
        if not len(prompt):
            raise UserError(f"{what} is empty; begin it with a token, such as the tokenizer's BOS")
        model.check_tokens(prompt, what)


def make_generate(model: Model, compute_dtype: Any = jnp.float32) -> Callable[..., list[list[int]]]:
    """A function (bound, prompts, max_new_tokens, stop_tokens, prefix=None, temperature=0, seed=0)
    -> answers, which ends an answer before its stop token. Prompts are rows of one batch, `prefix`
    the virtual tokens in front of each; the function compiles once per bucket of lengths.

    Raises:
        UserError: as `check_prompts`; max_new_tokens below 1; prompt and answer together longer
            than learned positions reach.
    """

    decode = _make_decode(model, compute_dtype)

    def generate(
        bound: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int],
        prefix: Virtual | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]:
        check_prompts(model, prompts)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if not len(prompts):
            return []
        places, limit = placeholders(prefix), model.learned_positions
        prompts = [[0] * places + list(prompt) for prompt in prompts]
        longest = max(map(len, prompts))
        last = first_position(prefix) + longest + max_new_tokens
        if limit is not None and last > limit:
            virtual = places + first_position(prefix)
            raise UserError(
                f"a prompt of {longest - places} tokens"
                + (f", {virtual} virtual ones" if virtual else "")
                + f" and max_new_tokens={max_new_tokens} are more than the {limit} positions that "
                "the model has; ask for fewer"
            )
        time = -(-longest // _BUCKET) * _BUCKET
        tokens, segment_ids = (np.zeros((len(prompts), time), np.int32) for _ in range(2))
        # Padded on the left: all rows write the same slot next.
        for row, prompt in enumerate(prompts):
            tokens[row, -len(prompt) :] = prompt
            segment_ids[row, -len(prompt) :] = 1
        stops = np.asarray(sorted(stop_tokens) or [-1], np.int32)
        slots = -(-max_new_tokens // _BUCKET) * _BUCKET
        answers = whole(
            decode(
                bound,
                prefix,
                tokens,
                segment_ids,
                max_new_tokens,
                stops,
                float(temperature),
                jax.random.key(seed),
                slots,
            )
        )
        return [_until_stop(answer[:max_new_tokens].tolist(), stop_tokens) for answer in answers]

    return generate


def _until_stop(answer: list[int], stops: Collection[int]) -> list[int]:
    return next((answer[:i] for i, token in enumerate(answer) if token in stops), answer)
