"""Results of measuring adapters on the held-out data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_jax.report.scores import Answer


class Losses(dict[str, float]):
    """Losses by held-out set: nats per supervised token, or the objective's of answers to compare,
    whose other metrics are `pairs`.
    """

    def __init__(self, losses: Mapping[str, float] = {}, pairs: Mapping[str, float] = {}):
        super().__init__(losses)
        self.pairs = dict(pairs)


@dataclass(frozen=True)
class Scores:
    """Results of adapters on the held-out data."""

    losses: Mapping[str, float]  # `Losses`: task, regression
    metrics: Mapping[str, float]  # of the answers, by the names of eval.metrics
    answers: Sequence[Answer] = ()  # to the prompts of the task; empty if none are generated

    @property
    def pairs(self) -> Mapping[str, float]:
        """Metrics of answers to compare, by the names of the objective."""
        return getattr(self.losses, "pairs", {})

    def numbers(self) -> dict[str, float]:
        """Return all scores by their names in metrics.jsonl."""
        losses = {f"{name}_loss": loss for name, loss in self.losses.items()}
        pairs = {f"task_{name}": value for name, value in self.pairs.items()}
        return {**losses, **pairs, **self.metrics}

    def describe(self) -> str:
        parts = [f"{name} loss {loss:.4f}" for name, loss in self.losses.items()]
        known = [name for name in ("margin", "accuracy") if name in self.pairs]
        parts += [f"{name} {self.pairs[name]:.3f}" for name in known]
        parts += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in self.metrics.items()]
        return ", ".join(parts) or "nothing held out"


def score_pair(name: str, before: Scores | None, after: Scores) -> dict[str, Any] | None:
    """Return the summary's entry for a held-out set; None if it was not measured both before and
    after, as when a resumed run has other sets or metrics. With `eval.before=false`, the values
    before are None.
    """
    if name not in after.losses or (before is not None and name not in before.losses):
        return None
    first = None if before is None else before.losses[name]
    pair: dict[str, Any] = {"loss_before": first, "loss_after": after.losses[name]}
    if name == "task":
        for metric, value in after.pairs.items():
            pair[f"{metric}_before"] = None if before is None else before.pairs.get(metric)
            pair[f"{metric}_after"] = value
    if name == "task" and after.answers:
        for metric, value in after.metrics.items():
            if before is None or metric in before.metrics:
                pair[f"{metric}_before"] = None if before is None else before.metrics[metric]
                pair[f"{metric}_after"] = value
        pair["examples"] = len(after.answers)
    return pair
