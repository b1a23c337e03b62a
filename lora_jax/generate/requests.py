"""Requests to an engine, and what it answers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lora_jax.errors import UserError
from lora_jax.generate.log_probs import TOP, LogProbs
from lora_jax.generate.sampling import Sampling
from lora_jax.models.common import Model
from lora_jax.nn.virtual import Virtual, first_position, placeholders
from lora_jax.sharding import gather_to_host


class Guide(Protocol):
    """The state of an answer in its grammar."""

    def allowed(self, vocab: int) -> np.ndarray | None:
        """Return the tokens that may come next, as the bits of uint32 (ceil(vocab / 32),): token t
        is bit t % 32 of number t // 32. None: the answer is complete.

        Raises:
            UserError: it cannot go on; the request ends with this error.
        """
        ...

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed."""
        ...


class Grammar(Protocol):
    """The texts that an answer may be."""

    def start(self, stops: Collection[int]) -> Guide:
        """Return the state of an answer that these tokens may end."""
        ...


@dataclass(frozen=True)
class Request:
    """A prompt to answer. Draws depend on the seed of `sampling` and on `number` only."""

    prompt: Sequence[int]
    max_new_tokens: int
    stop_tokens: Collection[int] = ()
    sampling: Sampling = Sampling()
    adapter: str | Mapping[str, float] | None = None  # its name, weights by name, or the base
    number: int = 0
    log_probs: int | None = None  # alternatives per token of the answer, 0 to 20; None: nothing
    prompt_log_probs: int | None = None  # the same for the prompt
    grammar: Grammar | None = None  # keeps the answer to some texts; None: any


@dataclass(frozen=True)
class Event:
    """New tokens of an answer. The last event of a request has a `finish_reason`."""

    id: int
    tokens: list[int]  # without the stop token
    log_probs: LogProbs | None = None  # of `tokens`, in NumPy arrays
    finish_reason: str | None = None  # stop | length | error
    stop_token: int | None = None
    prompt_log_probs: LogProbs | None = None  # of the prompt from its second token on, once
    stop_log_probs: LogProbs | None = None  # of the stop token
    error: UserError | None = None  # why the request ended, if its finish_reason is `error`


@dataclass
class Completion:
    """The answer to a request: what its events add up to."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_token: int | None = None
    log_probs: LogProbs | None = None
    prompt_log_probs: LogProbs | None = None
    stop_log_probs: LogProbs | None = None

    def add(self, event: Event) -> None:
        """Append the tokens of an event.

        Raises:
            UserError: the error of the event.
        """
        if event.error is not None:
            raise event.error
        self.tokens += event.tokens
        self.finish_reason, self.stop_token = event.finish_reason, event.stop_token
        self.log_probs = join(self.log_probs, event.log_probs)
        self.prompt_log_probs = join(self.prompt_log_probs, event.prompt_log_probs)
        self.stop_log_probs = join(self.stop_log_probs, event.stop_log_probs)


def joined(one: Event, other: Event) -> Event:
    """Return two events of one request as one."""
    return Event(
        one.id,
        one.tokens + other.tokens,
        join(one.log_probs, other.log_probs),
        other.finish_reason,
        other.stop_token,
        join(one.prompt_log_probs, other.prompt_log_probs),
        join(one.stop_log_probs, other.stop_log_probs),
        other.error,
    )


def join(one: LogProbs | None, other: LogProbs | None) -> LogProbs | None:
    """Return log-probabilities of the tokens of both."""
    if one is None or other is None:
        return other if one is None else one
    return LogProbs(
        np.concatenate([one.own, other.own]),
        np.concatenate([one.top_ids, other.top_ids]),
        np.concatenate([one.top_values, other.top_values]),
    )


def check_prompts(model: Model, prompts: Sequence[Sequence[int]]) -> None:
    """Check that prompts are lists of tokens of the model.

    Raises:
        UserError: a prompt that is empty or not a list of tokens; as `Model.check_tokens`.
    """
    for number, prompt in enumerate(prompts):
        _check_prompt(model, prompt, f"prompt {number}")


def _check_prompt(model: Model, prompt: Sequence[int], what: str) -> None:
    if np.ndim(prompt) != 1:
        raise UserError(f"{what} must be a list of tokens, not {prompt!r}")
    if not len(prompt):
        raise UserError(f"{what} is empty; begin it with a token, such as the tokenizer's BOS")
    model.check_tokens(prompt, what)


def check_room(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, prefix: Virtual | None
) -> None:
    """Check that prompts and answers fit the positions of the model.

    Raises:
        UserError: max_new_tokens below 1; more tokens of prompt and answer than learned positions.
    """
    longest, virtual = max(map(len, prompts), default=0), _virtual(prefix)
    _check_room(model, longest, max_new_tokens, virtual)


def _check_room(model: Model, longest: int, max_new_tokens: int, virtual: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
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


def check_request(
    model: Model, request: Request, max_length: int, places: int, virtual: int
) -> None:
    """Check a request against the model, and against the `max_length` of texts of an engine. Before
    its prompt are `virtual` tokens, of which `places` are in the text.

    Raises:
        UserError: as `check_prompts` and `check_room`; a text longer than `max_length`; numbers of
            alternatives out of range; nothing asked for.
    """
    for name in ("log_probs", "prompt_log_probs"):
        value = getattr(request, name)
        if value is not None and not (_is_count(value) and value <= TOP):
            raise UserError(f"{name}={value!r} must be an integer from 0 to {TOP}, or None")
    most = request.max_new_tokens
    if not _is_count(most):
        raise UserError(f"max_new_tokens={most!r} must be an integer, at least 1")
    _check_prompt(model, request.prompt, "the prompt")
    if most > 0 or request.prompt_log_probs is None:
        _check_room(model, len(request.prompt), most, virtual)
    if not all(map(_is_count, request.stop_tokens)):
        raise UserError(f"stop_tokens={request.stop_tokens!r} must be token ids")
    if places + len(request.prompt) + most > max_length:
        raise UserError(
            f"a prompt of {len(request.prompt)} tokens"
            + (f", {places} virtual ones" if places else "")
            + f" and max_new_tokens={most} are more than max_length={max_length} of the engine"
        )


def _is_count(value: Any) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(value >= 0)


def terms(request: Request) -> Mapping[str, float]:
    """Return the weights of the adapters of a request, by name."""
    if request.adapter is None:
        return {}
    return {request.adapter: 1.0} if isinstance(request.adapter, str) else request.adapter


def trimmed(found: LogProbs, where: Any, top: int | None) -> LogProbs:
    """Return some of the log-probabilities in NumPy arrays, with `top` alternatives."""
    parts = (found.own, found.top_ids, found.top_values)
    own, ids, values = (gather_to_host(x)[where] for x in parts)
    return LogProbs(own, ids[..., :top], values[..., :top])
