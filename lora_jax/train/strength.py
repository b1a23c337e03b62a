"""Adapters at another strength: a multiple of their update of the base."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from lora_jax import formats
from lora_jax.adapters.combine import Part, combine
from lora_jax.adapters.updates import Combined
from lora_jax.config import AdapterConfig
from lora_jax.errors import UserError
from lora_jax.models.common import Model
from lora_jax.session import Session


def check_scale(scale: float) -> None:
    """Check the value of `--scale`.

    Raises:
        UserError: zero, which is the base, or no finite number.
    """
    if not math.isfinite(scale) or scale == 0:
        raise UserError(f"--scale {scale:g} must be a finite number other than zero")


def with_strength(
    source: Path, model: Model, adapters: Mapping, config: AdapterConfig, scale: float
) -> Combined:
    """Return plain adapters with `scale` times the update of `adapters`; fully trained weights
    move as far from the base. `source` is the directory of the base.

    Raises:
        UserError: adapters without an update that can be multiplied.
    """
    check_scale(scale)
    if not config.trains_lora or config.use_dora:
        kind = "use_dora=true" if config.trains_lora else f"method={config.method}"
        raise UserError(f"--scale {scale:g} needs LoRA, and the adapter has {kind}")
    with formats.open_matrices(source, model) as read:
        return combine(model.params, [Part(adapters, config, scale)], read=read)


def session_of(session: Session, made: Combined) -> Session:
    """Return the session of adapters that `with_strength` made from those of `session`."""
    return dataclasses.replace(
        session, config=dataclasses.replace(session.config, adapter=made.config), loaded=None
    )
