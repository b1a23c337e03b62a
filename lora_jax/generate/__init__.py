"""Generation of text: greedy or sampled, in batches, with a key-value cache.

generate = make_generate(model)
answers  = generate(bound, prompts, max_new_tokens=64, stop_tokens={2})     # lists of token ids

Each token equals that of a forward pass without a cache. If rotary frequencies depend on the length
of the text, its cache is recomputed when they change: for longrope once, at the original length;
for dynamic at each token beyond it, which costs a forward pass over the whole text per token.
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
from lora_jax.generate.sampling import kept_number, sample
from lora_jax.models.common import Execution, Model
from lora_jax.nn.cache import Cache
from lora_jax.nn.rope import changed
from lora_jax.nn.virtual import Virtual, first_position, placeholders
from lora_jax.sharding import gather_to_host

# Lengths of prompts and answers are rounded up to a multiple of this, to compile few shapes.
_BUCKET = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Batch:
    """Prompts (b, t), padded on the left, and sampling settings, as arrays of NumPy or JAX."""

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
    """Answers (b, slots) so far: `step` tokens, the last ones (b,), and which rows are done."""

    step: jax.Array
    answers: jax.Array
    token: jax.Array
    done: jax.Array
    cache: Cache


def _make_decode(model: Model, compute_dtype: Any) -> tuple[Callable[..., _State], ...]:
    """Return two functions: `start` reads prompts and picks the first token of each answer; `go_on`
    picks further tokens, until there are `limit` or all rows are done.
    """
    ropes = getattr(model.config, "ropes_by_length", ())

    def runner(bound, prefix):
        virtual = {} if prefix is None else {"prefix": prefix}
        module = model.module(bound)
        return module, partial(module.hidden, execution=Execution(compute_dtype), **virtual)

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
    """Return the cache with the `stale` rows (b,) recomputed from `texts` (b, s) with the rotary
    frequencies of `lengths` (b,). One row at a time is computed, in the `empty` cache.
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
    """Return positions (b, t) for rows of one text; `segment_ids` are 1 in it and 0 in padding."""
    return jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)


_GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a batch that is part of a larger set of prompts."""

    numbers: Sequence[int] | None = None  # of each row in the set: they choose the random draws
    length: int = 0  # least number of tokens to pad prompts to


_ALONE = Rows()


def check_prompts(model: Model, prompts: Sequence[Sequence[int]]) -> None:
    """Check that prompts are lists of tokens of the model.

    Raises:
        UserError: a prompt that is empty or not a list of tokens; as `Model.check_tokens`.
    """
    for number, prompt in enumerate(prompts):
        what = f"prompt {number}"
        if np.ndim(prompt) != 1:
            raise UserError(f"{what} must be a list of tokens, not {prompt!r}")
        if not len(prompt):
            raise UserError(f"{what} is empty; begin it with a token, such as the tokenizer's BOS")
        model.check_tokens(prompt, what)


def make_generate(model: Model, compute_dtype: Any = jnp.float32) -> Callable[..., list[list[int]]]:
    """Return a function that generates answers to a batch of prompts.

    The function takes (bound, prompts, *, max_new_tokens, stop_tokens, prefix=None, sampling, rows)
    and returns a list of token ids per prompt, without the stop token:

        bound: parameters, as `lora.bind` returns.
        prompts: lists of token ids, one batch.
        max_new_tokens: the largest number of tokens of an answer.
        stop_tokens: ids that end an answer.
        prefix: virtual tokens before each prompt, as `lora.prefix` returns.
        sampling: a `Sampling`; greedy by default.
        rows: a `Rows`. The draws of a row depend on the seed and its number only, not on the batch.

    It compiles once per bucket of lengths. It raises a UserError as `check_prompts` and
    `check_room`.

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
        rows: Rows = _ALONE,
    ) -> list[list[int]]:
        check_prompts(model, prompts)
        check_room(model, prompts, max_new_tokens, prefix)
        if not len(prompts):
            return []
        batch = _batch(prompts, stop_tokens, prefix, sampling, rows)
        slots = _round_up(max_new_tokens)
        answers = gather_to_host(decode(bound, prefix, batch, max_new_tokens, slots))
        return [_until_stop(answer[:max_new_tokens].tolist(), stop_tokens) for answer in answers]

    return generate


def make_stream(
    model: Model, compute_dtype: Any = jnp.float32, every: int = 4
) -> Callable[..., Iterator[int]]:
    """Return a function that generates one answer and yields its tokens, `every` at a time.

    It takes (bound, prompt, *, max_new_tokens, stop_tokens, prefix=None, sampling, rows), as that
    of `make_generate` for one prompt, and yields the same tokens.
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
        rows: Rows = _ALONE,
    ) -> Iterator[int]:
        check_prompts(model, [prompt])
        check_room(model, [prompt], max_new_tokens, prefix)
        batch = _batch([prompt], stop_tokens, prefix, sampling, rows)
        state, done = begin(bound, prefix, batch, slots=_round_up(max_new_tokens)), 0
        while True:
            new = gather_to_host(state.answers)[0, done : int(state.step)].tolist()
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
    """Check that prompts and answers fit the positions of the model.

    Raises:
        UserError: max_new_tokens below 1; more tokens of prompt and answer than learned positions.
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
            "the model has; shorten the prompt or lower max_new_tokens"
        )


def beyond_positions(
    model: Model, longest: int, max_new_tokens: int, prefix: Virtual | None
) -> str | None:
    """Return a note if texts may exceed the `max_position_embeddings` of the model, else None."""
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
    rows: Rows,
) -> _Batch:
    """Return prompts and settings as arrays, prompts padded on the left to a bucket of lengths."""
    numbers = range(len(prompts)) if rows.numbers is None else rows.numbers
    prompts = [[0] * placeholders(prefix) + list(prompt) for prompt in prompts]
    time = _round_up(max([rows.length, *map(len, prompts)]))
    tokens, segment_ids = (np.zeros((len(prompts), time), np.int32) for _ in range(2))
    # Padded on the left, so that all rows write their next token to the same slot.
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
        top_k=np.int32(kept_number(sampling.top_k)),
        tail=np.float32(1 - sampling.top_p),
    )


def _round_up(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def _until_stop(answer: list[int], stops: Collection[int]) -> list[int]:
    return next((answer[:i] for i, token in enumerate(answer) if token in stops), answer)
