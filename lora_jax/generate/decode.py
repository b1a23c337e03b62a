"""The compiled programs of an engine: admit a row, prefill prompts, decode rows.

admit    write the settings of a request into a free row
begin    write virtual tokens to the start of the cache of a row
prefill  read a chunk of a prompt into the cache of its row
score    log-probabilities of the tokens of a chunk
first    give rows their first token, from the last hidden state of the prompt
decode   give running rows their next tokens, several per call

They are functions of the parameters, the cache and the rows. Cache and rows are donated and
come back. Everything that differs between requests is an array with a row axis, so a request
compiles nothing. Calls differ in static sizes only: the rows and tokens of a batch, and the slots
that attention reads.

Shape letters: n rows of the engine, b rows of a call, t tokens of a chunk, m adapters of a row, v
vocab.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.generate.log_probs import LogProbs, log_probs, log_probs_if
from lora_jax.generate.sampling import (
    Sampling,
    SamplingRows,
    Seen,
    choose,
    count_tokens,
    empty_seen,
    keep_allowed,
    row_of,
    set_row,
    stack_rows,
    start_row,
)
from lora_jax.models.common import Execution, Model
from lora_jax.nn.cache import Cache
from lora_jax.nn.virtual import Prefix, Prompt, Virtual

MOST_STEPS = 8  # tokens of a row per call of `decode`
_SCORED = 16  # tokens whose logits are computed together


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """State of the rows of an engine."""

    token: Any  # (n,) last token of a running row, not in the cache yet
    length: Any  # (n,) tokens in the cache
    made: Any  # (n,) tokens of the answer so far
    limit: Any  # (n,) the row pauses when it has made so many
    running: Any  # (n,) bool
    reports: Any  # (n,) bool: log-probabilities of the answer are wanted
    slot_ids: Any  # (n, m) adapters in the bank
    slot_weights: Any  # (n, m)
    sampling: SamplingRows
    seen: Seen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Admission:
    """Settings of one row at its start, NumPy arrays without a row axis."""

    reports: Any
    slot_ids: Any  # (m,)
    slot_weights: Any  # (m,)
    sampling: SamplingRows
    in_prompt: Any  # (v,) bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """Parts of the texts of some rows."""

    rows: Any  # (b,)
    tokens: Any  # (b, t)
    start: Any  # (b,) position of the first token
    count: Any  # (b,) tokens; the rest is padding
    length: Any  # (b,) of the whole text, which chooses some rotary frequencies


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Made:
    """Tokens of a call; those of rows that did not run are -1."""

    tokens: jax.Array  # (steps, b)
    log_probs: LogProbs  # each (steps, b, ..)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Turn:
    """Limits of a call of `decode`."""

    allowed: Any  # (b, ceil(v / 32)) uint32: bits of the tokens that rows may take
    limit: Any  # tokens of a row
    hurry: Any  # bool: fewer if one of the rows pauses


@dataclass(frozen=True)
class Programs:
    """Compiled programs, and how many were compiled so far."""

    admit: Callable[..., Rows]
    begin: Callable[..., Cache]
    prefill: Callable[..., tuple[Cache, jax.Array, jax.Array]]
    score: Callable[..., LogProbs]
    first: Callable[..., tuple[Rows, Made]]
    decode: Callable[..., tuple[Cache, Rows, Made]]
    compiled: dict[str, int]


def empty_rows(rows: int, adapters: int, vocab: int) -> Rows:
    """Return the state of `rows` free rows with up to `adapters` each."""
    idle = stack_rows([row_of(Sampling(), 0, (), vocab)] * rows)
    zeros, off = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    ids, shares = jnp.zeros((rows, adapters), jnp.int32), jnp.zeros((rows, adapters), jnp.float32)
    settings = jax.tree.map(jnp.asarray, idle)
    # Copies: a donated array must not be given twice.
    return jax.tree.map(
        jnp.copy,
        Rows(zeros, zeros, zeros, zeros, off, off, ids, shares, settings, empty_seen(rows, vocab)),
    )


def make_programs(model: Model, dtype: Any, place: Callable[[Any], Any]) -> Programs:
    """Return the programs of a model in a compute dtype. `place` constrains the sharding of their
    results, so that the next call takes cache and rows as they are.
    """
    compiled: dict[str, int] = {}

    def counted(function: Callable, **options: Any) -> Callable:
        """Compile a function, and count how often."""

        @wraps(function)
        def counting(*arguments: Any, **named: Any) -> Any:
            compiled[function.__name__] = compiled.get(function.__name__, 0) + 1
            return place(function(*arguments, **named))

        return jax.jit(counting, **options)

    def begin(given, cache, row, virtual, count):
        return _begin(model.module(given.params), dtype, cache, row, virtual, count)

    def prefill(given, cache, rows, chunk, view):
        run = _Forward(model, dtype, given, rows, chunk.rows)
        return _prefill(run, cache, chunk, view)

    def score(given, rows, chunk, hidden, targets):
        return _score(_Forward(model, dtype, given, rows, chunk.rows), hidden, targets)

    def first(given, rows, chosen, allowed, hidden, length, limit):
        run = _Forward(model, dtype, given, rows, chosen)
        return _first(run, rows, chosen, allowed, hidden, length, limit)

    def decode(given, cache, rows, chosen, turn, view):
        run = _Forward(model, dtype, given, rows, chosen)
        return _decode(run, cache, rows, chosen, turn, view)

    return Programs(
        counted(admit, donate_argnames="rows"),
        counted(begin, donate_argnames="cache"),
        counted(prefill, static_argnames="view", donate_argnames="cache"),
        counted(score),
        counted(first, donate_argnames="rows"),
        counted(decode, static_argnames="view", donate_argnames=("cache", "rows")),
        compiled,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given:
    """Parameters, the bank of adapters and virtual tokens, which all rows share."""

    params: Any
    bank: Any = None  # its `params` are left out
    prefix: Virtual | None = None


class _Forward:
    """The model with the adapters of some rows bound: all, or those `chosen` (b,)."""

    def __init__(self, model: Model, dtype: Any, given: Given, rows: Rows, chosen: Any):
        params = given.params
        if given.bank is not None:
            choice = (rows.slot_ids, rows.slot_weights)
            ids, shares = choice if chosen is None else (x[chosen] for x in choice)
            params = dataclasses.replace(given.bank, params=params).bind(params, ids, shares)
        self.module = model.module(params)
        virtual: dict[str, Virtual] = {} if given.prefix is None else {"prefix": given.prefix}
        self.hidden = partial(self.module.hidden, execution=Execution(dtype), **virtual)
        self.by_length = bool(getattr(model.config, "ropes_by_length", ()))

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.module.logits(hidden).astype(jnp.float32)


def admit(rows: Rows, index: Any, own: Admission) -> Rows:
    def put(name: str, value: Any) -> jax.Array:
        return getattr(rows, name).at[index].set(value)

    return Rows(
        token=put("token", 0),
        length=put("length", 0),
        made=put("made", 0),
        limit=put("limit", 0),
        running=put("running", False),
        reports=put("reports", own.reports),
        slot_ids=put("slot_ids", own.slot_ids),
        slot_weights=put("slot_weights", own.slot_weights),
        sampling=set_row(rows.sampling, index, own.sampling),
        seen=start_row(rows.seen, index, own.in_prompt),
    )


def _begin(
    module: Any, dtype: Any, cache: Cache, row: jax.Array, virtual: Virtual, count: jax.Array
) -> Cache:
    """Write the first `count` virtual tokens to a `row` (1,). The base reads those of a prompt;
    a prefix is keys and values already.
    """
    own = dataclasses.replace(cache, rows=row)
    if isinstance(virtual, Prompt):
        places = jnp.arange(len(virtual.embeddings))[None]
        _, own = module.hidden(
            jnp.zeros_like(places),
            positions=places,
            segment_ids=(places < count).astype(jnp.int32),
            cache=dataclasses.replace(own, view=places.shape[1]),
            prefix=virtual,
            execution=Execution(dtype),
        )
        return cache.with_content(own)
    layers, most, _ = virtual.keys.shape
    places = own.places(jnp.arange(most)[None], (jnp.arange(most) < count)[None])
    for index in range(layers):
        slices = Prefix(virtual.keys[index], virtual.values[index])
        heads = slices.heads(1, module.config.head_dim)
        own = own.with_layer(index, own.layer(index, places).write(*heads))
    return dataclasses.replace(own, rows=None)


def _prefill(
    run: _Forward, cache: Cache, chunk: Chunk, view: int
) -> tuple[Cache, jax.Array, jax.Array]:
    """Return also hidden states of the chunk (b, t, d), and of its last token (b, d)."""
    batch, time = chunk.tokens.shape
    real = jnp.arange(time) < chunk.count[:, None]
    own = dataclasses.replace(cache, rows=chunk.rows, view=view)
    if run.by_length:
        lengths = jnp.broadcast_to(chunk.length[:, None], (batch, time))
        own = dataclasses.replace(own, lengths=lengths)
    hidden, seen = run.hidden(
        chunk.tokens,
        positions=chunk.start[:, None] + jnp.arange(time),
        segment_ids=real.astype(jnp.int32),
        cache=own,
    )
    cache = cache.with_content(seen)
    ends = jnp.maximum(chunk.count - 1, 0)[:, None, None]
    return cache, hidden, jnp.take_along_axis(hidden, ends, axis=1)[:, 0]


def _score(run: _Forward, hidden: jax.Array, targets: jax.Array) -> LogProbs:
    """Return log-probabilities (b, t, ..) of `targets` (b, t), the tokens after each."""
    batch, time = targets.shape

    def measure(pair: tuple[jax.Array, jax.Array]) -> LogProbs:
        return log_probs(run.logits(pair[0]), pair[1])

    # A few tokens at a time: the logits of a chunk would be its largest array by far.
    parts = (hidden.reshape(-1, _SCORED, hidden.shape[-1]), targets.reshape(-1, _SCORED))
    found = jax.lax.map(measure, parts)
    return jax.tree.map(lambda x: x.reshape(batch, time, *x.shape[2:]), found)


def _first(
    run: _Forward, rows: Rows, chosen: Any, allowed: Any, hidden: jax.Array, length: Any, limit: Any
) -> tuple[Rows, Made]:
    """Give rows `chosen` (b,) their next token, one whose bit in `allowed` (b, words) is 1, and let
    them run up to `limit` (b,) tokens of the answer. Their texts have `length` (b,) tokens and end
    in the state `hidden` (b, d).
    """
    own = jax.tree.map(lambda x: x[chosen], rows)
    own = dataclasses.replace(own, length=jnp.asarray(length), limit=jnp.asarray(limit))
    all_ = jnp.ones_like(own.running)
    token, report = _pick(run.logits(hidden), own, all_, allowed)
    new = _advanced(own, token, all_)
    rows = jax.tree.map(lambda x, y: x.at[chosen].set(y), rows, new)
    return rows, Made(token[None], jax.tree.map(lambda x: x[None], report))


def _decode(
    run: _Forward, cache: Cache, rows: Rows, chosen: Any, turn: Turn, view: int
) -> tuple[Cache, Rows, Made]:
    """Give the rows that run their next tokens. The batch is all rows, or those `chosen` (b,)."""
    own = rows if chosen is None else jax.tree.map(lambda x: x[chosen], rows)
    started = own.running
    batch = len(started)
    _, like = jax.eval_shape(
        lambda hidden: _pick(run.logits(hidden), own, started, turn.allowed),
        jax.ShapeDtypeStruct((batch, run.module.config.hidden_size), jnp.float32),
    )
    empty = jax.tree.map(lambda x: jnp.zeros((MOST_STEPS, *x.shape), x.dtype), like)
    made = Made(jnp.full((MOST_STEPS, batch), -1, jnp.int32), empty)

    def next_tokens(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, cache, own, made = state
        hidden, cache = run.hidden(
            own.token[:, None],
            positions=own.length[:, None],
            segment_ids=own.running.astype(jnp.int32)[:, None],
            cache=cache,
        )
        token, report = _pick(run.logits(hidden[:, 0]), own, own.running, turn.allowed)
        tokens = made.tokens.at[step].set(jnp.where(own.running, token, -1))
        reports = jax.tree.map(lambda x, new: x.at[step].set(new), made.log_probs, report)
        own = dataclasses.replace(own, length=own.length + own.running)
        return step + 1, cache, _advanced(own, token, own.running), Made(tokens, reports)

    def goes_on(state: tuple[Any, ...]) -> jax.Array:
        step, _, own, _ = state
        some_paused = (started & ~own.running).any()
        return (step < turn.limit) & own.running.any() & ~(turn.hurry & some_paused)

    seen = dataclasses.replace(cache, rows=chosen, view=view)
    _, seen, own, made = jax.lax.while_loop(goes_on, next_tokens, (jnp.int32(0), seen, own, made))
    cache = cache.with_content(seen)
    if chosen is not None:
        own = jax.tree.map(lambda all_, x: all_.at[chosen].set(x), rows, own)
    return cache, own, made


def _pick(logits: jax.Array, own: Rows, now: jax.Array, allowed: Any) -> tuple[jax.Array, LogProbs]:
    """Return the next token (b,) of each row, and its log-probabilities if a row of `now` wants
    them.
    """
    token = choose(keep_allowed(logits, allowed), own.sampling, own.made, own.seen)
    return token, log_probs_if(own.reports & now, logits, token)


def _advanced(own: Rows, token: jax.Array, now: jax.Array) -> Rows:
    """Return rows after the next `token` (b,) of those of `now` (b,)."""
    stops = (token[:, None] == own.sampling.stops).any(axis=-1)
    made = own.made + now
    return dataclasses.replace(
        own,
        token=jnp.where(now, token, own.token),
        made=made,
        running=jnp.where(now, ~stops & (made < own.limit), own.running),
        seen=count_tokens(own.seen, token, now),
    )
