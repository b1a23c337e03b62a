"""The auxiliary loss that balances routers, so that experts are used equally."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.config import Config
from lora_jax.errors import UserError
from lora_jax.models.common import Model, Routing
from lora_jax.objectives.forward import Batch, Forward, Outputs, supervised_weight
from lora_jax.objectives.objective import Result


def load_balancing_loss(routing: Routing) -> jax.Array:
    """Return experts * sum_e f_e P_e, which is least where routers spread tokens evenly (arXiv
    2101.03961, equations 4 to 6), as in transformers.

    f_e is the share of the tokens that went to expert e, P_e the mean probability that routers gave
    it, both over the real tokens of all layers. A token goes to k experts, so an even spread gives
    k. `routing` holds the sums of every layer, (layers, experts) and (layers,). Only P_e has a
    gradient.
    """
    tokens = jnp.maximum(routing.tokens.sum(), 1)
    often = routing.load.sum(axis=0) / tokens
    likely = routing.probabilities.sum(axis=0) / tokens
    return often.shape[0] * jnp.sum(often * likely)


def add_balance(
    result: Result,
    outputs: Outputs,
    forward: Forward,
    coefficient: float,
    weigh: Callable[[Batch], jax.Array] = supervised_weight,
) -> Result:
    """Add coefficient * `load_balancing_loss` to the result of an objective over `outputs`. `weigh`
    gives the weight of a batch in that objective.

    The step takes the mean over its micro-batches: unlike a sum over tokens, it depends on how the
    batch is split.
    """
    assert outputs.routing is not None, "check_experts has found experts"
    total, weight, sums = result
    balance = load_balancing_loss(outputs.routing)
    whole = forward.effective_batch
    pieces = len(whole["tokens"]) // len(outputs.batch["tokens"])
    share = weigh(whole) / pieces  # the step divides by the weight of the whole batch
    sums = {**sums, "router_aux_loss": share * balance}
    return total + coefficient * share * balance, weight, sums


def check_experts(model: Model, config: Config) -> None:
    """Raise a UserError for a router_aux_loss_coef where the model has no experts."""
    coefficient, leaves = config.train.router_aux_loss_coef, tree.flatten(model.params)
    if coefficient and not any(tree.is_router(path, leaves) for path in leaves):
        raise UserError(
            f"train.router_aux_loss_coef={coefficient} is for experts, and the model has none; "
            "leave it at 0"
        )
