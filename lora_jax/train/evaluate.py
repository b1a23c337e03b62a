"""Held-out losses, and answers by greedy generation with their scores."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax import adapters as methods
from lora_jax import data
from lora_jax.config import Config
from lora_jax.generate import make_generate
from lora_jax.models.common import Model
from lora_jax.sharding import place_batch, whole
from lora_jax.train import scores
from lora_jax.train.model import find_stops
from lora_jax.train.scores import Answer
from lora_jax.train.sets import DataSet
from lora_jax.train.step import make_classify, make_eval_step
from lora_jax.virtual import placeholders


def mean_loss(
    eval_step: Callable,
    adapters: Any,
    params: Any,
    batches: Iterable[dict],
    mesh: Mesh,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Nats per supervised token over all batches (every token counts the same, whatever batch it is
    in). `check` is called before each.
    """
    total, weight = 0.0, 0.0
    for batch in batches:
        check()
        nll, weights = eval_step(adapters, params, place_batch(batch, mesh))
        total += float(nll)
        weight += float(weights)
    return total / weight


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
        rows = [prompts[i].tolist() for i in chosen]
        rows += rows[:1] * (batch_size - len(rows))
        answers |= dict(zip(chosen, generate(bound, rows, **options), strict=False))
    return [answers[i] for i in range(len(prompts))]


@dataclass(frozen=True)
class Scores:
    """Results of a set of adapters on the held-out data."""

    losses: Mapping[str, float]  # nats per supervised token: task, regression
    metrics: Mapping[str, float]  # of the answers, by the names of eval.metrics
    answers: Sequence[Answer] = ()  # to the prompts of the task; empty if none are generated

    def describe(self) -> str:
        parts = [f"{name} loss {loss:.4f}" for name, loss in self.losses.items()]
        parts += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in self.metrics.items()]
        return ", ".join(parts) or "nothing held out"


@dataclass(frozen=True)
class Judge:
    """Everything that scoring needs but the adapters."""

    config: Config
    model: Model
    held_out: Mapping[str, DataSet]  # task, regression: those that the config names
    mesh: Mesh
    reader: data.AnswerReader
    eval_step: Callable
    generate: Callable  # of a model that writes text
    classify: Callable  # of one that classifies

    def score(self, adapters: Any, losses: Mapping[str, float] | None = None) -> Scores:
        """Losses (measured here unless they are known), answers and their metrics."""
        losses = self.losses(adapters) if losses is None else losses
        answers = self.answers(adapters, self.config.eval.generate_examples)
        metrics = scores.compute(self.config.eval.metrics, answers) if answers else {}
        return Scores(losses, metrics, answers)

    def losses(self, adapters: Any, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Nats per supervised token on each held-out set; `check` may end it between batches."""
        size, length = self.config.eval.batch_size, self.config.data.max_length
        places = placeholders(methods.prefix(adapters, self.config.adapter))
        found = {}
        for name, held_out in self.held_out.items():
            measured = scores.spread(held_out.examples, self.config.eval.loss_examples)
            measured = data.with_places(measured, places)
            # Examples of another adapter's config may leave no room for places.
            room = max([length, *(len(example.tokens) for example in measured)])
            batches = data.eval_batches(measured, size, room)
            params = self.model.params
            found[name] = mean_loss(self.eval_step, adapters, params, batches, self.mesh, check)
        return found

    def answers(self, adapters: Any, limit: int | None) -> list[Answer]:
        """Greedy answers to prompts of the task: to all, or to `limit` spread evenly over them.

        Rows that ask the same are one prompt with several references.
        """
        config = self.config
        if "task" not in self.held_out or not config.eval.generate:
            return []
        if self.model.labels:
            return self._labels(adapters, limit)
        questions = dict(scores.spread(list(self.questions.items()), limit))
        if not questions:
            return []
        answers = generate_all(
            self.generate,
            methods.bind(self.model.params, adapters, config.adapter),
            [np.asarray(tokens, np.int32) for tokens in questions],
            config.eval.generate_batch_size,
            max_new_tokens=config.eval.max_new_tokens,
            stop_tokens=self.reader.stop_tokens,
            prefix=methods.prefix(adapters, config.adapter),
        )
        return [
            to_answer(self.reader, rows, prompt, tokens)
            for (prompt, rows), tokens in zip(questions.items(), answers, strict=True)
        ]

    def _labels(self, adapters: Any, limit: int | None) -> list[Answer]:
        """The labels that texts of the task get."""
        task, length = self.held_out["task"], self.config.data.max_length
        rows = {row.where: row for row in task.rows if isinstance(row, data.LabelRow)}
        examples = scores.spread(task.examples, limit)
        packed = data.pack([len(example.tokens) for example in examples], length)
        answers: dict[int, Answer] = {}
        size = self.config.eval.batch_size
        for first in range(0, len(packed), size):
            chosen = packed[first : first + size]
            texts = [[examples[i] for i in row] for row in chosen]
            batch = data.stack(texts + [[]] * (size - len(chosen)), length)
            placed = place_batch(batch, self.mesh)
            found = whole(self.classify(adapters, self.model.params, placed))
            for numbers, row in zip(found, chosen, strict=False):
                start = 0
                for i in row:
                    asked = rows[examples[i].where]
                    label = self.model.labels[numbers[start]]
                    answers[i] = Answer(" | ".join(asked.texts), (asked.label,), label)
                    start += len(examples[i].tokens)
        return [answers[i] for i in range(len(examples))]

    @cached_property
    def questions(self) -> Mapping[tuple[int, ...], list[data.Row]]:
        """`find_questions` of the task."""
        return find_questions(self.held_out["task"].rows, self.reader)


def find_questions(
    rows: Iterable[data.AnyRow], reader: data.AnswerReader
) -> dict[tuple[int, ...], list[data.Row]]:
    """Distinct prompts as tokens, each with all rows that ask it; texts and tokens ask nothing."""
    questions: dict[tuple[int, ...], list[data.Row]] = {}
    for row in rows:
        if isinstance(row, data.Row):
            questions.setdefault(tuple(reader.prompt(row).tolist()), []).append(row)
    return questions


def to_answer(
    reader: data.AnswerReader,
    rows: Sequence[data.Row],
    prompt: Sequence[int],
    tokens: Sequence[int],
) -> Answer:
    """Generated tokens with the references of the rows that ask `prompt`."""
    thought, answer = reader.read(rows, prompt, tokens)
    asked = str(rows[0].to_supervised().prompt[-1].get("content") or "")
    return Answer(asked, reader.references(rows), answer, thought)


def make_reader(
    config: Config, model: Model, tokenizer: Any, task: DataSet | None
) -> data.AnswerReader:
    """The `AnswerReader` for the held-out `task` of a run with `model`.

    Raises:
        UserError: a bad chat template.
    """
    settings = config.data
    stops = find_stops(config, model, tokenizer)
    if task is not None and any(isinstance(row, data.Row) for row in task.rows):
        stops = data.stop_tokens(
            tokenizer, settings.chat_template, stops, settings.chat_template_kwargs
        )
    return data.AnswerReader(
        tokenizer,
        stops,
        system_prompt=task.system_prompt if task is not None else None,
        chat_template=settings.chat_template,
        chat_template_kwargs=settings.chat_template_kwargs,
        template_date=settings.template_date,
        strip_thoughts=config.eval.strip_thoughts,
    )


def make_judge(
    config: Config,
    model: Model,
    tokenizer: Any,
    held_out: Mapping[str, DataSet],
    mesh: Mesh,
) -> Judge:
    """A `Judge` with its compiled functions over the held-out data."""
    return Judge(
        config=config,
        model=model,
        held_out=held_out,
        mesh=mesh,
        reader=make_reader(config, model, tokenizer, held_out.get("task")),
        eval_step=make_eval_step(model, config),
        generate=make_generate(model, jnp.dtype(config.train.compute_dtype)),
        classify=make_classify(model, config),
    )


def score_pair(name: str, before: Scores, after: Scores) -> dict[str, Any] | None:
    """The summary's entry for a held-out set, None if it was not measured before and after (a
    resumed run may have been allowed other sets or metrics).
    """
    if name not in before.losses or name not in after.losses:
        return None
    pair: dict[str, Any] = {"loss_before": before.losses[name], "loss_after": after.losses[name]}
    if name == "task" and after.answers:
        for metric in (name for name in after.metrics if name in before.metrics):
            pair[f"{metric}_before"] = before.metrics[metric]
            pair[f"{metric}_after"] = after.metrics[metric]
        pair["examples"] = len(after.answers)
    return pair
