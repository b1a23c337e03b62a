"""Continuous batching over one base and many adapters, without HTTP.

engine = Engine(model, rows=8, max_length=1024, max_loras=4, max_lora_rank=16)
engine.publish("a", adapters, config)                     # a tree from a run or a file
answers = engine.answer([Request(prompt, 64, adapter="a"), Request(prompt, 64)])

The engine is a driver of three compiled programs (`decode`). Each step admits waiting requests to
free rows, reads chunks of their prompts, and gives the running rows their next tokens.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import bank as banks
from lora_jax.config import AdapterConfig
from lora_jax.errors import UserError
from lora_jax.generate.decode import MOST_STEPS, Admission, Chunk, Made, empty_rows, make_programs
from lora_jax.generate.log_probs import LogProbs
from lora_jax.generate.requests import Completion, Event, Request, check_request, join
from lora_jax.generate.sampling import prompt_mask, row_of
from lora_jax.generate.versions import Version, Versions
from lora_jax.models.common import Model
from lora_jax.nn.cache import Cache
from lora_jax.nn.rope import next_change
from lora_jax.nn.virtual import Virtual, first_position, placeholders
from lora_jax.sharding import BATCH, constrain, gather_to_host, mesh_of
from lora_jax.targets import Trainable
from lora_jax.weights import Layered, separate

_CHUNKS = (16, 64, 256)  # tokens of a prompt that are read at once
_PREFILL = 512  # tokens of prompts per step, while other rows wait for their next token
_FIRST_VIEW = 128  # slots; views grow by a factor of 4


@dataclass
class _Running:
    """A request in a row."""

    id: int
    request: Request
    versions: list[Version]
    row: int
    text: list[int]  # placeholders, prompt and answer
    start: int  # of the answer in it
    read: int = 0  # tokens that the cache has
    limit: int = 0  # tokens of the answer after which the row pauses
    decoding: bool = False


class Engine:
    """Answers requests in the rows of one batch; see `lora_jax.generate.engine`.

    Args:
        model: the model; `for_decoding(model)` is faster where memory allows.
        rows: texts at once.
        max_length: most tokens of a prompt with its answer.
        max_loras: adapters in the bank at once; more may be published.
        max_lora_rank: largest rank of an adapter.
        max_terms: most adapters in a weighted sum.
        modules: modules that adapters may adapt, as `lora.bank` takes them.
        dtype: of activations and of the cache.

    Example:
        >>> from lora_jax.generate import Engine, Request
        >>> engine = Engine(model, rows=2, max_length=32)
        >>> answers = engine.answer([Request([1, 2, 3], max_new_tokens=4)])
        >>> len(answers[0].tokens), answers[0].finish_reason
        (4, 'length')
    """

    def __init__(
        self,
        model: Model,
        *,
        rows: int = 8,
        max_length: int = 1024,
        max_loras: int = 0,
        max_lora_rank: int = 16,
        max_terms: int = 2,
        modules: Any = "all-linear",
        dtype: Any = jnp.float32,
    ):
        sizes = {"rows": rows, "max_length": max_length, "max_terms": max_terms}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        self.model, self.max_length = model, max_length
        self._params: Mapping = model.params
        self._prefix: Virtual | None = None
        self._terms, self._vocab = max_terms, model.config.vocab_size
        self._batches, self._views = _batch_sizes(rows), _views(max_length)
        self._allocate = _allocator(model, rows, max_length, max_terms, dtype)
        self._programs = make_programs(model, dtype, _place)
        self._mesh = mesh_of(model.params)
        bank = None
        if max_loras:
            with self._on_mesh():
                bank = banks.bank(
                    model.params, slots=max_loras + 1, rank=max_lora_rank, modules=modules
                )
        self._versions = Versions(bank)
        self._idle = self._admission(Request([0], 0), [])
        self._state: tuple[Cache, Any] | None = None
        self._waiting: deque[tuple[int, Request, list[Version]]] = deque()
        self._rows: dict[int, _Running] = {}
        self._count = 0

    @property
    def compiled_programs(self) -> int:
        """Number of programs compiled so far."""
        return sum(self._programs.compiled.values())

    @property
    def adapters(self) -> dict[str, str]:
        """Names and identities of the published adapters."""
        names = self._versions.names
        return {name: self._versions.find(name).identity for name in names}

    def publish(
        self, name: str, adapters: Mapping[str, Any], config: AdapterConfig | Trainable
    ) -> str:
        """Publish a copy of adapters under a name and return their identity. Requests submitted
        from now on use it; those submitted before keep the version that they have.

        Raises:
            UserError: an engine without slots; adapters that do not fit the bank.
        """
        with self._on_mesh():
            return self._versions.publish(name, adapters, config).identity

    def withdraw(self, name: str) -> None:
        """Forget a published name; its requests are still answered.

        Raises:
            UserError: a name that is not published.
        """
        self._versions.withdraw(name)

    def use(self, params: Mapping, prefix: Virtual | None = None) -> None:
        """Answer with other parameters of the model, such as bound ones, and with virtual tokens
        before each prompt. Nothing is compiled anew if the trees have the same shapes.
        """
        assert not self.busy, "requests are running"
        self._params, self._prefix = params, prefix

    def release(self) -> None:
        """Free the memory of cache and rows until the next request."""
        assert not self.busy, "requests are running"
        self._state = None

    @property
    def busy(self) -> bool:
        """True while requests wait or run."""
        return bool(self._waiting or self._rows)

    def submit(self, request: Request) -> int:
        """Queue a request and return its ID, which is in its events.

        Raises:
            UserError: a prompt that is empty, has tokens outside of the vocabulary, or is too long
                with its answer; an adapter that is not published; settings out of range.
        """
        check_request(self.model, request, self.max_length, self._prefix)
        row_of(request.sampling, request.number, request.stop_tokens, self._vocab)
        versions = [self._versions.find(name) for name in _terms(request)]
        if len(versions) > self._terms:
            raise UserError(
                f"{len(versions)} adapters in one request are more than max_terms={self._terms}"
            )
        if len(versions) > 1 and self._versions.bank is not None:
            banks.check_sum([version.config for version in versions])
        self._count += 1
        self._waiting.append((self._count, request, versions))
        return self._count

    def cancel(self, id: int) -> None:
        """End a request; what it has answered is kept, and no event follows. An ID that has ended
        is left alone.
        """
        self._waiting = deque(entry for entry in self._waiting if entry[0] != id)
        for own in list(self._rows.values()):
            if own.id == id:
                self._stop(own)

    def step(self) -> list[Event]:
        """Admit requests, read chunks of prompts, decode; return what came of it. A request has at
        most one event per step.
        """
        with self._on_mesh():
            self._admit()
            events = self._read_prompts()
            done = self._decode_rows()
        merged: dict[int, Event] = {}
        for event in [*events, *done]:
            known = merged.get(event.id)
            merged[event.id] = event if known is None else _joined(known, event)
        return list(merged.values())

    def run(self) -> Iterator[Event]:
        """Yield the events of all requests until none waits or runs."""
        while self.busy:
            yield from self.step()

    def answer(
        self,
        requests: Sequence[Request],
        done: Callable[[int, Completion], None] = lambda index, completion: None,
    ) -> list[Completion]:
        """Return the completions of requests, in their order; `done(index, completion)` is called
        as each one ends. An exception in it ends all of them.

        Raises:
            UserError: as `submit`, before any request is answered.
        """
        ids: dict[int, int] = {}
        try:
            for index, request in enumerate(requests):
                ids[self.submit(request)] = index
            found = [Completion() for _ in requests]
            for event in self.run():
                if event.id not in ids:
                    continue
                index = ids[event.id]
                found[index].add(event)
                if event.finish_reason is not None:
                    done(index, found[index])
        except BaseException:
            for id in ids:
                self.cancel(id)
            raise
        return found

    def warm_up(self) -> int:
        """Compile all programs that requests may need; return how many there are."""
        assert not self.busy, "requests are running"
        with self._on_mesh():
            self._write_row(0, self._idle)
            for time in _CHUNKS:
                for view in sorted({self._prefill_view(start, time) for start in (0, 1)}):
                    self._run_prefill(_no_tokens(time), view)
            for size in self._batches:
                for view in self._views:
                    self._run_decode(list(range(size)), view, 0, False)
        return self.compiled_programs

    # Admission.

    def _admit(self) -> None:
        free = [row for row in range(self._batches[-1]) if row not in self._rows]
        while self._waiting and free:
            id, request, versions = self._waiting[0]
            slots = self._versions.acquire(versions) if versions else []
            if slots is None:
                return  # in order: a request that waits for a slot is not overtaken
            self._waiting.popleft()
            places = placeholders(self._prefix)
            text = [0] * places + [int(token) for token in request.prompt]
            own = _Running(id, request, versions, free.pop(0), text, len(text))
            self._rows[own.row] = own
            self._write_row(own.row, self._admission(request, slots))

    def _admission(self, request: Request, slots: Sequence[int]) -> Admission:
        weights = list(_terms(request).values())
        return Admission(
            reports=np.bool_(request.log_probs is not None),
            slot_ids=_filled(slots, self._terms, np.int32),
            slot_weights=_filled(weights, self._terms, np.float32),
            sampling=row_of(request.sampling, request.number, request.stop_tokens, self._vocab),
            in_prompt=prompt_mask(request.prompt, self._vocab),
        )

    def _stop(self, own: _Running) -> None:
        """Free the row of a request, and stop it on the device if it runs."""
        self._free(own)
        if own.decoding:
            with self._on_mesh():
                self._write_row(own.row, self._idle)

    def _free(self, own: _Running) -> None:
        del self._rows[own.row]
        self._versions.release(own.versions)

    # Prompts.

    def _read_prompts(self) -> list[Event]:
        """Read chunks of texts, up to a number of tokens; return the first tokens of answers."""
        running = any(own.decoding for own in self._rows.values())
        budget, results = _PREFILL if running else 4 * _PREFILL, []
        for own in list(self._rows.values()):
            while not own.decoding and budget > 0:
                piece = self._next_piece(own)
                view = self._prefill_view(own.read, piece.tokens.shape[1])
                results.append((own, piece, *self._run_prefill(piece, view)))
                own.read += int(piece.count[0])
                budget -= piece.tokens.shape[1]
                own.decoding = own.read == len(own.text)
        return [event for result in results for event in self._after_piece(*result)]

    def _next_piece(self, own: _Running) -> Chunk:
        """Return the next chunk of a text. Its size depends on the text alone, and so do its bits."""
        left, total = len(own.text) - own.read, len(own.text)
        time = _chunk_size(left)
        count = min(left, time)
        answered = total - own.start
        own.limit = own.request.max_new_tokens
        if (change := self._next_change(total)) is not None:
            own.limit = min(own.limit, change - own.start)
        wanted = own.request.prompt_log_probs is not None and not answered
        return Chunk(
            rows=np.array([own.row], np.int32),
            tokens=_filled(own.text[own.read : own.read + count], time, np.int32)[None],
            start=np.array([own.read], np.int32),
            count=np.array([count], np.int32),
            last=np.array([count == left and own.request.max_new_tokens > 0]),
            length=np.array([total], np.int32),
            limit=np.array([own.limit], np.int32),
            targets=_filled(own.text[own.read + 1 : own.read + 1 + time], time, np.int32)[None],
            reports=np.array([wanted]),
        )

    def _after_piece(
        self, own: _Running, piece: Chunk, made: Made, prompt: LogProbs
    ) -> Iterator[Event]:
        first, count = int(piece.start[0]), int(piece.count[0])
        found = None
        if piece.reports[0]:
            skipped = max(0, placeholders(self._prefix) - first)  # targets within the prompt
            stop = min(count, own.start - 1 - first)
            found = _trimmed(prompt, np.s_[0, skipped:stop], own.request.prompt_log_probs)
        if first + count == own.start and not own.request.max_new_tokens:
            self._free(own)
            yield Event(own.id, [], finish_reason="length", prompt_log_probs=found)
        elif piece.last[0]:
            yield self._after_tokens(own, made, 0, found)
        elif found is not None:
            yield Event(own.id, [], prompt_log_probs=found)

    def _next_change(self, length: int) -> int | None:
        """Return the next length of a text at which its cache has other rotary frequencies."""
        shift = first_position(self._prefix)
        ropes = getattr(self.model.config, "ropes_by_length", ())
        changes = [next_change(own, length + shift) for own in ropes]
        return min((change - shift for change in changes if change is not None), default=None)

    def _prefill_view(self, start: int, time: int) -> int:
        """Return the slots that a chunk looks at: its own if it is the first, else all."""
        return min(time, self.max_length) if start == 0 else self.max_length

    # Answers.

    def _decode_rows(self) -> list[Event]:
        running = [own for own in self._rows.values() if own.decoding]
        if not running:
            return []
        reading = len(running) < len(self._rows)
        steps = 1 if reading else MOST_STEPS
        longest = max(min(len(own.text) + steps, own.start + own.limit) for own in running)
        view = next(view for view in self._views if view >= min(longest, self.max_length))
        size = next(size for size in self._batches if size >= len(running))
        chosen = [own.row for own in running]
        chosen += [row for row in range(self._batches[-1]) if row not in chosen]
        made = self._run_decode(chosen[:size], view, steps, bool(self._waiting))
        where = {row: i for i, row in enumerate(chosen)}
        if size == self._batches[-1]:
            where = {row: row for row in chosen}
        return [self._after_tokens(own, made, where[own.row], None) for own in running]

    def _after_tokens(
        self, own: _Running, made: Made, column: int, prompt: LogProbs | None
    ) -> Event:
        """Return the event of the tokens that a row made in a call."""
        column_tokens = np.asarray(made.tokens)[:, column]
        tokens = column_tokens[column_tokens >= 0].tolist()
        own.text += tokens
        reason, stop = None, None
        if tokens and tokens[-1] in own.request.stop_tokens:
            reason, stop = "stop", tokens.pop()
        elif len(own.text) - own.start >= own.request.max_new_tokens:
            reason = "length"
        elif len(own.text) - own.start >= own.limit:
            own.read, own.decoding = 0, False  # the cache is computed anew
        found = None
        if own.request.log_probs is not None:
            found = _trimmed(made.log_probs, np.s_[: len(tokens), column], own.request.log_probs)
        if reason is not None:
            self._free(own)
        return Event(own.id, tokens, found, reason, stop, prompt)

    # Programs.

    @property
    def _arguments(self) -> tuple[Any, ...]:
        bank = self._versions.bank
        bank = None if bank is None else dataclasses.replace(bank, params={})  # they come first
        return self._params, bank, self._prefix

    def _write_row(self, row: int, own: Admission) -> None:
        cache, rows = self._allocated()
        self._state = cache, self._programs.admit(rows, np.int32(row), own)

    def _run_prefill(self, piece: Chunk, view: int) -> tuple[Made, LogProbs]:
        cache, rows, made, prompt = self._programs.prefill(
            *self._arguments, *self._allocated(), piece, view=view
        )
        self._state = cache, rows
        return made, prompt

    def _run_decode(self, chosen: list[int], view: int, steps: int, hurry: bool) -> Made:
        several = len(chosen) < self._batches[-1]
        cache, rows, made = self._programs.decode(
            *self._arguments,
            *self._allocated(),
            np.asarray(chosen, np.int32) if several else None,
            np.int32(steps),
            np.bool_(hurry),
            view=view,
        )
        self._state = cache, rows
        return jax.tree.map(gather_to_host, made)

    def _allocated(self) -> tuple[Cache, Any]:
        if self._state is None:
            self._state = self._allocate()
        return self._state

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def _allocator(
    model: Model, rows: int, slots: int, terms: int, dtype: Any
) -> Callable[[], tuple[Cache, Any]]:
    """Return a function that makes an empty cache and free rows."""

    @jax.jit
    def allocate() -> tuple[Cache, Any]:
        cache = model.empty_cache(rows, slots, dtype)
        return _place(cache), _place(empty_rows(rows, terms, model.config.vocab_size))

    return allocate


def for_decoding(model: Model) -> Model:
    """Return the model in the form that decodes fastest: each layer's weights in arrays of their
    own. The stacked weights of the argument are not needed any more; drop them, or the base is in
    memory twice.
    """
    return model.replace(params=separate(model.params))


def _place(tree: Any) -> Any:
    """Constrain the sharding of a cache, rows or results on the mesh: rows of the cache over data
    and fsdp, its heads over tensor; other arrays whole on each device.
    """
    if isinstance(tree, Cache):
        spec = (BATCH[0], "tensor", None, None)

        def of_layers(x: Any) -> Any:
            if isinstance(x, Layered):
                return Layered(tuple(constrain(layer, *spec) for layer in x.layers))
            return constrain(x, None, *spec)

        return dataclasses.replace(tree, keys=of_layers(tree.keys), values=of_layers(tree.values))
    return jax.tree.map(constrain, tree)


def _views(longest: int) -> list[int]:
    """Return the numbers of slots that decoding may look at.

    >>> _views(1000)
    [128, 512, 1000]
    """
    views = [_FIRST_VIEW]
    while views[-1] < longest:
        views.append(4 * views[-1])
    return [*(view for view in views if view < longest), longest]


def _batch_sizes(rows: int) -> list[int]:
    """Return the numbers of rows that decoding may compute.

    >>> _batch_sizes(8)
    [1, 4, 8]
    """
    sizes = [1]
    while sizes[-1] < rows:
        sizes.append(4 * sizes[-1])
    return [*(size for size in sizes if size < rows), rows]


def _chunk_size(left: int) -> int:
    """Return how many tokens to read next: a size that is at least half full, or the smallest.

    >>> [_chunk_size(left) for left in (3, 20, 40, 100, 130)]
    [16, 16, 64, 64, 256]
    """
    return next(size for size in reversed(_CHUNKS) if 2 * left >= size or size == _CHUNKS[0])


def _no_tokens(time: int) -> Chunk:
    """Return a chunk that changes nothing."""
    one, off = np.zeros(1, np.int32), np.zeros(1, bool)
    tokens = np.zeros((1, time), np.int32)
    return Chunk(one, tokens, one, one, off, one + 1, one, tokens, off)


def _terms(request: Request) -> Mapping[str, float]:
    """Return the weights of the adapters of a request, by name."""
    if request.adapter is None:
        return {}
    return {request.adapter: 1.0} if isinstance(request.adapter, str) else request.adapter


def _filled(values: Sequence[Any], length: int, dtype: Any) -> np.ndarray:
    return np.array([*values, *[0] * (length - len(values))], dtype)[:length]


def _trimmed(found: LogProbs, where: Any, top: int | None) -> LogProbs:
    """Return some of the log-probabilities, with `top` alternatives."""
    own, ids, values = (
        gather_to_host(x)[where] for x in (found.own, found.top_ids, found.top_values)
    )
    return LogProbs(own, ids[..., :top], values[..., :top])


def _joined(one: Event, other: Event) -> Event:
    """Return the events of one request in one step as one."""
    return Event(
        one.id,
        one.tokens + other.tokens,
        join(one.log_probs, other.log_probs),
        other.finish_reason,
        other.stop_token,
        one.prompt_log_probs,
    )
