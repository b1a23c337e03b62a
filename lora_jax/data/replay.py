"""General text among the training data, which keeps what the model could do."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console

from lora_jax.config import Config
from lora_jax.data.datasets import DataSet, TrainData
from lora_jax.data.examples import Example
from lora_jax.errors import UserError


def add_replay(
    config: Config,
    train: TrainData,
    examples: Sequence[Example],
    regression: DataSet | None,
    console: Console,
) -> TrainData:
    """Return the training data with the examples of `data.replay` as one more set, whose rows are
    `data.replay_share` of all. With `objective.base_kl` they are compared with the base. Examples
    that the regression is measured on are left out.

    Raises:
        UserError: no others are left.
    """
    source, share = str(config.data.replay), config.data.replay_share
    measured = {one.tokens.tobytes() for one in regression.examples} if regression else set()
    kept = [one for one in examples if one.tokens.tobytes() not in measured]
    if not kept:
        raise UserError(
            f"data.replay={source!r}: all of its {len(examples)} rows are in data.regression too, "
            "which measures what other text costs; give other rows"
        )
    if len(kept) < len(examples):
        both = len(examples) - len(kept)
        console.print(f"data.replay: {both} rows left out, as they are in data.regression too")
    if config.objective.base_kl:
        kept = [dataclasses.replace(one, replay=True) for one in kept]
    name = source if source not in train.sets else f"{source} (replay)"
    weight = sum(train.weights.values()) * share / (1 - share)
    return TrainData(
        {**train.sets, name: DataSet([], kept)}, {**train.weights, name: weight}, replay=name
    )
