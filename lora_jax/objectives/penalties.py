"""Penalties that a config adds to the loss of any objective: the balance of routers, and the
divergence from the base on general text.
"""

from collections.abc import Callable

import jax

from lora_jax.config import Config
from lora_jax.objectives.base_kl import add_base_kl
from lora_jax.objectives.forward import Batch, Forward, Outputs, supervised_weight
from lora_jax.objectives.objective import Result, is_on
from lora_jax.objectives.router import add_balance

Penalties = Callable[[Result, Outputs, Forward], Result]


def from_config(
    config: Config, weigh: Callable[[Batch], jax.Array] = supervised_weight
) -> Penalties:
    """Make `add(result, outputs, forward)`. `weigh` gives a batch its weight in the objective."""
    balance, divergence = config.train.router_aux_loss_coef, config.objective.base_kl

    def add(result: Result, outputs: Outputs, forward: Forward) -> Result:
        if is_on(balance):
            result = add_balance(result, outputs, forward, balance, weigh)
        if is_on(divergence):
            result = add_base_kl(result, outputs, forward, divergence, weigh)
        return result

    return add


def metric_names(config: Config) -> list[str]:
    """Return the names of the metrics that `from_config` adds."""
    given = {
        "router_aux_loss": config.train.router_aux_loss_coef,
        "base_kl": config.objective.base_kl,
    }
    return [name for name, coefficient in given.items() if coefficient]
