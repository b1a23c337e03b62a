"""Learning rates step by step, and what the optimizer does with its settings."""

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.train.optimizer import join, label_tree, make_optimizer, make_schedule

from .tiny import make_config

CASES = [
    ("constant", 4, 0, 0.0, [1, 1, 1, 1]),
    ("constant", 5, 2, 0.5, [0.5, 1, 1, 1, 1]),
    ("linear", 4, 0, 0.0, [1, 0.75, 0.5, 0.25]),
    ("linear", 4, 0, 0.2, [1, 0.8, 0.6, 0.4]),
    ("linear", 6, 2, 0.0, [0.5, 1, 1, 0.75, 0.5, 0.25]),
    ("linear", 1, 0, 0.0, [1]),
    ("linear", 2, 4, 0.0, [0.25, 0.5]),  # the warm-up outlasts the run
    ("linear", 2, 2, 0.0, [0.5, 1]),
    ("cosine", 4, 0, 0.0, [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
    ("cosine", 2, 0, 0.5, [1, 0.75]),
    ("cosine", 4, 2, 0.0, [0.5, 1, 1, 0.5]),
]


@pytest.mark.parametrize(("schedule", "steps", "warmup", "final", "shape"), CASES)
def test_rates_of_all_steps(schedule, steps, warmup, final, shape):
    settings = (schedule, steps, warmup, final)
    names = ("schedule", "steps", "warmup_steps", "final_rate")
    overrides = [f"train.{name}={value}" for name, value in zip(names, settings, strict=True)]
    rate = make_schedule(make_config("train.learning_rate=0.1", *overrides).train)
    assert np.allclose([rate(i) for i in range(steps)], 0.1 * np.asarray(shape), rtol=1e-6)
    assert all(rate(i) > 0 for i in range(steps))
    assert np.allclose(rate(jnp.int32(0)), rate(0))  # as optax calls it, inside the step


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decay_ends_at_the_final_rate_and_stays(schedule):
    config = make_config(f"train.schedule={schedule}", "train.steps=4", "train.final_rate=0.25")
    rate = make_schedule(config.train)
    assert np.allclose([rate(4), rate(9)], 0.25 * config.train.learning_rate)


def test_labels_depend_on_the_last_key_alone():
    params = {"a": {"kernel": 0}, "lm_head": {"kernel": 0}}
    joint = join(params, {"a": {"lora_a": 0, "lora_b": 0}})
    assert label_tree(joint) == {
        "a": {"kernel": "frozen", "lora_a": "lora_a", "lora_b": "lora_b"},
        "lm_head": {"kernel": "frozen"},
    }


def test_the_first_step_moves_by_the_rate_and_decays_weights():
    adapters = {"q": {"lora_a": jnp.full((2, 2), 2.0), "lora_b": jnp.zeros((2, 2))}}
    grads = {"q": {"lora_a": jnp.full((2, 2), -3.0), "lora_b": jnp.full((2, 2), 1e-3)}}
    config = make_config(
        "train.learning_rate=0.1",
        "train.weight_decay=0.5",
        "train.grad_clip=null",
        "train.schedule=constant",
    )
    optimizer = make_optimizer(config.train)
    updates, _ = optimizer.update(grads, optimizer.init(adapters), adapters)
    # AdamW's first step: the gradient's sign and the weight's decay, both times the rate.
    assert np.allclose(updates["q"]["lora_a"], 0.1 * (1 - 0.5 * 2.0), atol=1e-5)
    assert np.allclose(updates["q"]["lora_b"], -0.1, atol=1e-5)


def test_without_an_epsilon_a_gradient_of_zero_moves_nothing():
    adapters = {"q": {"lora_a": jnp.ones((2, 2)), "lora_b": jnp.zeros((2, 2))}}
    grads = {"q": {"lora_a": jnp.zeros((2, 2)), "lora_b": jnp.full((2, 2), 1e-25)}}
    config = make_config("train.epsilon=0", "train.learning_rate=0.1", "train.grad_clip=null")
    optimizer = make_optimizer(config.train)
    updates, _ = optimizer.update(grads, optimizer.init(adapters), adapters)
    assert not updates["q"]["lora_a"].any()
    assert abs(updates["q"]["lora_b"]).max() < 0.1
