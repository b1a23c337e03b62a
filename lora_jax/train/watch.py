"""Whether a run still gets anywhere: its best held-out loss so far, and whether it diverges."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_jax.config import LOSSES, TrainConfig

WINDOW = 20  # steps whose mean loss is compared
_MARGIN = 1.0  # nats by which a diverging mean is above the lowest, whatever their ratio


@dataclass
class Watch:
    """What the steps and evaluations so far say; its fields go through JSON and back unchanged."""

    best_loss: float | None = None  # best value of `metric`, a loss unless the config says other
    best_step: int | None = None
    stale: int = 0  # evaluations since
    recent: list[float] = field(default_factory=list)  # losses of the last WINDOW steps
    lowest: float | None = None  # lowest mean over WINDOW steps
    lowest_step: int | None = None  # the last of these steps
    metric: str = "task_loss"  # that the best is the best of

    def evaluated(
        self, step: int, measured: Mapping[str, float], metric: str = "task_loss"
    ) -> bool:
        """Take note of an evaluation: held-out losses by set, and metrics of answers by name.
        Returns True if `metric` (as train.metric_for_best_model) is the best so far.
        """
        name = metric.removesuffix("_loss")
        if name not in measured:
            return False
        if metric != self.metric:  # values of another metric do not compare
            self.metric, self.best_loss, self.best_step, self.stale = metric, None, None, 0
        value = measured[name]
        sign = 1 if metric in LOSSES else -1  # metrics of answers: greater is better
        better = math.isfinite(value) and (
            self.best_loss is None or sign * value < sign * self.best_loss
        )
        if better:
            self.best_loss, self.best_step, self.stale = value, step, 0
        else:
            self.stale += 1
        return better

    def gave_up(self, config: TrainConfig) -> bool:
        """Whether too many evaluations brought nothing better."""
        patience = config.early_stopping_patience
        return patience is not None and self.stale >= patience

    def problem(
        self, step: int, loss: float, grad_norm: float, divergence: float | None
    ) -> str | None:
        """Take note of a step; what is wrong with it, naming the steps, or None."""
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
