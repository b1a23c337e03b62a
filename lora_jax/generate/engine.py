"""Continuous batching over one base and many adapters, without HTTP.

bank = lora.bank(model.params, slots=5, rank=16)           # slot 0 is the base
engine = Engine(model, rows=8, max_length=1024, bank=bank)
engine.publish("a", adapters, config)                     # a tree from a run or a file
answers = engine.answer([Request(prompt, 64, adapter="a"), Request(prompt, 64)])

The engine is the driver of the compiled programs in `decode`. Each step admits waiting requests to
free rows, reads chunks of their prompts, and gives the running rows their next tokens.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Bank
from lora_jax.config import AdapterConfig
from lora_jax.errors import UserError
from lora_jax.generate.decode import MOST_STEPS, Admission, Chunk, Made
from lora_jax.generate.device import Device
from lora_jax.generate.log_probs import LogProbs
from lora_jax.generate.requests import (
    Completion,
    Event,
    Request,
    check_request,
    joined,
    terms,
    trimmed,
)
from lora_jax.generate.running import Running, filled
from lora_jax.generate.sampling import prompt_mask, row_of
from lora_jax.generate.versions import Version, Versions
from lora_jax.models.common import Model
from lora_jax.nn.virtual import Virtual, first_position, placeholders
from lora_jax.targets import Trainable

_PREFILL = 512  # tokens of prompts per step, while other rows wait for their next token


class Engine:
    """Answers requests in the rows of one batch; see `lora_jax.generate.engine`.

    Args:
        model: the model; `for_decoding(model)` is faster where memory allows.
        rows: texts at once.
        max_length: most tokens of a prompt with its answer.
        bank: slots for adapters, as `lora.bank(model.params, ..)` makes them. They are the engine's
            from now on. More adapters than slots may be published.
        max_terms: most adapters in a weighted sum.
        max_virtual_tokens: most virtual tokens of a published prompt or prefix.
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
        bank: Bank | None = None,
        max_terms: int = 1,
        max_virtual_tokens: int = 0,
        dtype: Any = jnp.float32,
    ):
        sizes = {"rows": rows, "max_length": max_length, "max_terms": max_terms}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        self.model, self.max_length = model, max_length
        self._terms, self._vocab = max_terms, model.config.vocab_size
        self._device = Device(model, rows, max_length, max_terms, dtype)
        self._versions = Versions(model, bank, max_virtual_tokens)
        self._idle = self._admission(Request([0], 0), [])
        self._waiting: deque[tuple[int, Request, list[Version]]] = deque()
        self._rows: dict[int, Running] = {}
        self._count = 0

    @property
    def compiled_programs(self) -> int:
        """Number of programs compiled so far."""
        return self._device.compiled

    @property
    def adapters(self) -> dict[str, str]:
        """Names and identities of the published adapters."""
        names = self._versions.names
        return {name: self._versions.find(name).identity for name in names}

    @property
    def resident(self) -> set[str]:
        """Names of the published adapters that are in a slot of the bank."""
        return self._versions.resident

    @property
    def free_rows(self) -> int:
        """Number of requests that may be submitted without having to wait for a row."""
        return self._device.batches[-1] - len(self._rows) - len(self._waiting)

    @property
    def cache_usage(self) -> float:
        """Share of the cache that holds texts, 0 to 1."""
        used = sum(len(own.text) for own in self._rows.values())
        return used / (self._device.batches[-1] * self.max_length)

    def publish(
        self,
        name: str,
        adapters: Mapping[str, Any],
        config: AdapterConfig | Trainable,
        identity: str | None = None,
    ) -> str:
        """Publish a copy of adapters under a name and return their identity. Requests submitted
        from now on use it; those submitted before keep the version that they have. An `identity`
        that is known already (`versions.identity`) is not computed again.

        Raises:
            UserError: an engine without slots; adapters that do not fit the bank.
        """
        with self._device.on_mesh():
            return self._versions.publish(name, adapters, config, identity).identity

    def withdraw(self, name: str) -> None:
        """Forget a published name; its requests are still answered.

        Raises:
            UserError: a name that is not published.
        """
        self._versions.withdraw(name)

    def use(self, params: Mapping, prefix: Virtual | None = None) -> None:
        """Answer with other parameters of the model, such as bound ones, and with virtual tokens
        before each prompt. Nothing is compiled anew if the trees have the same shapes.

        Raises:
            UserError: requests are running.
        """
        self._check_idle()
        self._device.use(params, prefix)

    def release(self) -> None:
        """Free the memory of cache and rows until the next request.

        Raises:
            UserError: requests are running.
        """
        self._check_idle()
        self._device.release()

    @property
    def busy(self) -> bool:
        """True while requests wait or run."""
        return bool(self._waiting or self._rows)

    def submit(self, request: Request) -> int:
        """Queue a request and return its ID, which is in its events.

        Raises:
            UserError: as `check`.
        """
        versions = self.check(request)
        self._count += 1
        self._waiting.append((self._count, request, versions))
        return self._count

    def check(self, request: Request) -> list[Version]:
        """Return the versions of the adapters that a request asks for, if it can be answered.

        Raises:
            UserError: a prompt that is empty, has tokens outside of the vocabulary, or is too long
                with its answer; an adapter that is not published; settings out of range.
        """
        versions = [self._versions.find(name) for name in terms(request)]
        if self._device.prefix is not None and any(version.virtual for version in versions):
            raise UserError("the engine has virtual tokens for all rows; an adapter has none then")
        prefix = self._device.prefix
        places = placeholders(prefix) + sum(version.places for version in versions)
        virtual = places + first_position(prefix)
        check_request(self.model, request, self.max_length, places, virtual)
        row_of(request.sampling, request.number, request.stop_tokens, self._vocab)
        self._versions.check_sum(terms(request), self._terms)
        return versions

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
        with self._device.on_mesh():
            self._admit()
            self._device.bank = self._versions.bank
            events = self._read_prompts()
            done = self._decode_rows()
        merged: dict[int, Event] = {}
        for event in [*events, *done]:
            known = merged.get(event.id)
            merged[event.id] = event if known is None else joined(known, event)
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
            UserError: as `submit`, before any request is answered; other requests are running.
        """
        self._check_idle()
        ids: dict[int, int] = {}
        try:
            for index, request in enumerate(requests):
                ids[self.submit(request)] = index
            found = [Completion() for _ in requests]
            for event in self.run():
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
        """Compile all programs that requests may need; return how many there are.

        Raises:
            UserError: requests are running.
        """
        self._check_idle()
        with self._device.on_mesh():
            self._versions.warm_up()
            self._device.bank = self._versions.bank
            self._device.warm_up(self._idle, self._versions.kinds())
        return self.compiled_programs

    def _check_idle(self) -> None:
        if self.busy:
            raise UserError("requests are running; take their events from run(), or cancel them")

    # Admission.

    def _admit(self) -> None:
        free = [row for row in range(self._device.batches[-1]) if row not in self._rows]
        while self._waiting and free:
            id, request, versions = self._waiting[0]
            slots = self._versions.acquire(versions) if versions else [0]
            if slots is None:
                return  # in order: a request that waits for a slot is not overtaken
            self._waiting.popleft()
            cached = sum(version.places for version in versions)
            places = placeholders(self._device.prefix) + cached
            text = [0] * places + [int(token) for token in request.prompt]
            own = Running(id, request, versions, free.pop(0), places, text, len(text), cached)
            if request.grammar is not None:
                own.guide = request.grammar.start(request.stop_tokens)
            self._rows[own.row] = own
            self._device.admit(own.row, self._admission(request, slots))
            for version in versions:
                if version.virtual is not None:
                    self._device.begin(own.row, version.virtual, version.places)

    def _admission(self, request: Request, slots: Sequence[int]) -> Admission:
        weights = list(terms(request).values())
        return Admission(
            reports=np.bool_(request.log_probs is not None),
            slot_ids=filled(slots, self._terms, np.int32),
            slot_weights=filled(weights, self._terms, np.float32),
            sampling=row_of(request.sampling, request.number, request.stop_tokens, self._vocab),
            in_prompt=prompt_mask(request.prompt, self._vocab),
        )

    def _stop(self, own: Running) -> None:
        """Free the row of a request, and stop it on the device if it runs."""
        self._free(own)
        if own.decoding:
            with self._device.on_mesh():
                self._device.admit(own.row, self._idle)

    def _free(self, own: Running) -> None:
        del self._rows[own.row]
        self._versions.release(own.versions)

    # Prompts.

    def _read_prompts(self) -> list[Event]:
        """Read chunks of texts, up to a number of tokens; return the first tokens of answers."""
        running = any(own.decoding for own in self._rows.values())
        budget, events = _PREFILL if running else 4 * _PREFILL, []
        for own in list(self._rows.values()):
            while not own.decoding and budget > 0:
                chunk = own.next_chunk()
                budget -= chunk.tokens.shape[1]
                hidden, last = self._device.prefill(chunk)
                events += self._after_chunk(own, chunk, hidden, last)
                if own.row not in self._rows:
                    break
        return events

    def _after_chunk(
        self, own: Running, chunk: Chunk, hidden: jax.Array, last: jax.Array
    ) -> Iterator[Event]:
        """Yield the log-probabilities of a chunk of a prompt, and the first token after it."""
        request, scored, start = own.request, None, own.read
        own.read += int(chunk.count[0])
        if request.prompt_log_probs is not None and len(own.text) == own.start:
            scored = self._scored(own, chunk, hidden, start)
        if own.read < len(own.text):
            if scored is not None:
                yield Event(own.id, [], prompt_log_probs=scored)
            return
        reason = None if request.max_new_tokens else "length"
        if reason is None and own.allowed is None:
            reason = own.advance((), self._vocab)
        if reason is not None:
            self._free(own)
            yield Event(own.id, [], None, reason, prompt_log_probs=scored, error=own.error)
        else:
            own.decoding, own.limit = True, request.max_new_tokens
            if (change := self._device.next_change(len(own.text))) is not None:
                own.limit = min(own.limit, change - own.start)
            made = self._device.first(own.row, last, len(own.text), own.limit, own.allowed)
            yield self._after_tokens(own, made, 0, scored)

    def _scored(self, own: Running, chunk: Chunk, hidden: jax.Array, start: int) -> LogProbs:
        time = chunk.tokens.shape[1]
        targets = filled(own.text[start + 1 : start + 1 + time], time, np.int32)[None]
        found = self._device.score(chunk, hidden, targets)
        # Targets are the second to the last token of the prompt, without placeholders.
        part = np.s_[0, max(0, own.places - start) : min(own.read, own.start - 1) - start]
        return trimmed(found, part, own.request.prompt_log_probs)

    # Answers.

    def _decode_rows(self) -> list[Event]:
        running = [own for own in self._rows.values() if own.decoding]
        if not running:
            return []
        allowed = {own.row: own.allowed for own in running if own.allowed is not None}
        # One at a time if others wait to be read, or if a grammar must be asked after each.
        steps = MOST_STEPS if len(running) == len(self._rows) and not allowed else 1
        longest = max(min(len(own.text) + steps, own.start + own.limit) for own in running)
        rows = [own.row for own in running]
        made, columns = self._device.decode(rows, longest, steps, bool(self._waiting), allowed)
        return [self._after_tokens(own, made, columns[own.row], None) for own in running]

    def _after_tokens(
        self, own: Running, made: Made, column: int, prompt: LogProbs | None
    ) -> Event:
        """Return the event of the tokens that a row made in a call."""
        column_tokens = np.asarray(made.tokens)[:, column]
        tokens = column_tokens[column_tokens >= 0].tolist()
        own.text += tokens
        reason, stop = None, None
        if tokens and tokens[-1] in own.request.stop_tokens:
            reason, stop = "stop", tokens.pop()
        elif (reason := own.advance(tokens, self._vocab)) is not None:
            self._device.admit(own.row, self._idle)  # it would go on
        elif len(own.text) - own.start >= own.request.max_new_tokens:
            reason = "length"
        elif len(own.text) - own.start >= own.limit:
            own.read, own.decoding = 0, False  # the cache is computed anew
        found, of_stop = None, None
        if (top := own.request.log_probs) is not None:
            found = trimmed(made.log_probs, np.s_[: len(tokens), column], top)
            if stop is not None:
                of_stop = trimmed(made.log_probs, np.s_[len(tokens) : len(tokens) + 1, column], top)
        if reason is not None:
            self._free(own)
        return Event(own.id, tokens, found, reason, stop, prompt, of_stop, own.error)
