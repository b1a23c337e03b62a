"""Order of the trials: which come next, and which stop early.

    source.ask(4)                    # up to four trials that have not begun
    source.stops(trials, step, losses)
    source.tell(trial, ..)           # its end

`Listed` knows all trials from the start (grid, random); `study.Study` asks Optuna for them.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from lora_jax.config import Config
from lora_jax.sweep.space import Halving, Space, Trial, draws, grid, make_trial


class Source(Protocol):
    """A source of trials."""

    def ask(self, most: int) -> list[Trial]:
        """Return up to `most` trials that have not begun; none at the end, or for now."""
        ...

    def stops(self, trials: Sequence[Trial], step: int, values: Sequence[float]) -> Any:
        """Return which of some trials stop, by their losses after a step; None: the caller
        decides.
        """
        ...

    def waits(self) -> bool:
        """Return True while other processes have trials, which may come back."""
        ...

    def held(self) -> AbstractContextManager[None]:
        """Keep the trials of this process from others while the block runs."""
        ...

    def lost(self) -> set[int]:
        """Return trials of this process that others have taken over."""
        ...

    def tell(self, trial: Trial, status: str, value: float | None) -> None:
        """Record the end of a trial."""
        ...


@dataclass
class Rungs:
    """Successive halving without waiting (arXiv 1810.05934): a trial that reaches a rung goes on if
    it is among the best 1 / factor of those that have reached it so far.

    values: losses by step and subject; trials of different data do not compare
    """

    halving: Halving | None
    values: dict[str, list[float]] = field(default_factory=dict)

    def is_due(self, step: int, steps: int) -> bool:
        """Return True if a trial of so many steps is compared after this one."""
        if self.halving is None or step >= steps or step < self.halving.first_step:
            return False
        power = math.log(step / self.halving.first_step, self.halving.factor)
        return self.halving.first_step * self.halving.factor ** round(power) == step

    def add(self, step: int, subject: str, values: Sequence[float]) -> list[bool]:
        """Record the losses of trials that reach a rung together. Return which of them stop."""
        assert self.halving is not None
        key = f"{step} {subject}"
        known = self.values[key] = [*self.values.get(key, []), *values]
        kept = math.ceil(len(known) / self.halving.factor)
        bound = sorted(known, key=_order)[kept - 1]
        return [_order(value) > _order(bound) for value in values]


def _order(value: float) -> float:
    return value if math.isfinite(value) else math.inf


@dataclass
class Listed:
    """Trials that are all known from the start.

    begun: numbers of those that were asked for
    """

    trials: list[Trial]
    begun: set[int] = field(default_factory=set)

    def ask(self, most: int) -> list[Trial]:
        found = [one for one in self.trials if one.number not in self.begun][:most]
        self.begun.update(one.number for one in found)
        return found

    def stops(self, trials: Sequence[Trial], step: int, values: Sequence[float]) -> Any:
        return None

    def waits(self) -> bool:
        return False

    def held(self) -> AbstractContextManager[None]:
        return nullcontext()

    def lost(self) -> set[int]:
        return set()

    def tell(self, trial: Trial, status: str, value: float | None) -> None:
        return None


def list_trials(space: Space, base: Config) -> list[Trial]:
    """Return the trials of a grid, or of random draws.

    Raises:
        UserError: as `make_trial`, for the first of them.
    """
    points: Iterable[dict[str, Any]]
    points = grid(space) if space.sampler == "grid" else draws(space, base.seed)
    return [make_trial(base, number, settings) for number, settings in enumerate(points)]
