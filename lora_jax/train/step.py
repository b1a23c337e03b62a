"""The compiled functions of a run. No I/O here.

    train_step(adapters, opt_state, params, batch, step_key) -> (adapters, opt_state, metrics)

`params` is an input only: never returned, never copied. `adapters` and `opt_state` are donated.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax import tree
from lora_jax.adapters import bind, prefix
from lora_jax.config import Config
from lora_jax.errors import UserError
from lora_jax.models.common import Execution, Model
from lora_jax.nn import kernels
from lora_jax.nn.virtual import Virtual
from lora_jax.train.loss import load_balancing_loss, next_token_sums

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
    """Weighted negative log-likelihood (nats) and weights of a batch, summed. `kernel`: one of
    `kernels.NAMES`.
    """
    module = model.module(bound)
    hidden = _run(module.hidden, batch, config, remat, kernel, virtual)[0]
    return next_token_sums(module, hidden, batch, config.train.loss_chunk)


def _kernel(model: Model, config: Config, placement: Any = None) -> str:
    """What `train.attention` means on the devices of `placement`, or of this process."""
    shardings = jax.tree.leaves(placement)
    device = next(iter(shardings[0].device_set)) if shardings else jax.devices()[0]
    settings = config.train
    return kernels.choose(settings.attention, model.config, settings.compute_dtype, device)


def _run(
    method: Callable,
    batch: Batch,
    config: Config,
    remat: str,
    kernel: str,
    virtual: Virtual | None = None,
) -> Any:
    """Of `module.hidden` and its like, in training and where its results are measured."""
    beside = {name: batch[name] for name in ("token_types",) if name in batch}
    return method(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        execution=Execution(jnp.dtype(config.train.compute_dtype), remat, kernel),
        **(beside if virtual is None else beside | {"prefix": virtual}),
    )


def check_experts(model: Model, config: Config) -> None:
    """Raise a UserError for a router_aux_loss_coef where the model has no experts."""
    coefficient, leaves = config.train.router_aux_loss_coef, tree.flatten(model.params)
    if coefficient and not any(tree.is_router(path, leaves) for path in leaves):
        raise UserError(
            f"train.router_aux_loss_coef={coefficient} is for experts, and the model has none; "
            "leave it at 0"
        )


def make_train_step(
    model: Model, config: Config, optimizer: optax.GradientTransformation, placement: Any = None
) -> Callable:
    """The jitted step. Metrics are float32 scalars: loss (nats per supervised token), grad_norm
    (before clipping), supervised_tokens (sum of the weights). A step whose loss or gradient is not
    finite changes nothing: the state that came in goes out.

    With `train.router_aux_loss_coef` the gradient is that of loss + coefficient * router_aux_loss,
    a further metric: `load_balancing_loss` over the real tokens of a micro-batch, and of these the
    mean. Unlike everything else it depends on how the batch is split.

    `placement` holds the shardings of (adapters, opt_state): they come out as they went in, and the
    second step runs the program of the first. Without it the compiler chooses. Optimizer state in
    host memory comes to the device for the update alone.

    Raises:
        UserError: a router_aux_loss_coef, and the model has no experts; as `kernels.choose`.
    """
    rows = config.train.batch_size
    pieces = rows // (config.train.micro_batch_size or rows)
    coefficient = config.train.router_aux_loss_coef
    check_experts(model, config)
    kernel = _kernel(model, config, placement)

    def micro_loss(adapters, params, micro, key, total):
        """What is differentiated, nats, and the sums for the metrics."""
        bound = bind(params, adapters, config.adapter, key)
        virtual, remat = prefix(adapters, config.adapter), config.train.remat
        if not coefficient:
            nll, weight = batch_sums(model, bound, micro, config, remat, kernel, virtual)
            return nll, {"nll": nll, "weight": weight}
        module = model.module(bound)
        run = module.hidden_and_routing
        hidden, _, routing = _run(run, micro, config, remat, kernel, virtual)
        nll, weight = next_token_sums(module, hidden, micro, config.train.loss_chunk)
        balance = load_balancing_loss(routing)
        share = total / pieces  # the sum is divided by `total` in the end
        sums = {"nll": nll, "weight": weight, "balance": balance}
        return nll + coefficient * share * balance, sums

    def train_step(adapters, opt_state, params, batch, step_key):
        value_and_grad = jax.value_and_grad(micro_loss, has_aux=True)
        total = batch["loss_weights"][:, 1:].sum()
        if pieces == 1:
            (_, sums), grads = value_and_grad(adapters, params, batch, step_key, total)
        else:
            # Every micro-batch takes rows from all over the batch, so that each device keeps its
            # own.
            micros = jax.tree.map(
                lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch
            )

            def accumulate(sums, micro_and_key):
                micro, key = micro_and_key
                (_, own), grads = value_and_grad(adapters, params, micro, key, total)
                return jax.tree.map(jnp.add, sums, (own, grads)), None

            names = ("nll", "weight", "balance") if coefficient else ("nll", "weight")
            zeros = (dict.fromkeys(names, jnp.float32(0)), jax.tree.map(jnp.zeros_like, adapters))
            keys = jax.random.split(step_key, pieces)
            (sums, grads), _ = jax.lax.scan(accumulate, zeros, (micros, keys))
        weight = sums["weight"]
        grads = jax.tree.map(lambda g: g / weight, grads)
        if placement is not None:
            opt_state = jax.tree.map(_on_device, opt_state, placement[1])
        updates, moved = optimizer.update(grads, opt_state, adapters)
        metrics = {
            "loss": sums["nll"] / weight,
            "grad_norm": optax.tree.norm(grads),
            "supervised_tokens": weight,
        }
        if coefficient:
            metrics["router_aux_loss"] = sums["balance"] / pieces
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        state = (optax.apply_updates(adapters, updates), moved)
        adapters, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old), state, (adapters, opt_state)
        )
        return adapters, opt_state, metrics

    out_shardings = None if placement is None else (*placement, None)
    return jax.jit(train_step, donate_argnums=(0, 1), out_shardings=out_shardings)


def _on_device(x: jax.Array, sharding: Any) -> jax.Array:
    if sharding.memory_kind in (None, "device"):
        return x
    return jax.device_put(x, sharding.with_memory_kind("device"))


def make_classify(model: Model, config: Config) -> Callable:
    """Make `classify(adapters, params, batch)` -> logits (b, t, labels) in float32, at every token
    those of its text, dropout off.
    """

    kernel = _kernel(model, config)

    def classify(adapters, params, batch):
        module = model.module(bind(params, adapters, config.adapter))
        hidden = _run(module.hidden, batch, config, "none", kernel)[0]
        return module.logits(hidden).astype(jnp.float32)

    return jax.jit(classify)


def make_eval_step(model: Model, config: Config) -> Callable:
    """`eval_step(adapters, params, batch)` -> summed negative log-likelihood and weights, dropout
    off.
    """

    kernel = _kernel(model, config)

    def eval_step(adapters, params, batch):
        bound, virtual = bind(params, adapters, config.adapter), prefix(adapters, config.adapter)
        return batch_sums(model, bound, batch, config, kernel=kernel, virtual=virtual)

    return jax.jit(eval_step)
