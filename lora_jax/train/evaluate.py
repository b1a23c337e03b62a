"""Held-out loss, and exact match of greedy generation."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lora_jax import adapters as methods
from lora_jax import data
from lora_jax.config import Config
from lora_jax.models.common import Model
from lora_jax.sharding import place_batch
from lora_jax.train.setup import DataSet

Answers = Sequence[Mapping[str, str]]  # prompt, expected, answer


def mean_loss(
    eval_step: Callable, adapters: Any, params: Any, batches: Iterable[dict], mesh: Mesh
) -> float:
    """Nats per supervised token over all batches (every token counts the same, whatever batch it is in)."""
    total, weight = 0.0, 0.0
    for batch in batches:
        nll, weights = eval_step(adapters, params, place_batch(batch, mesh))
        total += float(nll)
        weight += float(weights)
    return total / weight


def same_answer(output: str, expected: str) -> bool:
    """Equal parsed JSON where the expected answer is a JSON object or list, equal text (outer spaces aside) elsewhere.

    An output that is no JSON is a miss; key order and spacing do not count.
    """
    try:
        wanted = json.loads(expected)
    except ValueError:
        wanted = None
    if not isinstance(wanted, dict | list):
        return output.strip() == expected.strip()
    try:
        return json.loads(output) == wanted
    except (ValueError, RecursionError):
        return False


def generate_all(
    generate: Callable[..., list[list[int]]],
    bound: Any,
    prompts: Sequence[np.ndarray],
    batch_size: int,
    **options: Any,
) -> list[list[int]]:
    """Answers to all prompts, in their order. Prompts of like length share a batch; the last batch is filled up."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        rows = [prompts[i].tolist() for i in chosen] + [[]] * (batch_size - len(chosen))
        answers |= dict(zip(chosen, generate(bound, rows, **options), strict=False))
    return [answers[i] for i in range(len(prompts))]


@dataclass(frozen=True)
class Judge:
    """Everything that scoring needs but the adapters."""

    config: Config
    model: Model
    tokenizer: Any
    stop_tokens: frozenset[int]
    sets: dict[str, DataSet | None]  # task, regression
    mesh: Mesh
    eval_step: Callable
    generate: Callable

    def losses(self, adapters: Any) -> dict[str, float]:
        """Nats per supervised token on each held-out set."""
        size, length = self.config.eval.batch_size, self.config.data.max_length
        return {
            name: mean_loss(
                self.eval_step,
                adapters,
                self.model.params,
                data.eval_batches(held_out.examples, size, length),
                self.mesh,
            )
            for name, held_out in self.sets.items()
            if held_out
        }

    def answers(self, adapters: Any) -> list[dict[str, str]]:
        """Greedy answers to the prompts of the task: prompt, expected, answer."""
        task, config = self.sets["task"], self.config
        if task is None or not config.eval.generate:
            return []
        rows = task.rows[: config.eval.generate_examples]
        options = {"system_prompt": task.system_prompt, "chat_template": config.data.chat_template}
        prompts = [data.prompt_tokens(row, self.tokenizer, **options) for row in rows]
        bound = methods.bind(self.model.params, adapters, config.adapter)
        limits = {"max_new_tokens": config.eval.max_new_tokens, "stop_tokens": self.stop_tokens}
        answers = generate_all(self.generate, bound, prompts, config.eval.batch_size, **limits)
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [
            {
                "prompt": str(row.prompt[-1].get("content") or ""),
                "expected": data.reference(row),
                "answer": text,
            }
            for row, text in zip(rows, texts, strict=True)
        ]


def exact_match(answers: Answers) -> float:
    """The share of answers that are right."""
    return sum(same_answer(row["answer"], row["expected"]) for row in answers) / len(answers)


def describe_scores(losses: Mapping[str, float], answers: Answers) -> str:
    parts = [f"{name} loss {loss:.4f}" for name, loss in losses.items()]
    return (
        ", ".join(parts + [f"exact match {exact_match(answers):.3f}"] * bool(answers))
        or "nothing held out"
    )


def score_pair(
    name: str,
    before: Mapping[str, float],
    after: Mapping[str, float],
    answers_before: Answers = (),
    answers_after: Answers = (),
) -> dict[str, Any] | None:
    """The summary's entry for a held-out set, None if there is none."""
    if name not in before:
        return None
    scores: dict[str, Any] = {"loss_before": before[name], "loss_after": after[name]}
    if answers_before:
        scores["exact_match_before"] = exact_match(answers_before)
        scores["exact_match_after"] = exact_match(answers_after)
        scores["examples"] = len(answers_after)
    return scores
