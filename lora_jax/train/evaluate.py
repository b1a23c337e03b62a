"""Held-out losses, and answers by greedy generation with their scores."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax import adapters as methods
from lora_jax import data
from lora_jax.config import AdapterConfig, Config
from lora_jax.data.sets import DataSet
from lora_jax.generate import Completion, Engine, Request, for_decoding
from lora_jax.models.common import Model
from lora_jax.nn.virtual import placeholders
from lora_jax.report import scores
from lora_jax.report.progress import SILENT, Display, Phase
from lora_jax.report.scores import Answer
from lora_jax.settle import find_stops
from lora_jax.sharding import gather_to_host, place_batch
from lora_jax.targets import Trainable
from lora_jax.train.reference import Reference
from lora_jax.train.scored import Losses, Scores
from lora_jax.train.step import make_classify, make_eval_pairs, make_eval_step

_LARGEST_COPY = 2 * 2**30  # bytes of a base that a run copies while it answers


def mean_loss(
    eval_step: Callable,
    adapters: Any,
    params: Any,
    batches: Iterable[dict],
    mesh: Mesh,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Return the nats per supervised token over all batches; every token weighs the same. `check`
    is called before each batch.
    """
    total, weight = 0.0, 0.0
    for batch in batches:
        check()
        nll, weights = eval_step(adapters, params, place_batch(batch, mesh))
        total += float(nll)
        weight += float(weights)
    return total / weight


def generate_all(
    engine: Engine,
    requests: Sequence[Request],
    phase: Phase,
    check: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Return the answers to all requests, in their order, and free the memory of the engine.
    `check` is called as each of them ends, and may raise. Short prompts come first: attention
    reads as many slots as the longest text of a batch has.
    """
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))

    def done(_: int, answer: Completion) -> None:
        phase.tokens += len(answer.tokens)
        phase.advance()
        check()

    try:
        found = engine.answer([requests[i] for i in order], done)
    finally:
        engine.release()
    answers = dict(zip(order, found, strict=True))
    return [answers[i].tokens for i in range(len(requests))]


@dataclass(frozen=True)
class Evaluator:
    """Measures adapters on held-out data.

    adapter: their settings, or the `Trainable` of these if it is known
    held_out: examples by name (task, regression), for the sets that the config names
    classify: compiled, for a classifier
    eval_pairs: compiled, for an objective that compares answers
    reference: of that objective, if it needs one
    took: seconds of the last losses, and per answer of the last answers
    """

    config: Config
    model: Model
    adapter: AdapterConfig | Trainable
    held_out: Mapping[str, DataSet]
    mesh: Mesh
    reader: data.AnswerReader
    eval_step: Callable
    classify: Callable
    eval_pairs: Callable
    display: Display = SILENT
    reference: Reference | None = None
    took: dict[str, float] = field(default_factory=dict)
    compared: list[dict[str, jax.Array]] = field(default_factory=list)  # batches with a reference
    engines: dict[int, Engine] = field(default_factory=dict)  # by length of their texts

    def score(self, adapters: Any, losses: Mapping[str, float] | None = None) -> Scores:
        """Return losses, answers and their metrics. Losses are measured unless given."""
        losses = self.losses(adapters) if losses is None else losses
        return self.with_metrics(losses, self.answers(adapters, self.config.eval.generate_examples))

    def with_metrics(self, losses: Mapping[str, float], answers: Sequence[Answer]) -> Scores:
        """Join losses and answers with the metrics of the answers."""
        metrics = scores.compute(self.config.eval.metrics, answers) if answers else {}
        return Scores(losses, metrics, answers)

    def losses(self, adapters: Any, check: Callable[[], None] = lambda: None) -> Losses:
        """Return the loss on each held-out set. `check` may raise between batches."""
        batches = {
            name: self._batches(held_out, adapters) for name, held_out in self.held_out.items()
        }
        if not batches:
            return Losses()
        found, params, began = Losses(), self.model.params, time.monotonic()
        total = sum(map(len, batches.values()))
        with self.display.phase("losses", total, "batches") as phase:
            for name, own in batches.items():
                seen = phase.over(own)
                if name == "task" and self.config.train.compares_answers:
                    found.pairs = self._compare(adapters, seen, check)
                    found[name] = found.pairs.pop("loss")
                    continue
                found[name] = mean_loss(self.eval_step, adapters, params, seen, self.mesh, check)
        self.took["losses"] = time.monotonic() - began
        return found

    def _compare(
        self, adapters: Any, batches: Iterable[dict], check: Callable[[], None]
    ) -> dict[str, float]:
        """Return the means of the objective's metrics over answers to compare."""
        totals: dict[str, float] = {}
        weights = 0.0
        for i, batch in enumerate(batches):
            check()
            placed = place_batch(batch, self.mesh)
            if self.reference is not None:
                if i == len(self.compared):  # the reference does not change
                    known = self.reference.attach(placed)["reference_log_probs"]
                    self.compared.append({"reference_log_probs": known})
                placed |= self.compared[i]
            sums, weight = self.eval_pairs(adapters, self.model.params, placed)
            weights += float(weight)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return {name: total / weights for name, total in totals.items()}

    def _batches(self, held_out: DataSet, adapters: Any) -> list[dict[str, np.ndarray]]:
        places = placeholders(methods.prefix(adapters, self.adapter))
        measured = scores.spread(held_out.examples, self.config.eval.loss_examples)
        measured = data.with_places(measured, places)
        # Examples of another adapter's config may be full without virtual tokens.
        room = max([self.config.data.max_length, *(len(one.tokens) for one in measured)])
        shares = self.config.data.share_prompts is True and held_out is self.held_out.get("task")
        return list(data.eval_batches(measured, self.config.eval.batch_size, room, shares))

    def answers(
        self, adapters: Any, limit: int | None, check: Callable[[], None] = lambda: None
    ) -> list[Answer]:
        """Return greedy answers to all prompts of the task, or to `limit` evenly spaced ones.
        `check` may raise between batches.

        Rows with the same prompt are one prompt with several references.
        """
        count = self.count_answers(limit)
        if not count:
            return []
        began = time.monotonic()
        with self.display.phase("answers", count) as phase:
            answer = self._labels if self.model.labels else self._texts
            found = answer(adapters, limit, phase, check)
        self.took["answers"] = (time.monotonic() - began) / count
        return found

    def count_answers(self, limit: int | None) -> int:
        """Count the answers that `answers` gives."""
        if "task" not in self.held_out or not self.config.eval.generate:
            return 0
        asked = self.held_out["task"].examples if self.model.labels else self.questions
        return len(asked) if limit is None else min(limit, len(asked))

    def _texts(
        self, adapters: Any, limit: int | None, phase: Phase, check: Callable[[], None]
    ) -> list[Answer]:
        """Return the generated answers to prompts of the task."""
        questions = dict(scores.spread(list(self.questions.items()), limit))
        prefix, most = methods.prefix(adapters, self.adapter), self.config.eval.max_new_tokens
        engine = self._open_engine(placeholders(prefix))
        stops = self.reader.stop_tokens
        requests = [Request(prompt, most, stops, number=i) for i, prompt in enumerate(questions)]
        bound = methods.bind(self.model.params, adapters, self.adapter)
        engine.use(_decoding_form(self.model.replace(params=bound)).params, prefix)
        del bound
        try:
            answers = generate_all(engine, requests, phase, check)
        finally:
            engine.use(self.model.params)  # frees the other form
        return [
            to_answer(self.reader, rows, prompt, tokens)
            for (prompt, rows), tokens in zip(questions.items(), answers, strict=True)
        ]

    def _open_engine(self, places: int) -> Engine:
        """Return the engine for all prompts with `places` placeholders before each."""
        config, prompts = self.config, self.questions
        length = places + max(map(len, prompts)) + config.eval.max_new_tokens
        if length not in self.engines:
            rows = min(config.eval.generate_batch_size, len(prompts))
            dtype = jnp.dtype(config.train.compute_dtype)
            self.engines[length] = Engine(self.model, rows=rows, max_length=length, dtype=dtype)
        return self.engines[length]

    def _labels(
        self, adapters: Any, limit: int | None, phase: Phase, check: Callable[[], None]
    ) -> list[Answer]:
        """Return the predicted labels of texts of the task, with the probabilities of all."""
        task, length = self.held_out["task"], self.config.data.max_length
        rows = {row.where: row for row in task.rows if isinstance(row, data.LabelRow)}
        examples = scores.spread(task.examples, limit)
        packed = data.pack([len(example.tokens) for example in examples], length)
        answers: dict[int, Answer] = {}
        size = self.config.eval.batch_size
        for first in range(0, len(packed), size):
            check()
            chosen = packed[first : first + size]
            texts = [[examples[i] for i in row] for row in chosen]
            batch = data.stack(texts + [[]] * (size - len(chosen)), length)
            placed = place_batch(batch, self.mesh)
            found = gather_to_host(self.classify(adapters, self.model.params, placed))
            for logits, row in zip(found, chosen, strict=False):
                start = 0
                for i in row:
                    asked = rows[examples[i].where]
                    answers[i] = to_label(asked, self.model.labels, logits[start])
                    start += len(examples[i].tokens)
                phase.advance(len(row))
        return [answers[i] for i in range(len(examples))]

    @cached_property
    def questions(self) -> Mapping[tuple[int, ...], list[data.Row]]:
        """`find_questions` of the task."""
        return find_questions(self.held_out["task"].rows, self.reader)


def _decoding_form(model: Model) -> Model:
    """Return the model in the form that decodes fastest, a copy, unless the copy is large."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    return for_decoding(model) if size <= _LARGEST_COPY else model


def find_questions(
    rows: Iterable[data.AnyRow], reader: data.AnswerReader
) -> dict[tuple[int, ...], list[data.Row]]:
    """Return the distinct prompts as tokens, each with its rows. Plain texts and rows of tokens
    have no prompt.
    """
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
    """Return generated tokens as an answer, with the references of the rows of `prompt`."""
    thought, answer = reader.read(rows, prompt, tokens)
    asked = str(rows[0].to_supervised().prompt[-1].get("content") or "")
    return Answer(asked, reader.references(rows), answer, thought, rows[0].where)


def to_label(row: data.LabelRow, labels: Sequence[str], logits: np.ndarray) -> Answer:
    """Return the most likely label of a row, and softmax(logits), the probabilities of all."""
    powers = np.exp(logits.astype(np.float64) - logits.max())
    shares = dict(zip(labels, (powers / powers.sum()).tolist(), strict=True))
    label = labels[int(np.argmax(logits))]
    asked = " | ".join(row.texts)
    return Answer(asked, (row.label,), label, where=row.where, probabilities=shares)


def make_reader(
    config: Config, model: Model, tokenizer: Any, task: DataSet | None
) -> data.AnswerReader:
    """Return the `AnswerReader` for the held-out `task` of a run with `model`.

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
        data.Rendering(
            tokenizer,
            system_prompt=task.system_prompt if task is not None else None,
            chat_template=settings.chat_template,
            chat_template_kwargs=settings.chat_template_kwargs,
            template_date=settings.template_date,
        ),
        stops,
        strip_thoughts=config.eval.strip_thoughts,
    )


def make_evaluator(
    config: Config,
    model: Model,
    tokenizer: Any,
    held_out: Mapping[str, DataSet],
    mesh: Mesh,
    display: Display = SILENT,
    trainable: Trainable | None = None,
) -> Evaluator:
    """Return an `Evaluator` with its compiled functions and no reference. `trainable` is the
    config's, if known.
    """
    return Evaluator(
        config=config,
        model=model,
        adapter=trainable or config.adapter,
        held_out=held_out,
        mesh=mesh,
        reader=make_reader(config, model, tokenizer, held_out.get("task")),
        eval_step=make_eval_step(model, config),
        classify=make_classify(model, config),
        eval_pairs=make_eval_pairs(model, config),
        display=display,
    )
