"""Answers to one request of a client: its jobs in the engine, and their texts piece by piece.

A request has a prompt or several, and `n` choices for each; every choice is a job. Its events
become pieces of text: what a stop string may still cut off, and a character of which bytes are
missing, is held back.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lora_jax.errors import UserError
from lora_jax.generate import Event, Request
from lora_jax.generate.log_probs import LogProbs
from lora_jax.generate.requests import Grammar
from lora_jax.generate.text import TextStream
from lora_jax.serve.driver import Driver, Job
from lora_jax.serve.leases import Lease
from lora_jax.serve.protocol import Sampled, as_refusal
from lora_jax.serve.texts import Texts

_SEEDS = 2**32


@dataclass(frozen=True)
class Asked:
    """A client's request, as tokens."""

    request: Sampled
    prompts: Sequence[Sequence[int]]
    texts: Texts
    max_tokens: int
    log_probs: int | None = None  # alternatives of each token of the answer
    prompt_log_probs: int | None = None
    prompt_texts: Sequence[str] | None = None  # echoed before the answers
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Scored:
    """Log-probability of a token, and those of alternatives in falling order."""

    token: int
    value: float
    top: Sequence[tuple[int, float]]


@dataclass
class Piece:
    """A part of a choice. The last one has a finish_reason."""

    index: int
    text: str
    tokens: list[int]  # a stop token too
    scores: list[Scored] | None = None  # of `tokens`
    prompt_scores: list[Scored | None] | None = None  # once: of the whole prompt
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class _Choice:
    """State of a choice."""

    index: int
    prompt: Sequence[int]
    stream: TextStream
    prompt_scores: list[Scored | None] = field(default_factory=list)
    gave_prompt: bool = False
    ended: bool = False


class Answers:
    """The choices of a request. `submit` queues their jobs; iterate over `pieces` then, and call
    `close` in any case.

    Args:
        driver: where the jobs run.
        leases: one per choice; they are released as the jobs end.
        asked: the request.
    """

    def __init__(self, driver: Driver, leases: Sequence[Lease], asked: Asked):
        self._driver, self._asked = driver, asked
        self._queue: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()
        self._jobs: list[Job] = []
        self._choices: list[_Choice] = []
        self._leases = leases

    def submit(self) -> None:
        """Queue all jobs, or none.

        Raises:
            ApiError: 400 for settings that the engine refuses. As `Driver.submit`.
        """
        asked, request = self._asked, self._asked.request
        seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed % _SEEDS
        try:
            for index in range(len(asked.prompts) * request.n):
                prompt = asked.prompts[index // request.n]
                self._choices.append(_Choice(index, prompt, self._stream(prompt)))
                made = self._engine_request(prompt, seed, index % request.n)
                self._submit(index, made)
        except BaseException as error:
            self.close()
            is_mistake = type(error) is UserError
            raise (as_refusal(error) if is_mistake else error) from error

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield pieces until all choices have ended.

        Raises:
            Exception: whatever ended a job.
        """
        left = len(self._choices)
        while left:
            index, event = await self._queue.get()
            choice = self._choices[index]
            if choice.ended:
                continue
            if isinstance(event, BaseException):
                raise event
            piece = self._piece(choice, event)
            if piece.finish_reason is not None:
                choice.ended = True
                left -= 1
            yield piece

    def close(self) -> None:
        """Cancel the jobs that have not ended, and release all leases."""
        for job in self._jobs:
            self._driver.cancel(job)
        for lease in self._leases[len(self._jobs) :]:
            lease.release()

    def _stream(self, prompt: Sequence[int]) -> TextStream:
        request, asked = self._asked.request, self._asked
        return TextStream(
            asked.texts.tokenizer,
            prompt,
            stop=request.stop,
            include_stop=request.include_stop_str_in_output,
            skip_special_tokens=request.skip_special_tokens,
        )

    def _engine_request(self, prompt: Sequence[int], seed: int, number: int) -> Request:
        request, asked = self._asked.request, self._asked
        stops = {*request.stop_token_ids, *(() if request.ignore_eos else asked.texts.stops)}
        return Request(
            prompt,
            asked.max_tokens,
            sorted(stops),
            request.sampling(seed),
            number=number,
            log_probs=asked.log_probs,
            prompt_log_probs=asked.prompt_log_probs,
            grammar=asked.grammar,
        )

    def _submit(self, index: int, request: Request) -> None:
        loop, queue = asyncio.get_running_loop(), self._queue

        def on_event(event: Event | BaseException) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (index, event))

        lease = self._leases[index]
        job = Job(replace(request, adapter=lease.adapter), lease, on_event)
        self._driver.submit(job)
        self._jobs.append(job)

    def _piece(self, choice: _Choice, event: Event) -> Piece:
        """Return what an event adds to a choice; end its job at a stop string."""
        stream, before = choice.stream, choice.stream.tokens
        text = stream.add(event.tokens)
        tokens = event.tokens[: stream.tokens - before]
        scores = _scores(event.tokens, event.log_probs)
        reason, stop = event.finish_reason, None
        if stream.stopped_by is not None:
            reason, stop = "stop", stream.stopped_by
            self._driver.cancel(self._jobs[choice.index])
        elif reason is not None:
            text += stream.end()
            if event.stop_token is not None:
                tokens = [*tokens, event.stop_token]
                of_stop = _scores([event.stop_token], event.stop_log_probs)
                scores = None if scores is None else [*scores, *(of_stop or [])]
                if event.stop_token in self._asked.request.stop_token_ids:
                    stop = event.stop_token
            if stream.stopped_by is not None:
                reason, stop = "stop", stream.stopped_by
        scores = None if scores is None else scores[: len(tokens)]
        return Piece(
            choice.index, text, tokens, scores, self._of_prompt(choice, event), reason, stop
        )

    def _of_prompt(self, choice: _Choice, event: Event) -> list[Scored | None] | None:
        """Collect the scores of a prompt, which come in parts; return them once they are whole."""
        if self._asked.prompt_log_probs is None or choice.gave_prompt:
            return None
        kept, prompt = choice.prompt_scores, choice.prompt
        if event.prompt_log_probs is not None:
            start = len(kept) + 1
            count = len(event.prompt_log_probs.own)
            kept += _scores(prompt[start : start + count], event.prompt_log_probs) or []
        if len(kept) < len(prompt) - 1:
            return None
        choice.gave_prompt = True
        return [None, *kept]


def _scores(tokens: Sequence[int], found: LogProbs | None) -> list[Any] | None:
    if found is None:
        return None
    own = np.asarray(found.own).tolist()
    ids, values = np.asarray(found.top_ids).tolist(), np.asarray(found.top_values).tolist()
    return [
        Scored(token, own[i], list(zip(ids[i], values[i], strict=True)))
        for i, token in enumerate(tokens)
    ]
