"""Text from a model: greedy or sampled, batched, with a key-value cache.

generate = make_generate(model)
answers  = generate(bound, prompts, max_new_tokens=64, stop_tokens={2})     # lists of token ids

Every token is that of a forward without a cache over the text so far. Where rotary frequencies
depend on the length of the text, the cache of a text is computed anew when its length changes them:
once for longrope, at the original length; for dynamic at every token beyond it, each of which costs
a forward over the whole text.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError
from lora_jax.generate.sampling import Sampling as Sampling
from lora_jax.generate.sampling import sample
from lora_jax.models.common import Model
from lora_jax.nn.modules import Cache
from lora_jax.nn.rope import changed
from lora_jax.nn.virtual import Virtual, first_position, placeholders
from lora_jax.sharding import whole

# Prompt lengths and answer lengths are rounded up to it, so that few shapes are compiled.
_BUCKET = 32
_ALL = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Batch:
    """Prompts (b, t), padded on the left, and how they are answered: arrays of NumPy or JAX."""

    tokens: Any
    segment_ids: Any
    stops: Any
    keys: jax.Array  # (b,)
    temperature: Any
    top_k: Any
    tail: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Answers (b, slots) of which `step` tokens are there, the latest (b,), and which are done."""

    step: jax.Array
    answers: jax.Array
    token: jax.Array
    done: jax.Array
    cache: Cache


def _make_decode(model: Model, compute_dtype: Any) -> tuple[Callable[..., _State], ...]:
    """(start, go_on): `start` reads prompts and picks the first token of their answers, `go_on`
    picks further ones, until there are `limit` or all are done.
    """
    ropes = getattr(model.config, "ropes_by_length", ())

    def runner(bound, prefix):
        virtual = {} if prefix is None else {"prefix": prefix}
        module = model.module(bound)
        return module, partial(module.hidden, compute_dtype=compute_dtype, **virtual)

    def advance(module, run, cache, tokens, positions, segment_ids):
        hidden, cache = run(tokens, positions=positions, segment_ids=segment_ids, cache=cache)
        return module.logits(hidden[:, -1]).astype(jnp.float32), cache

    def pick(batch: _Batch, logits, step):
        keys = jax.vmap(jax.random.fold_in, (0, None))(batch.keys, step)
        return sample(logits, keys, batch.temperature, batch.top_k, batch.tail)

    def start(bound, prefix, batch: _Batch, slots: int) -> _State:
        module, run = runner(bound, prefix)
        rows, time = batch.tokens.shape
        empty = model.empty_cache(rows, time + slots, compute_dtype)
        positions = _positions(batch.segment_ids)
        logits, cache = advance(module, run, empty, batch.tokens, positions, batch.segment_ids)
        first = pick(batch, logits, 0)
        answers = jnp.zeros((rows, slots), jnp.int32).at[:, 0].set(first)
        return _State(jnp.int32(1), answers, first, jnp.isin(first, batch.stops), cache)

    def go_on(bound, prefix, batch: _Batch, state: _State, limit) -> _State:
        module, run = runner(bound, prefix)
        rows, slots = state.answers.shape
        room, lengths = batch.tokens.shape[1] + slots, batch.segment_ids.sum(axis=1)

        def next_token(state: _State) -> _State:
            step, cache = state.step, state.cache
            if ropes:
                length = lengths + step
                stale = [changed(own, length + first_position(prefix)) for own in ropes]
                stale = jnp.stack(stale).any(axis=0) & ~state.done
                texts = jnp.concatenate([batch.tokens, state.answers], axis=1)
                empty = model.empty_cache(1, room, compute_dtype)
                cache = _renew(run, cache, empty, texts, length, stale)
            positions, real = (lengths + step - 1)[:, None], jnp.ones((rows, 1), jnp.int32)
            logits, cache = advance(module, run, cache, state.token[:, None], positions, real)
            token = pick(batch, logits, step)
            answers = jax.lax.dynamic_update_slice(state.answers, token[:, None], (0, step))
            return _State(
                step + 1, answers, token, state.done | jnp.isin(token, batch.stops), cache
            )

        return jax.lax.while_loop(
            lambda state: (state.step < limit) & ~state.done.all(), next_token, state
        )

    return start, go_on


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


_GREEDY = Sampling()


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
    """A function (bound, prompts, max_new_tokens, stop_tokens, prefix=None, sampling, numbers=None,
    length=0) -> answers, which ends an answer before its stop token.

    Prompts are rows of one batch, `prefix` the virtual tokens in front of each. The draws for a row
    depend on the seed and on its number alone (`numbers`, or its place in the batch), not on the
    other rows. The function compiles once per bucket of lengths; prompts count as `length` tokens
    at least.

    Raises:
        UserError: as `check_prompts`; max_new_tokens below 1; prompt and answer together longer
            than learned positions reach.

    Example:
        >>> from lora_jax.generate import make_generate
        >>> generate = make_generate(model)
        >>> answers = generate(model.params, [[1, 2, 3]], max_new_tokens=4, stop_tokens=())
        >>> [len(answer) for answer in answers]
        [4]
    """
    start, go_on = _make_decode(model, compute_dtype)

    @partial(jax.jit, static_argnames="slots")
    def decode(bound, prefix, batch, limit, slots):
        return go_on(bound, prefix, batch, start(bound, prefix, batch, slots), limit).answers

    def generate(
        bound: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int],
        prefix: Virtual | None = None,
        sampling: Sampling = _GREEDY,
        numbers: Sequence[int] | None = None,
        length: int = 0,
    ) -> list[list[int]]:
        check_prompts(model, prompts)
        check_room(model, prompts, max_new_tokens, prefix)
        if not len(prompts):
            return []
        numbers = range(len(prompts)) if numbers is None else numbers
        batch = _batch(prompts, stop_tokens, prefix, sampling, numbers, length)
        slots = _round_up(max_new_tokens)
        answers = whole(decode(bound, prefix, batch, max_new_tokens, slots))
        return [_until_stop(answer[:max_new_tokens].tolist(), stop_tokens) for answer in answers]

    return generate


def make_stream(model: Model, compute_dtype: Any = jnp.float32) -> Callable[..., Iterator[int]]:
    """A function (bound, prompt, max_new_tokens, stop_tokens, prefix=None, sampling, number=0,
    length=0, every=4) -> the tokens that `make_generate` gives, `every` at a time.
    """
    start, go_on = _make_decode(model, compute_dtype)
    begin = jax.jit(start, static_argnames="slots")
    step = jax.jit(go_on, donate_argnames="state")

    def stream(
        bound: Any,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int],
        prefix: Virtual | None = None,
        sampling: Sampling = _GREEDY,
        number: int = 0,
        length: int = 0,
        every: int = 4,
    ) -> Iterator[int]:
        check_prompts(model, [prompt])
        check_room(model, [prompt], max_new_tokens, prefix)
        batch = _batch([prompt], stop_tokens, prefix, sampling, [number], length)
        state, done = begin(bound, prefix, batch, slots=_round_up(max_new_tokens)), 0
        while True:
            new = whole(state.answers)[0, done : int(state.step)].tolist()
            for token in new:
                if token in stop_tokens:
                    return
                yield token
            done += len(new)
            if done >= max_new_tokens:
                return
            state = step(bound, prefix, batch, state, min(done + every, max_new_tokens))

    return stream


def check_room(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, prefix: Virtual | None
) -> None:
    """Raise for answers that there is no room for.

    Raises:
        UserError: max_new_tokens below 1; prompt and answer together longer than learned positions
            reach.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    longest, virtual = max(map(len, prompts), default=0), _virtual(prefix)
    limit = model.learned_positions
    if limit is not None and virtual + longest + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens"
            + (f", {virtual} virtual ones" if virtual else "")
            + f" and max_new_tokens={max_new_tokens} are more than the {limit} positions that "
            "the model has; ask for fewer"
        )


def beyond_positions(
    model: Model, longest: int, max_new_tokens: int, prefix: Virtual | None
) -> str | None:
    """A note on texts that may become longer than those that the model was made for, if any."""
    limit = model.config.max_position_embeddings
    if _virtual(prefix) + longest + max_new_tokens <= limit:
        return None
    return (
        f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} go beyond the "
        f"max_position_embeddings={limit} that the model was made for; text beyond them is "
        "likely to be worse"
    )


def _virtual(prefix: Virtual | None) -> int:
    return placeholders(prefix) + first_position(prefix)


def _batch(
    prompts: Sequence[Sequence[int]],
    stop_tokens: Collection[int],
    prefix: Virtual | None,
    sampling: Sampling,
    numbers: Sequence[int],
    length: int,
) -> _Batch:
    prompts = [[0] * placeholders(prefix) + list(prompt) for prompt in prompts]
    time = _round_up(max([length, *map(len, prompts)]))
    tokens, segment_ids = (np.zeros((len(prompts), time), np.int32) for _ in range(2))
    # Padded on the left: all rows write the same slot next.
    for row, prompt in enumerate(prompts):
        tokens[row, -len(prompt) :] = prompt
        segment_ids[row, -len(prompt) :] = 1
    key = jax.random.key(sampling.seed)
    return _Batch(
        tokens=tokens,
        segment_ids=segment_ids,
        stops=np.asarray(sorted(stop_tokens) or [-1], np.int32),
        keys=jax.vmap(jax.random.fold_in, (None, 0))(key, np.asarray(numbers, np.uint32)),
        temperature=np.float32(sampling.temperature),
        top_k=np.int32(min(sampling.top_k or _ALL, _ALL)),
        tail=np.float32(1 - sampling.top_p),
    )


def _round_up(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def _until_stop(answer: list[int], stops: Collection[int]) -> list[int]:
    return next((answer[:i] for i, token in enumerate(answer) if token in stops), answer)
