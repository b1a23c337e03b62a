"""Means over the steps of one line of metrics.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Window:
    """Means over the steps since the last line; its fields survive JSON unchanged.

    `loss` is in nats per supervised token, so a step counts by its tokens, as a micro-batch does
    within a step. Everything else that a step measures counts once per step.
    """

    steps: int = 0
    supervised_tokens: float = 0.0  # sum
    loss: float = 0.0
    means: dict[str, float] = field(default_factory=dict)  # of the other measurements

    def add(self, measured: Mapping[str, float]) -> None:
        """Add the measurements of a step. Means over one step equal its measurements bit for
        bit.
        """
        tokens = measured["supervised_tokens"]
        self.steps += 1
        self.supervised_tokens += tokens
        self.loss += (measured["loss"] - self.loss) * (tokens / self.supervised_tokens)
        for name in measured.keys() - {"loss", "supervised_tokens"}:
            before = self.means.get(name, 0.0)
            self.means[name] = before + (measured[name] - before) / self.steps

    def describe(self) -> dict[str, float]:
        """The fields of a line: means, and the sum of the supervised tokens."""
        return {
            "loss": self.loss,
            **dict(sorted(self.means.items())),
            "supervised_tokens": self.supervised_tokens,
        }
