"""Objectives: what a train step minimises, each a pure function.

    objective(forward, batch, key) -> (weighted sum, weight, sums for the metrics)

The gradient is that of the weighted sum divided by the weight, both added up over the whole
effective batch (micro-batches and devices); the metrics are the sums divided by the same weight.
"""

import dataclasses

from lora_jax.config import Config, sft_weight_of
from lora_jax.errors import UserError
from lora_jax.objectives import cross_entropy, dpo, kto, orpo, penalties
from lora_jax.objectives.cross_entropy import plain_sums as plain_sums
from lora_jax.objectives.dpo import dpo_loss as dpo_loss
from lora_jax.objectives.dpo import ipo_loss as ipo_loss
from lora_jax.objectives.forward import Batch as Batch
from lora_jax.objectives.forward import Bound as Bound
from lora_jax.objectives.forward import Compute as Compute
from lora_jax.objectives.forward import Forward as Forward
from lora_jax.objectives.forward import Outputs as Outputs
from lora_jax.objectives.forward import negative_log_prob as negative_log_prob
from lora_jax.objectives.forward import run_model as run_model
from lora_jax.objectives.forward import segment_sums as segment_sums
from lora_jax.objectives.forward import supervised_weight as supervised_weight
from lora_jax.objectives.forward import without_placeholders as without_placeholders
from lora_jax.objectives.kto import kto_loss as kto_loss
from lora_jax.objectives.objective import Objective as Objective
from lora_jax.objectives.objective import Result as Result
from lora_jax.objectives.objective import checked as checked
from lora_jax.objectives.orpo import orpo_loss as orpo_loss
from lora_jax.objectives.orpo import simpo_loss as simpo_loss
from lora_jax.objectives.pairs import count_pairs as count_pairs
from lora_jax.objectives.pairs import pair_sums as pair_sums


def from_config(config: Config) -> Objective:
    """Return the objective of `train.objective`."""
    match config.train.objective:
        case "dpo" | "ipo":
            return dpo.from_config(config)
        case "orpo" | "simpo":
            return orpo.from_config(config)
        case "kto":
            return kto.from_config(config)
        case _:
            return cross_entropy.from_config(config)


def metric_names(config: Config) -> list[str]:
    """Return the names of the metrics that the objective of a config adds to `loss`."""
    name, settings = config.train.objective, config.train
    if name == "sft":
        return cross_entropy.metric_names(settings) + penalties.metric_names(config)
    found = ["margin", "accuracy", "chosen_log_prob", "rejected_log_prob"]
    if settings.needs_reference:
        found += ["chosen_drift", "rejected_drift", "kl"]
    else:
        found.append(f"{name}_loss")
    found += ["sft_loss"] if name != "kto" and sft_weight_of(config.objective, name) else []
    return found + penalties.metric_names(config)


def choose(config: Config, given: Objective | None) -> Objective:
    """Return the objective `given` from Python, or without one that of the config. With a given
    one, `train.objective` only decides the form of the rows, and if they have a reference.

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
    default = type(config)()
    read = [("train", name) for name in (*cross_entropy.SETTINGS, "router_aux_loss_coef")]
    read += [("objective", field.name) for field in dataclasses.fields(config.objective)]
    read.remove(("objective", "reference"))  # whose log-probabilities any objective gets
    unread = [
        f"{section}.{name}={getattr(getattr(config, section), name)}"
        for section, name in read
        if getattr(getattr(config, section), name) != getattr(getattr(default, section), name)
    ]
    if unread:
        own = "cross-entropy" if config.train.objective == "sft" else config.train.objective
        raise UserError(
            f"{' and '.join(unread)}: these are read by the {own}, and another objective "
            "is given in its place; leave them out, or let that objective call "
            "lora_jax.objectives"
        )
    return given
