"""Text from a model: greedy or sampled, batched, with a key-value cache.

generate = make_generate(model)
answers  = generate(bound, prompts, max_new_tokens=64, stop_tokens={2})     # lists of token ids
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.config import UserError
from lora_jax.models.common import Model
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

    @partial(jax.jit, static_argnames="slots")
    def decode(bound, prefix, tokens, segment_ids, limit, stops, temperature, key, slots: int):
        module, beside = model.module(bound), {} if prefix is None else {"prefix": prefix}
        rows, time = tokens.shape

        def advance(cache, tokens, positions, segment_ids):
            hidden, cache = module.hidden(
                tokens,
                positions=positions,
                segment_ids=segment_ids,
                cache=cache,
                compute_dtype=compute_dtype,
                **beside,
            )
            return module.logits(hidden[:, -1]).astype(jnp.float32), cache

        def pick(logits, step):
            return sample(logits, jax.random.fold_in(key, step), temperature)

        positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
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
