"""Warnings about a run before it starts, the same in every command.

warn.of_config(config)      # from settings alone: --dry-run, plan
warn.find(session, train, held_out, measured)  # inspect, a run before its steps
"""

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax import data, formats
from lora_jax.config import Config, TrainConfig, find_unused
from lora_jax.data.sets import DataSet, TrainData
from lora_jax.errors import UserError
from lora_jax.models.common import Model
from lora_jax.session import Session

_FORGOTTEN = 0.3  # nats that a regression loss may rise without a warning
_LITTLE = 0.01  # supervised share of the tokens below which there is a warning
_QUANTILES = {"min": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}
_BINS = 8  # lines of a text histogram


@dataclass(frozen=True, eq=False)
class Measured:
    """Statistics of the examples of one set."""

    counts: data.Counts | None  # of the source as it was read; None: held out of another set
    lengths: np.ndarray  # (examples,) tokens
    supervised: np.ndarray  # (examples,) tokens with a weight above 0

    @property
    def share(self) -> float:
        """Share of the tokens that are supervised."""
        return float(self.supervised.sum() / self.lengths.sum())

    def describe(self) -> dict[str, int]:
        """Return the counts of the set for the summary; what was cut and dropped only for a set
        with a source of its own.
        """
        own = self.counts
        cut = {} if own is None else {"truncated": own.truncated, "dropped": own.dropped}
        return {
            "examples": len(self.lengths),
            "supervised_tokens": int(self.supervised.sum()),
            "tokens": int(self.lengths.sum()),
            "longest": int(self.lengths.max(initial=0)),
            **cut,
        }

    @property
    def left_out(self) -> int:
        """Examples of the source that are not in the set."""
        return 0 if self.counts is None else self.counts.examples - len(self.lengths)

    def quantiles(self) -> dict[str, int]:
        """Return the quantiles `min`, `median`, `90 %`, `99 %` and `max` of the lengths."""
        found = np.quantile(self.lengths, list(_QUANTILES.values()), method="inverted_cdf")
        return dict(zip(_QUANTILES, map(int, found), strict=True))

    def histogram(self) -> list[tuple[int, int, int]]:
        """Return (from, to, examples) of ranges of lengths, both ends included."""
        low, high = int(self.lengths.min()), int(self.lengths.max())
        width = -(-(high - low + 1) // _BINS)
        counts = np.bincount((self.lengths - low) // width).tolist()
        starts = range(low, high + 1, width)
        return [(start, start + width - 1, n) for start, n in zip(starts, counts, strict=True)]


def of_config(config: Config) -> Iterator[str]:
    """Yield warnings about settings that have no effect or defeat their purpose."""
    yield from find_unused(config)
    if not (config.export.peft or config.export.merged or config.adapter.trains_everything):
        yield "export.peft=false and export.merged=false: the run leaves nothing but checkpoints"
    if config.train.steps is not None:  # else they follow from the data
        yield from _of_steps(config.train, config.train.steps)


def _of_steps(settings: TrainConfig, steps: int) -> Iterator[str]:
    if settings.warmup_steps >= steps:
        last = settings.learning_rate * steps / settings.warmup_steps
        yield (
            f"train.warmup_steps={settings.warmup_steps} is not below train.steps={steps}: the "
            f"learning rate only rises, to {last:.3g} of {settings.learning_rate:g} at the last "
            "step; lower train.warmup_steps"
        )
    for name in ("eval_every", "save_every", "log_every"):
        every = getattr(settings, name)
        if every is not None and every > steps:
            yield (
                f"train.{name}={every} is above train.steps={steps}: it is never due before the "
                "last step"
            )
    patience, every = settings.early_stopping_patience, settings.eval_every
    if patience is not None and every is not None and every <= steps < (patience + 1) * every:
        yield (
            f"train.early_stopping_patience={patience} has no effect: {steps} steps have "
            f"{steps // every} evaluations (train.eval_every={every})"
        )


def find(
    session: Session,
    train: TrainData,
    held_out: Mapping[str, DataSet],
    measured: Mapping[str, Measured],
) -> list[str]:
    """Return all warnings about a run with these data; for a stream, about the part that was
    read.
    """
    return [
        *of_config(session.config),
        *_missing(session.config, session.model),
        *_of_sets(measured),
        *_of_overlap(train, held_out),
        *([] if session.model.labels else _endless(session, train)),
    ]


def _of_overlap(train: TrainData, held_out: Mapping[str, DataSet]) -> Iterator[str]:
    examples = held_out["task"].examples if "task" in held_out else []
    trained = {e.tokens.tobytes() for one in train.sets.values() for e in one.examples}
    both = sum(example.tokens.tobytes() in trained for example in examples)
    if both:
        yield (
            f"{both} of {len(examples)} rows of data.eval are in data.train too: their scores "
            "measure memorisation; data.drop_overlap=true leaves them out"
        )


def of_forgetting(regression: Mapping[str, Any] | None) -> list[str]:
    """Return a warning if the regression loss rose by more than `_FORGOTTEN` nats."""
    if regression is None or regression["loss_before"] is None:
        return []
    before, after = regression["loss_before"], regression["loss_after"]
    if not after - before > _FORGOTTEN:
        return []
    return [
        f"the regression loss rose from {before:.4f} to {after:.4f}, by more than {_FORGOTTEN}: "
        "the model forgets what it was not trained on; lower train.learning_rate, train.steps or "
        "adapter.rank, or mix general text in (data.replay)"
    ]


def name_training(train: TrainData) -> dict[str, DataSet]:
    """Return the training sets by the names that `sets.read_sets` gives them."""
    return {
        f"data.{'replay' if source == train.replay else 'train'} {source}": one
        for source, one in train.sets.items()
    }


def name_held_out(config: Config, held_out: Mapping[str, DataSet]) -> dict[str, DataSet]:
    """Return the held-out sets by their settings."""
    task = "data.eval" if config.data.eval is not None else "data.eval_size"
    return {task if name == "task" else f"data.{name}": one for name, one in held_out.items()}


def measure(sets: Mapping[str, DataSet], counts: Mapping[str, data.Counts]) -> dict[str, Measured]:
    """Return lengths and supervised tokens of every set, with the counts of its source."""
    return {
        name: Measured(
            counts.get(name),
            np.array([len(example.tokens) for example in one.examples]),
            np.array([count_supervised(example) for example in one.examples]),
        )
        for name, one in sets.items()
    }


def count_supervised(example: data.Example) -> int:
    """Count the tokens with a weight above 0."""
    return int(np.count_nonzero(example.loss_weights))


def _missing(config: Config, model: Model) -> Iterator[str]:
    settings = config.data
    if settings.eval is None and settings.eval_size is None:
        yield "neither data.eval nor data.eval_size is set: nothing measures what is learnt"
    if settings.regression is None and not model.labels:
        yield "data.regression is not set: nothing measures what is forgotten"


def _of_sets(measured: Mapping[str, Measured]) -> Iterator[str]:
    for name, one in measured.items():
        if one.share < _LITTLE:
            yield (
                f"{name}: {one.share:.2%} of the tokens are supervised, so nearly all of the work "
                "teaches nothing; shorten the prompts"
            )
        if one.counts is not None and one.counts.unaligned:
            yield (
                f"{name}: {one.counts.unaligned} prompts split into other tokens alone, as in a "
                "generation, than before their answers; end them at a word, or use a chat template"
            )
        if one.counts is not None and (empty := one.counts.empty_answers):
            yield (
                f"{name}: {empty} examples have an empty answer, and teach to end at once; leave "
                'them out, or mark the turns "train": false'
            )
        if one.counts is not None and (unended := one.counts.unended_answers):
            yield (
                f"{name}: {unended} examples have an earlier answer that no end-of-turn token "
                "ends, so how to end is learnt from the last one alone; use one row per answer, "
                "or another data.chat_template"
            )


def _endless(session: Session, train: TrainData) -> Iterator[str]:
    """Yield a warning on answers that do not end."""
    settings = session.config.data
    try:
        extra = formats.stop_tokens(session.source)
        stops = data.stop_tokens(
            session.tokenizer, settings.chat_template, extra, settings.chat_template_kwargs
        )
    except UserError as error:  # the template may accept the rows all the same
        yield f"the tokens that end an answer are not known: {error}"
        return
    for name, one in name_training(train).items():
        count = sum(not _ends(example, stops) for example in one.examples)
        if count:
            yield (
                f"{name}: the last answer of {count} of {len(one.examples)} examples has no stop "
                "token, as when it is cut at data.max_length: how to end is not learnt from it"
            )


def _ends(example: data.Example, stops: AbstractSet[int]) -> bool:
    """Return True if the last run of supervised tokens holds one of `stops`."""
    last = int(np.flatnonzero(example.loss_weights)[-1])
    before = np.flatnonzero(example.loss_weights[:last] == 0)
    first = int(before[-1]) + 1 if len(before) else 0
    return not stops.isdisjoint(example.tokens[first : last + 1].tolist())
