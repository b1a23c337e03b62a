"""The compiled functions of a group: the train step under `vmap`, and the evaluation of one place.

    step(values, adapters, opt_state, params, batch) -> (adapters, opt_state, metrics)

All but `params`, the frozen base, have an axis of members in front: adapters (members, ...). What a
member computes does not depend on the others.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import objectives
from lora_jax.adapters import bind, prefix
from lora_jax.models.common import Model
from lora_jax.objectives import Bound, Compute, Forward
from lora_jax.plan.members import shared_chunk
from lora_jax.sweep.groups import Group, Values, with_numbers
from lora_jax.train.optimizer import make_adamw
from lora_jax.train.step import (
    StepParts,
    count_pieces,
    evaluation_compute,
    find_gradients,
    training_compute,
    update,
)


def make_step(model: Model, group: Group, count: int, placement: Any = None) -> Callable:
    """Make the jitted step of `count` members. `placement` is that of `make_train_step`, with the
    axis of the members. A place whose `moves` is False keeps its adapters and its state.
    """
    config, joint = group.config, group.joint
    config = dataclasses.replace(config, train=shared_chunk(config.train, count))
    compute, pieces = training_compute(model, config, placement), count_pieces(config)

    def of_one(values: Values, adapters: Any, opt_state: Any, params: Any, batch: Any) -> tuple:
        optimizer = make_adamw(values.optimizer, joint.config.freeze_a)
        parts = StepParts(
            model=model,
            compute=compute,
            bind=lambda params, adapters, key: bind(params, adapters, joint, key, values.adapter),
            adapter=joint.config,
            objective=objectives.from_config(with_numbers(config, values.objective)),
            optimizer=optimizer,
            pieces=pieces,
        )
        key = jax.random.fold_in(jax.random.wrap_key_data(values.key), values.step)
        grads, metrics = find_gradients(parts, adapters, params, batch, key)
        state = update(optimizer, grads, metrics, adapters, opt_state, values.moves)
        return *state, metrics

    of_all = jax.vmap(of_one, in_axes=(0, 0, 0, None, 0))
    out_shardings = None if placement is None else (*placement, None)
    return jax.jit(of_all, donate_argnums=(1, 2), out_shardings=out_shardings)


def init_state(values: Values, group: Group, adapters: Any) -> Any:
    """Return the optimizer's state of one member before its first step."""
    return make_adamw(values.optimizer, group.joint.config.freeze_a).init(adapters)


@jax.jit
def take_place(tree: Any, place: Any) -> Any:
    """Return one member of a tree of arrays (members, ...)."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), tree)


def make_put(placement: Any) -> Callable:
    """Make `put(trees, place, trees of one)`, which replaces a member in trees of arrays."""

    def put(trees: Any, place: Any, one: Any) -> Any:
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), place, 0),
            trees,
            one,
        )

    return jax.jit(put, donate_argnums=0, out_shardings=placement)


def make_eval(model: Model, group: Group) -> Callable:
    """Make `evaluate(adapters, settings, params, batch)` for one member in the joint shapes: summed
    negative log-likelihood and weights, as `make_eval_step`.
    """
    compute = evaluation_compute(model, group.config)

    def evaluate(adapters: Any, settings: Any, params: Any, batch: Any) -> tuple:
        outputs = _run(model, group, compute)(adapters, settings, params, batch)
        total, weight, _ = objectives.plain_sums(outputs)
        return total, weight

    return jax.jit(evaluate)


def _run(model: Model, group: Group, compute: Compute) -> Callable:
    def run(adapters: Any, settings: Any, params: Any, batch: Any) -> Any:
        bound = bind(params, adapters, group.joint, None, settings)
        virtual = prefix(adapters, group.joint)
        return objectives.run_model(model, bound, batch, compute, virtual)

    return run


def make_eval_pairs(model: Model, group: Group) -> Callable:
    """Make `evaluate(adapters, values, params, batch)` for an objective that compares answers: the
    sums of its metrics, and their weight, as `make_eval_pairs` of the train step.
    """
    compute = evaluation_compute(model, group.config)

    def evaluate(adapters: Any, values: Values, params: Any, batch: Any) -> tuple[Mapping, Any]:
        config = with_numbers(group.config, values.objective)
        objective = objectives.from_config(with_numbers(config, {"objective.label_smoothing": 0.0}))
        bound = Bound(
            bind(params, adapters, group.joint, None, values.adapter),
            prefix(adapters, group.joint),
        )
        forward = Forward(model, compute, bound, params, None, batch)
        _, weight, sums = objectives.checked(objective, forward, batch, jax.random.key(0))
        return sums, jnp.float32(weight)

    return jax.jit(evaluate)
