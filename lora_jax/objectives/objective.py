"""The form of an objective, and the check of what a user's function returns."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import UserError
from lora_jax.objectives.forward import Batch, Forward

# (weighted sum, weight, sums for the metrics), scalars. The step differentiates the first, adds all
# up over the micro-batches, and divides them by the weight.
Result = tuple[jax.Array, jax.Array, Mapping[str, jax.Array]]
Objective = Callable[[Forward, Batch, jax.Array], Result]

# Measured by the step and the run.
_TAKEN = (
    *("grad_norm", "supervised_tokens", "step", "learning_rate", "tokens_per_second"),
    *("task_loss", "regression_loss"),
)


def is_on(number: Any) -> bool:
    """Return False for the number 0. An array, as of members of a sweep, may hold others."""
    return isinstance(number, jax.Array) or number != 0


def checked(objective: Objective, forward: Forward, batch: Batch, key: jax.Array) -> Result:
    """Return the result of an objective for a batch, as float32 scalars. The sums include `loss`,
    by default the weighted sum.

    Raises:
        UserError: the result does not have the form of `Result`.
    """
    name = getattr(objective, "__name__", type(objective).__name__)
    found: Any = objective(forward, batch, key)
    form = f"the objective {name} must return (weighted sum, weight, sums for the metrics)"
    if not isinstance(found, tuple | list) or len(found) != 3:
        kind = f"{len(found)} values" if isinstance(found, tuple | list) else _describe(found)
        raise UserError(f"{form}, and returned {kind}")
    total, weight, sums = found
    if not isinstance(sums, Mapping):
        raise UserError(f"{form}: the third is a dict of scalars by name, not {_describe(sums)}")
    if taken := [str(name) for name in sums if not isinstance(name, str) or name in _TAKEN]:
        raise UserError(f"{form}: other metrics have the names {', '.join(taken)}; choose others")
    named = {"the weighted sum": total, "the weight": weight}
    named |= {f"the sum {name!r}": value for name, value in sums.items()}
    for what, value in named.items():
        if not _is_scalar(value):
            raise UserError(f"{form}: {what} must be a real scalar, not {_describe(value)}")
    scalars = {name: jnp.float32(value) for name, value in {"loss": total, **sums}.items()}
    return jnp.float32(total), jnp.float32(weight), scalars


def _is_scalar(value: Any) -> bool:
    if not isinstance(value, int | float | jax.Array) and not hasattr(value, "dtype"):
        return False
    return jnp.shape(value) == () and not jnp.iscomplexobj(value)


def _describe(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype}{list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
