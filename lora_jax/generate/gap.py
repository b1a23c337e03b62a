"""Distance between the log-probabilities of a trainer and of an engine."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.data.examples import Example
from lora_jax.data.loader import stack
from lora_jax.errors import UserError, counted
from lora_jax.generate.requests import Completion, Request
from lora_jax.models.common import Execution, Model
from lora_jax.nn.virtual import Virtual, placeholders
from lora_jax.objectives import Batch, Compute, run_model
from lora_jax.sharding import gather_to_host, mesh_of

_MULTIPLE = 64  # of the length of a batch: few programs for answers of many lengths


@dataclass(frozen=True)
class Gap:
    """Absolute differences of log-probabilities in nats, over the tokens of answers."""

    mean: float
    largest: float
    tokens: int


def make_log_prob_gap(model: Model, dtype: Any = jnp.float32) -> Callable[..., Gap]:
    """Make `gap(params, requests, completions, prefix=None)`, which compares the log-probabilities
    of answers with those of the forward that a train step runs, in its compute `dtype`.

    The two should differ by rounding: a larger gap says that the engine answered with other weights
    than these, or rounds in another way, and that a loss of its log-probabilities is biased. Row i
    of the batch is request i, so `params` may be bound to the slots of a bank: `bank.bind(params,
    slot_ids)` with the slots of each request. `prefix` is that of all requests (`lora.prefix`).

    Raises:
        UserError: when called: other numbers of requests and completions, or none; a completion
            without log-probabilities.

    Example:
        >>> from lora_jax.generate import Engine, Request, make_log_prob_gap
        >>> requests = [Request([1, 2, 3], max_new_tokens=4, log_probs=0)]
        >>> completions = Engine(model, rows=1, max_length=32).answer(requests)
        >>> gap = make_log_prob_gap(model)(model.params, requests, completions)
        >>> gap.tokens, gap.largest < 1e-4
        (4, True)
    """
    compute = Compute(Execution(dtype))

    @jax.jit
    def log_probs(params: Mapping, batch: Batch, prefix: Virtual | None) -> jax.Array:
        return run_model(model, params, batch, compute, prefix).log_probs()

    def gap(
        params: Mapping,
        requests: Sequence[Request],
        completions: Sequence[Completion],
        prefix: Virtual | None = None,
    ) -> Gap:
        _check(requests, completions)
        before = placeholders(prefix)
        starts = [before + len(request.prompt) for request in requests]
        mesh = mesh_of(params)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            found = log_probs(params, _batch(requests, completions, before), prefix)
        return _measure(gather_to_host(found), starts, completions)

    return gap


def _batch(
    requests: Sequence[Request], completions: Sequence[Completion], before: int
) -> dict[str, np.ndarray]:
    """Return a batch with a text per row, of which the answer is supervised."""
    examples = []
    for request, completion in zip(requests, completions, strict=True):
        tokens = np.array([*[0] * before, *request.prompt, *completion.tokens], np.int32)
        weights = np.arange(len(tokens)) >= len(tokens) - len(completion.tokens)
        examples.append(Example(tokens, weights.astype(np.float32), "answer"))
    longest = max(len(example.tokens) for example in examples)
    return stack([[example] for example in examples], -(-longest // _MULTIPLE) * _MULTIPLE)


def _measure(found: np.ndarray, starts: Sequence[int], completions: Sequence[Completion]) -> Gap:
    """Compare log-probabilities (b, t) with those of answers that begin at `starts`."""
    parts = [
        np.abs(row[start : start + len(one.tokens)] - np.asarray(one.log_probs.own))
        for row, start, one in zip(found, starts, completions, strict=True)
        if one.log_probs is not None
    ]
    every = np.concatenate(parts).astype(np.float64)
    if not every.size:
        return Gap(0.0, 0.0, 0)
    return Gap(float(every.mean()), float(every.max()), every.size)


def _check(requests: Sequence[Request], completions: Sequence[Completion]) -> None:
    if len(requests) != len(completions) or not requests:
        raise UserError(
            f"{counted(len(requests), 'request')} and {counted(len(completions), 'completion')}; "
            "give one or more, and the completion of each"
        )
    for number, completion in enumerate(completions):
        if completion.log_probs is None:
            raise UserError(
                f"completion {number} has no log-probabilities; submit its request with log_probs=0"
            )
