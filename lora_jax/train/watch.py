"""Whether a run still gets anywhere: its best held-out loss so far, and whether it diverges."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_jax.config import TrainConfig

WINDOW = 20  # steps whose mean loss is compared
_MARGIN = 1.0  # nats by which a diverging mean is above the lowest, whatever their ratio


@dataclass
class Watch:
    """What the steps and evaluations so far say; its fields go through JSON and back unchanged."""

    best_loss: float | None = None  # lowest held-out loss of the task
    best_step: int | None = None
    stale: int = 0  # evaluations since
    recent: list[float] = field(default_factory=list)  # losses of the last WINDOW steps
    lowest: float | None = None  # lowest mean over WINDOW steps
    lowest_step: int | None = None  # the last of these steps

    def evaluated(self, step: int, losses: Mapping[str, float]) -> bool:
        """Take note of held-out losses; whether the task's is the best so far."""
        if "task" not in losses:
            return False
        loss = losses["task"]
        better = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if better:
            self.best_loss, self.best_step, self.stale = loss, step, 0
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
