"""Objectives: what a train step minimises, each a pure function.

    objective(forward, batch, key) -> (weighted sum, weight, sums for the metrics)

The gradient is that of the weighted sum divided by the weight, both added up over the whole
effective batch (micro-batches and devices); the metrics are the sums divided by the same weight.
"""

from lora_jax.config import Config
from lora_jax.errors import UserError
from lora_jax.objectives import cross_entropy
from lora_jax.objectives.cross_entropy import metric_names as metric_names
from lora_jax.objectives.forward import Batch as Batch
from lora_jax.objectives.forward import Bound as Bound
from lora_jax.objectives.forward import Compute as Compute
from lora_jax.objectives.forward import Forward as Forward
from lora_jax.objectives.forward import Outputs as Outputs
from lora_jax.objectives.forward import negative_log_prob as negative_log_prob
from lora_jax.objectives.forward import run_model as run_model
from lora_jax.objectives.forward import segment_sums as segment_sums
from lora_jax.objectives.forward import supervised_weight as supervised_weight
from lora_jax.objectives.objective import Objective as Objective
from lora_jax.objectives.objective import Result as Result
from lora_jax.objectives.objective import checked as checked


def from_config(config: Config) -> Objective:
    """Return the objective that a config asks for."""
    return cross_entropy.from_config(config.train)


def choose(config: Config, given: Objective | None) -> Objective:
    """Return the objective `given` from Python, or without one that of the config.

    Raises:
        UserError: it cannot be called; settings of the config's own objective, which it replaces.
    """
    if given is None:
        return from_config(config)
    if not callable(given):
        raise UserError(
            "objective must be a function (forward, batch, key), not a "
            f"{type(given).__name__}: {given!r}"
        )
    default = type(config.train)()
    unread = [
        f"train.{name}={getattr(config.train, name)}"
        for name in cross_entropy.SETTINGS
        if getattr(config.train, name) != getattr(default, name)
    ]
    if unread:
        raise UserError(
            f"{' and '.join(unread)}: these are read by the cross-entropy, and another objective "
            "is given in its place; leave them out, or let that objective call "
            "lora_jax.objectives.cross_entropy"
        )
    return given
