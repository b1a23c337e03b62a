"""One optax `multi_transform` over the joint tree of frozen base and trainable adapters.

    joint tree  model/layers/self_attn/q_proj/{kernel, lora_a, lora_b, magnitude}
    labels                                    frozen,  lora_a, lora_b, magnitude
    joint tree  lm_head/{kernel, full_kernel}
    labels               frozen, full
    joint tree  prompt_embeddings, prefix_{keys,values,gate}
    labels      prompt

The train step differentiates and updates the adapters alone; the same transformation over the joint
tree gives the same update, because labels depend on paths only and frozen leaves get neither
gradient, norm nor state.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax import tree
from lora_jax.config import AdapterConfig, TrainConfig
from lora_jax.leaves import FROZEN, LABELS, label_of
from lora_jax.targets import Trainable

# With epsilon 0, 0 / 0 is read as 0, and gradients whose squares are no float32 move little.
_LEAST_EPSILON = 1e-18


def join(params: Mapping, adapters: Mapping) -> dict:
    """Join base and adapters in one tree; they never share a path."""
    return tree.unflatten(tree.flatten(params) | tree.flatten(adapters))


def label_tree(parameters: Mapping, freeze_a: bool = False) -> dict:
    """Return the label of every leaf, by its name alone (`lora_jax.leaves`)."""
    return tree.unflatten({path: label_of(path[-1], freeze_a) for path in tree.flatten(parameters)})


def make_schedule(config: TrainConfig) -> Callable[[Any], Any]:
    """Learning rate of step 0, 1, ...: linear warm-up, then constant, linear or cosine down to
    `final_rate`.

    The first step already moves: step i of a warm-up over n steps has learning rate (i + 1) / n of
    the peak. The last step is one before the end of the decay, so no step has learning rate zero.

    Example:
        >>> from lora_jax.config import TrainConfig
        >>> from lora_jax.train.optimizer import make_schedule
        >>> rate = make_schedule(TrainConfig(steps=10, learning_rate=1.0, schedule="linear"))
        >>> [round(float(rate(step)), 2) for step in (0, 5, 9)]
        [1.0, 0.5, 0.1]
    """
    peak, warm = config.learning_rate, config.warmup_steps
    rest = max(1, config.total_steps - warm)

    def schedule(count):
        done = jnp.clip((count - warm) / rest, 0.0, 1.0)
        match config.schedule:
            case "linear":
                shape = 1.0 - (1.0 - config.final_rate) * done
            case "cosine":
                shape = config.final_rate + (1.0 - config.final_rate) * 0.5 * (
                    1.0 + jnp.cos(jnp.pi * done)
                )
            case _:
                shape = 1.0
        return peak * jnp.minimum(1.0, (count + 1) / max(1, warm)) * shape

    return schedule


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Numbers:
    """Numbers of AdamW: of a config, or arrays inside of a step whose members differ.

    rate: learning rate, or a function from the step to it
    grad_clip: infinite without clipping
    ratio: learning rate of `lora_b` over that of the others
    """

    rate: Any
    beta1: Any
    beta2: Any
    epsilon: Any
    weight_decay: Any
    grad_clip: Any
    ratio: Any


def numbers_of(config: TrainConfig, adapter: AdapterConfig) -> Numbers:
    """Return the numbers of a config, with its schedule as the rate."""
    return Numbers(
        rate=make_schedule(config),
        beta1=config.beta1,
        beta2=config.beta2,
        epsilon=max(config.epsilon, _LEAST_EPSILON),
        weight_decay=config.weight_decay,
        grad_clip=math.inf if config.grad_clip is None else config.grad_clip,
        ratio=adapter.lora_plus_ratio,
    )


def make_optimizer(
    config: TrainConfig, adapter: AdapterConfig | Trainable | None = None
) -> optax.GradientTransformation:
    """Make AdamW for the trainable labels, after one global clip over all trainable leaves; frozen
    leaves get no update. `lora_plus_ratio` of `adapter` is the learning rate of `lora_b` over that
    of the others; `freeze_a` freezes `lora_a`.
    """
    adapter = adapter.config if isinstance(adapter, Trainable) else adapter or AdapterConfig()
    return make_adamw(numbers_of(config, adapter), adapter.freeze_a)


def _times(ratio: Any, rate: Any) -> Any:
    """Return a learning rate, or a function from the step to it, times a ratio."""
    if isinstance(ratio, float) and ratio == 1:
        return rate
    if not callable(rate):
        return ratio * rate
    schedule: Callable[[Any], Any] = rate
    return lambda count: ratio * schedule(count)


def make_adamw(numbers: Numbers, freeze_a: bool = False) -> optax.GradientTransformation:
    """Make the optimizer of `make_optimizer` from its numbers. Arrays among them do not change the
    structure of its state; with an infinite `grad_clip` that is no array, there is no clipping.
    """

    def adamw(ratio: Any) -> optax.GradientTransformation:
        return optax.adamw(
            _times(ratio, numbers.rate),
            *(numbers.beta1, numbers.beta2, numbers.epsilon),
            weight_decay=numbers.weight_decay,
        )

    def labels(parameters: Mapping) -> dict:
        return label_tree(parameters, freeze_a)

    by_label: dict[Any, Any] = {
        name: adamw(numbers.ratio if name == "lora_b" else 1.0) for name in LABELS
    }
    by_label[FROZEN] = optax.set_to_zero()
    update = optax.multi_transform(by_label, labels)
    if isinstance(numbers.grad_clip, float) and math.isinf(numbers.grad_clip):
        return update

    def trains(parameters: Mapping) -> dict:
        return jax.tree.map(lambda label: label != FROZEN, labels(parameters))

    return optax.chain(optax.masked(optax.clip_by_global_norm(numbers.grad_clip), trains), update)
