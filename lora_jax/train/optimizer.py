"""One optax `multi_transform` over the joint tree of frozen base and trainable adapters.

    joint tree  model/layers/self_attn/q_proj/{kernel, lora_a, lora_b}
    labels                                    frozen,  lora_a, lora_b

The train step differentiates and updates the adapters alone; the same transformation over the joint
tree gives the same update, because labels depend on paths only and frozen leaves get neither
gradient, norm nor state.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from lora_jax import tree
from lora_jax.config import TrainConfig

TRAINABLE = ("lora_a", "lora_b")


def join(params: Mapping, adapters: Mapping) -> dict:
    """Base and adapters in one tree; they never share a path."""
    return tree.unflatten(tree.flatten(params) | tree.flatten(adapters))


def label_tree(parameters: Mapping) -> dict:
    """The label of every leaf: its own name if it trains, else `frozen`."""
    labels = {
        path: path[-1] if path[-1] in TRAINABLE else "frozen" for path in tree.flatten(parameters)
    }
    return tree.unflatten(labels)


def make_schedule(config: TrainConfig) -> Callable[[Any], Any]:
    """Learning rate of step 0, 1, ...: linear warm-up, then constant, linear or cosine down to
    `final_rate`.

    The first step already moves: step i of a warm-up over n steps has rate (i + 1) / n of the peak.
    The last step has the rate just above the end of the decay, so no step has rate zero.
    """
    peak, warm = config.learning_rate, config.warmup_steps
    rest = max(1, config.steps - warm)

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


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW on the trainable labels, nothing on frozen leaves, one global clip over all trainable
    leaves before it.
    """
    adamw = optax.adamw(
        make_schedule(config),
        config.beta1,
        config.beta2,
        config.epsilon,
        weight_decay=config.weight_decay,
    )
    by_label: dict[Any, Any] = dict.fromkeys(TRAINABLE, adamw)
    by_label["frozen"] = optax.set_to_zero()
    update = optax.multi_transform(by_label, label_tree)
    if config.grad_clip is None:
        return update

    def trains(parameters: Mapping) -> dict:
        return tree.unflatten(
            {
                path: label != "frozen"
                for path, label in tree.flatten(label_tree(parameters)).items()
            }
        )

    return optax.chain(optax.masked(optax.clip_by_global_norm(config.grad_clip), trains), update)
