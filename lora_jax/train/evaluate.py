"""Held-out loss, and exact match of greedy generation."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax import adapters as methods
from lora_jax import data, formats
from lora_jax.config import Config
from lora_jax.generate import make_generate
from lora_jax.models.common import Model
from lora_jax.sharding import place_batch
from lora_jax.train.setup import DataSet
from lora_jax.train.step import make_eval_step

Answers = Sequence[Mapping[str, str]]  # prompt, expected, answer


def mean_loss(
    eval_step: Callable, adapters: Any, params: Any, batches: Iterable[dict], mesh: Mesh
) -> float:
    """Nats per supervised token over all batches (every token counts the same, whatever batch it is
    in).
    """
    total, weight = 0.0, 0.0
    for batch in batches:
        nll, weights = eval_step(adapters, params, place_batch(batch, mesh))
        total += float(nll)
        weight += float(weights)
    return total / weight


def same_answer(output: str, expected: str) -> bool:
    """Equal parsed JSON where the expected answer is a JSON object or list, equal text (outer
    spaces aside) elsewhere.

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
    """Answers to all prompts, in their order. Prompts of like length share a batch; the last batch
    is filled up.
    """
    batch_size = min(batch_size, len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        rows = [prompts[i].tolist() for i in chosen] + [[]] * (batch_size - len(chosen))
        answers |= dict(zip(chosen, generate(bound, rows, **options), strict=False))
    return [answers[i] for i in range(len(prompts))]


@dataclass(frozen=True)
class Scores:
    """What a set of adapters reaches on the held-out data."""

    losses: dict[str, float]  # nats per supervised token: task, regression
    answers: Answers  # to the prompts of the task; empty if none are generated

    def describe(self) -> str:
        parts = [f"{name} loss {loss:.4f}" for name, loss in self.losses.items()]
        if self.answers:
            parts.append(f"exact match {exact_match(self.answers):.3f}")
        return ", ".join(parts) or "nothing held out"


@dataclass(frozen=True)
class Judge:
    """Everything that scoring needs but the adapters."""

    config: Config
    model: Model
    tokenizer: Any
    stop_tokens: frozenset[int]
    held_out: dict[str, DataSet]  # task, regression: those that the config names
    mesh: Mesh
    eval_step: Callable
    generate: Callable

    def score(self, adapters: Any) -> Scores:
        """Losses and answers."""
        return Scores(self.losses(adapters), self.answers(adapters))

    def losses(self, adapters: Any) -> dict[str, float]:
        """Nats per supervised token on each held-out set."""
        size, length = self.config.eval.batch_size, self.config.data.max_length
        found = {}
        for name, held_out in self.held_out.items():
            batches = data.eval_batches(held_out.examples, size, length)
            params = self.model.params
            found[name] = mean_loss(self.eval_step, adapters, params, batches, self.mesh)
        return found

    def answers(self, adapters: Any) -> Answers:
        """Greedy answers to the prompts of the task."""
        config = self.config
        if "task" not in self.held_out or not config.eval.generate:
            return []
        task = self.held_out["task"]
        rows = task.rows[: config.eval.generate_examples]
        template = {"system_prompt": task.system_prompt, "chat_template": config.data.chat_template}
        prompts = [data.prompt_tokens(row, self.tokenizer, **template) for row in rows]
        answers = generate_all(
            self.generate,
            methods.bind(self.model.params, adapters, config.adapter),
            prompts,
            config.eval.generate_batch_size,
            max_new_tokens=config.eval.max_new_tokens,
            stop_tokens=self.stop_tokens,
        )
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


def make_judge(
    config: Config,
    model: Model,
    tokenizer: Any,
    held_out: dict[str, DataSet],
    mesh: Mesh,
) -> Judge:
    """A `Judge` with its compiled functions over the held-out data."""
    stops = formats.stop_tokens(model.directory)
    return Judge(
        config=config,
        model=model,
        tokenizer=tokenizer,
        stop_tokens=data.stop_tokens(tokenizer, config.data.chat_template, stops),
        held_out=held_out,
        mesh=mesh,
        eval_step=make_eval_step(model, config),
        generate=make_generate(model, jnp.dtype(config.train.compute_dtype)),
    )


def score_pair(name: str, before: Scores, after: Scores) -> dict[str, Any] | None:
    """The summary's entry for a held-out set, None if there is none."""
    if name not in before.losses:
        return None
    pair: dict[str, Any] = {"loss_before": before.losses[name], "loss_after": after.losses[name]}
    if name == "task" and before.answers:
        pair["exact_match_before"] = exact_match(before.answers)
        pair["exact_match_after"] = exact_match(after.answers)
        pair["examples"] = len(after.answers)
    return pair
