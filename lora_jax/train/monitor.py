"""Monitor of a run: its best evaluation so far, for early stopping, and divergence of its loss."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_jax.config import LOSSES, TrainConfig

WINDOW = 20  # steps whose mean loss is compared
_MARGIN = 1.0  # least nats of a diverging mean above the lowest


@dataclass
class LossMonitor:
    """State of early stopping and of the check for divergence; its fields survive JSON unchanged.

    best_loss: best value of `metric`, which is a loss unless the config names another metric
    stale: evaluations since the best one
    recent: losses of the last WINDOW steps
    lowest: lowest mean loss over WINDOW steps
    lowest_step: last of these steps
    """

    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0
    recent: list[float] = field(default_factory=list)
    lowest: float | None = None
    lowest_step: int | None = None
    metric: str = "task_loss"

    def evaluated(
        self, step: int, measured: Mapping[str, float], metric: str = "task_loss"
    ) -> bool:
        """Record the scores of an evaluation by their names in metrics.jsonl. Return True if
        `metric` (as train.metric_for_best_model) is the best so far.
        """
        if metric not in measured:
            return False
        if metric != self.metric:  # values of another metric do not compare
            self.metric, self.best_loss, self.best_step, self.stale = metric, None, None, 0
        value = measured[metric]
        sign = 1 if metric in LOSSES else -1  # all others: greater is better
        better = math.isfinite(value) and (
            self.best_loss is None or sign * value < sign * self.best_loss
        )
        if better:
            self.best_loss, self.best_step, self.stale = value, step, 0
        else:
            self.stale += 1
        return better

    def gave_up(self, config: TrainConfig) -> bool:
        """Return True after too many evaluations without a better one."""
        patience = config.early_stopping_patience
        return patience is not None and self.stale >= patience

    def problem(
        self, step: int, loss: float, grad_norm: float, divergence: float | None
    ) -> str | None:
        """Record a step. Return a text on what is wrong with it and since which step, or None."""
        before = f"the {len(self.recent)} steps before have a mean loss of {self._mean():.4g}"
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return (
                f"the loss of step {step} is {loss} and its gradient norm {grad_norm}"
                + (f"; {before}" if self.recent else "")
                + f". Lower train.learning_rate, or check the data of step {step}"
            )
        self.recent = [*self.recent, loss][-WINDOW:]
        if len(self.recent) < WINDOW:
            return None
        mean = self._mean()
        if self.lowest is None or self.lowest_step is None or mean < self.lowest:
            self.lowest, self.lowest_step = mean, step
        elif divergence and mean > max(divergence * self.lowest, self.lowest + _MARGIN):
            return (
                f"the run diverges: steps {step - WINDOW + 1}-{step} have a mean loss of "
                f"{mean:.4g}, steps {self.lowest_step - WINDOW + 1}-{self.lowest_step} had "
                f"{self.lowest:.4g}. Lower train.learning_rate, or raise train.divergence "
                f"({divergence:g}; null: never stop)"
            )
        return None

    def _mean(self) -> float:
        return sum(self.recent) / max(1, len(self.recent))
