"""The compiled functions of a run. No I/O here.

    train_step(adapters, opt_state, params, batch, step_key) -> (adapters, opt_state, metrics)

`params` is an input only: never returned, never copied. `adapters` and `opt_state` are donated.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax import objectives
from lora_jax.adapters import bind, prefix
from lora_jax.config import AdapterConfig, Config
from lora_jax.models.common import Execution, Model
from lora_jax.nn import kernels
from lora_jax.nn.virtual import Virtual, placeholders
from lora_jax.objectives import (
    Bound,
    Compute,
    Forward,
    Objective,
    cross_entropy,
    router,
    run_model,
    without_placeholders,
)
from lora_jax.targets import Trainable

Batch = dict[
    str, jax.Array
]  # tokens, segment_ids, positions (b, t) int32; loss_weights (b, t) float32


def batch_sums(
    model: Model,
    bound: Any,
    batch: Batch,
    config: Config,
    remat: str = "none",
    kernel: str = "xla",
    virtual: Virtual | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the weighted negative log-likelihood (nats) and the weights of a batch, summed.
    `kernel` is one of `kernels.NAMES`.
    """
    compute = _compute(config, kernel, remat)
    return cross_entropy.plain_sums(run_model(model, bound, batch, compute, virtual))[:2]


def _compute(config: Config, kernel: str, remat: str = "none") -> Compute:
    settings = config.train
    execution = Execution(jnp.dtype(settings.compute_dtype), remat, kernel)
    return Compute(execution, settings.loss_chunk)


def _kernel(model: Model, config: Config, placement: Any = None) -> str:
    """Choose the kernel of `train.attention` for the devices of `placement`, or of this process."""
    shardings = jax.tree.leaves(placement)
    device = next(iter(shardings[0].device_set)) if shardings else jax.devices()[0]
    settings = config.train
    return kernels.choose(settings.attention, model.config, settings.compute_dtype, device)


def make_train_step(
    model: Model,
    config: Config,
    optimizer: optax.GradientTransformation,
    placement: Any = None,
    objective: Objective | None = None,
) -> Callable:
    """Make the jitted step.

    `objective` is the objective to minimise (`lora_jax.objectives`), by default `config`'s.
    Metrics are float32 scalars: loss and the objective's other sums, divided by its weight;
    grad_norm before clipping; supervised_tokens, the summed loss weights. A step whose loss or
    gradient is not finite returns adapters and optimizer state unchanged.

    `placement` holds the shardings of (adapters, opt_state), which are reused for the outputs, so
    that the second step does not recompile. Without it the compiler chooses. Optimizer state in
    host memory is on the device only during the update.

    Raises:
        UserError: a router_aux_loss_coef for a model without experts; settings that `objective`
            does not read; as `kernels.choose`. When traced: an objective that does not return
            scalars.
    """
    router.check_experts(model, config)
    objective = objectives.choose(config, objective)
    parts = StepParts(
        model=model,
        compute=training_compute(model, config, placement),
        bind=lambda params, adapters, key: bind(params, adapters, config.adapter, key),
        adapter=config.adapter,
        objective=objective,
        optimizer=optimizer,
        pieces=count_pieces(config),
    )

    def train_step(adapters, opt_state, params, batch, step_key):
        grads, metrics = find_gradients(parts, adapters, params, batch, step_key)
        if placement is not None:
            opt_state = jax.tree.map(_on_device, opt_state, placement[1])
        state = update(optimizer, grads, metrics, adapters, opt_state)
        return *state, metrics

    out_shardings = None if placement is None else (*placement, None)
    return jax.jit(train_step, donate_argnums=(0, 1), out_shardings=out_shardings)


def count_pieces(config: Config) -> int:
    """Return the number of micro-batches of a step."""
    rows = config.train.batch_size
    return rows // (config.train.micro_batch_size or rows)


def training_compute(model: Model, config: Config, placement: Any = None) -> Compute:
    """Return the settings of the forward of a train step."""
    return _compute(config, _kernel(model, config, placement), config.train.remat)


def evaluation_compute(model: Model, config: Config) -> Compute:
    """Return the settings of the forward of an evaluation."""
    return _compute(config, _kernel(model, config))


@dataclass(frozen=True)
class StepParts:
    """Parts of a train step that depend on the config, or on the member of a sweep.

    bind: (params, adapters, key) -> the tree that the model runs on
    pieces: number of micro-batches
    """

    model: Model
    compute: Compute
    bind: Callable[[Any, Any, Any], Any]
    adapter: AdapterConfig
    objective: Objective
    optimizer: optax.GradientTransformation
    pieces: int


def find_gradients(
    parts: StepParts, adapters: Any, params: Any, batch: Batch, step_key: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """Return the gradients of a batch and its metrics, both divided by the objective's weight."""
    adapter = parts.adapter
    init = adapter.init if adapter.changes_base else None

    def micro_loss(adapters, params, micro, key, batch):
        """Return the value to differentiate, and the weight and sums for the metrics."""
        bound = Bound(parts.bind(params, adapters, key), prefix(adapters, adapter))
        forward = Forward(parts.model, parts.compute, bound, params, init, batch)
        own_key = jax.random.fold_in(key, 1)  # dropout has `key` itself
        total, weight, sums = objectives.checked(parts.objective, forward, micro, own_key)
        return total, (weight, sums)

    value_and_grad = jax.value_and_grad(micro_loss, has_aux=True)
    grads, (weight, sums) = _accumulate(
        value_and_grad, adapters, params, batch, step_key, parts.pieces
    )
    grads = jax.tree.map(lambda g: g / weight, grads)
    metrics = {name: value / weight for name, value in sums.items()}
    tokens = objectives.supervised_weight(batch)
    return grads, metrics | {"grad_norm": optax.tree.norm(grads), "supervised_tokens": tokens}


def _accumulate(
    value_and_grad: Callable, adapters: Any, params: Any, batch: Batch, key: jax.Array, pieces: int
) -> tuple[Any, Any]:
    """Return gradients and auxiliary sums of a batch, added up over micro-batches."""
    if pieces == 1:
        (_, sums), grads = value_and_grad(adapters, params, batch, key, batch)
        return grads, sums
    micros = _split(batch, pieces)

    def add(grads, micro_and_key):
        (_, sums), more = value_and_grad(adapters, params, *micro_and_key, batch)
        return jax.tree.map(jnp.add, grads, more), sums

    keys = jax.random.split(key, pieces)
    grads, sums = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, adapters), (micros, keys))
    return grads, jax.tree.map(lambda x: x.sum(axis=0), sums)


def _split(batch: Batch, pieces: int) -> Batch:
    """Split a batch in micro-batches, on a new first axis. Each takes rows from across the batch,
    so no row moves to another device.
    """
    return jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)


def update(
    optimizer: optax.GradientTransformation,
    grads: Any,
    metrics: dict[str, jax.Array],
    adapters: Any,
    opt_state: Any,
    moves: jax.Array | bool = True,
) -> tuple[Any, Any]:
    """Return adapters and state after the optimizer's step, or unchanged where loss or gradient is
    not finite, or without `moves`.
    """
    updates, moved = optimizer.update(grads, opt_state, adapters)
    sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"]) & moves
    state = (optax.apply_updates(adapters, updates), moved)
    return jax.tree.map(lambda new, old: jnp.where(sound, new, old), state, (adapters, opt_state))


def _on_device(x: jax.Array, sharding: Any) -> jax.Array:
    if sharding.memory_kind in (None, "device"):
        return x
    return jax.device_put(x, sharding.with_memory_kind("device"))


def make_classify(model: Model, config: Config) -> Callable:
    """Make `classify(adapters, params, batch)`: logits (b, t, labels) in float32, without dropout.
    Every token has the logits of its text.
    """
    compute = _compute(config, _kernel(model, config))

    def classify(adapters, params, batch):
        outputs = run_model(model, bind(params, adapters, config.adapter), batch, compute)
        return outputs.module.logits(outputs.hidden).astype(jnp.float32)

    return jax.jit(classify)


def make_eval_step(model: Model, config: Config) -> Callable:
    """Make `eval_step(adapters, params, batch)`: summed negative log-likelihood and weights,
    without dropout, label smoothing or router loss.
    """
    kernel = _kernel(model, config)

    def eval_step(adapters, params, batch):
        bound, virtual = bind(params, adapters, config.adapter), prefix(adapters, config.adapter)
        return batch_sums(model, bound, batch, config, kernel=kernel, virtual=virtual)

    return jax.jit(eval_step)


def make_log_probs(
    model: Model, config: Config, adapter: AdapterConfig | Trainable | None, places: int = 0
) -> Callable:
    """Make `log_probs(adapters, params, batch)`: log-probabilities of the supervised tokens, (b, t)
    float32 and 0 elsewhere, in the micro-batches of the train step and without dropout.

    adapter: settings of `adapters`; None: the parameters alone
    places: placeholders of virtual tokens that the batch has before each text
    """
    rows = config.train.batch_size
    pieces = rows // (config.train.micro_batch_size or rows)
    compute = _compute(config, _kernel(model, config))

    def of_micro(adapters, params, micro):
        bound, virtual = params, None
        if adapter is not None:
            bound, virtual = bind(params, adapters, adapter), prefix(adapters, adapter)
        micro = without_placeholders(micro, places - placeholders(virtual))
        return run_model(model, bound, micro, compute, virtual).log_probs()

    def log_probs(adapters, params, batch):
        if pieces == 1 or len(batch["tokens"]) != rows:  # a batch of an evaluation
            return of_micro(adapters, params, batch)
        found = jax.lax.map(lambda micro: of_micro(adapters, params, micro), _split(batch, pieces))
        return found.swapaxes(0, 1).reshape(batch["tokens"].shape)

    return jax.jit(log_probs)


def make_eval_pairs(model: Model, config: Config) -> Callable:
    """Make `eval_pairs(adapters, params, batch)`: the sums of the objective's metrics over a batch,
    and their weight, without dropout or label smoothing.
    """
    compute = _compute(config, _kernel(model, config))
    settings = dataclasses.replace(config.objective, label_smoothing=0.0)
    objective = objectives.from_config(dataclasses.replace(config, objective=settings))

    def eval_pairs(adapters, params, batch):
        bound = Bound(bind(params, adapters, config.adapter), prefix(adapters, config.adapter))
        forward = Forward(model, compute, bound, params, None, batch)
        _, weight, sums = objectives.checked(objective, forward, batch, jax.random.key(0))
        return sums, weight

    return jax.jit(eval_pairs)
