"""Steps of a run that is given in epochs.

    steps = ceil(train.epochs * rows of an epoch / train.batch_size)

Rows are those of the batches, after packing. With several sources, an epoch is as many rows as they
have together; their weights determine how often each is seen in it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from lora_jax import data
from lora_jax.config import Config
from lora_jax.data import sets
from lora_jax.errors import UserError
from lora_jax.train import resume


def settle(
    config: Config,
    train: sets.TrainData,
    encoder: sets.Encoder,
    record: Mapping[str, Any] | None = None,
) -> Config:
    """Return the config with `train.steps` computed from `train.epochs`, if that is set.

    Raises:
        UserError: `train.steps` is also set, or the steps differ from those in `record`.
    """
    given = config.train
    if given.epochs is None:
        return config
    if given.steps is not None:
        raise UserError(
            f"train.steps={given.steps} and train.epochs={given.epochs:g} are both set; choose one"
        )
    loader = sets.make_loader(config, train, encoder, None, Console(quiet=True))
    steps = math.ceil(given.epochs * rows_of_epoch(loader, train.replay) / given.batch_size)
    config = dataclasses.replace(config, train=dataclasses.replace(given, steps=steps))
    if record is not None:
        resume.check_steps(record, config)
    return config


def rows_of_epoch(
    loader: data.Loader | data.Mixture | data.StreamLoader, replay: str | None = None
) -> float:
    """Count the rows in which every example of the training data occurs once, with the rows of the
    source `replay` among them.

    Raises:
        UserError: a stream, whose rows are not known.
    """
    if isinstance(loader, data.Mixture):
        own = {name: one.rows_per_epoch for name, one in loader.loaders.items() if name != replay}
        return sum(own.values()) / (1 - (loader.shares[replay] if replay else 0))
    if isinstance(loader, data.Loader):
        return loader.rows_per_epoch
    raise UserError(
        "train.epochs needs the number of rows, which a stream does not have; set train.steps"
    )
