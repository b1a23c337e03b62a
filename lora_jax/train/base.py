"""The frozen base of a run, as its adapters stand on it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lora_jax import adapters as methods
from lora_jax import formats
from lora_jax.config import SOFT, Config
from lora_jax.models.common import Model
from lora_jax.quantize import SCHEMES, quantize_tree
from lora_jax.targets import CHANGING_INITS
from lora_jax.train.model import text_tokens


def make_calibrate(config: Config, model: Model, tokenizer: Any) -> Callable | None:
    """What `adapters.init` runs the model with, for adapters that start from what it does; None for
    the others.
    """
    if config.adapter.method in SOFT:
        tokens = text_tokens(config.adapter, tokenizer)
        return methods.as_model_sees(model, config.adapter, tokens)
    return None


def load(
    config: Config,
    source: Path,
    model: Model,
    mesh: Mesh,
    key: jax.Array,
    calibrate: Callable | None = None,
) -> tuple[Mapping, Mapping]:
    """The base as the run uses it, and fresh adapters; `calibrate` as in `adapters.init`.

    An init that takes its part out of the base sees the weights of the files; what is left of them
    is quantised then (arXiv 2404.02948, section 4). The others stand on the quantised base.

    Raises:
        UserError: what `formats.read_params` refuses.
    """
    params, quantize_later = _read(config, source, model, mesh)
    params, adapters = methods.init(key, params, config.adapter, calibrate)
    return (quantize_tree(params, quantize_later) if quantize_later else params), adapters


def load_under(
    config: Config, source: Path, model: Model, mesh: Mesh, adapters: Mapping
) -> Mapping:
    """The base that `adapters` stand on: the one that `load` gave when they were fresh.

    Raises:
        UserError: what `formats.read_params` refuses.
    """
    params, quantize_later = _read(config, source, model, mesh)
    params = methods.residual(params, adapters, config.adapter)
    return quantize_tree(params, quantize_later) if quantize_later else params


def _read(config: Config, source: Path, model: Model, mesh: Mesh) -> tuple[Mapping, str | None]:
    """The weights, and the scheme that they are to be quantised with after the init."""
    if config.base_dtype in SCHEMES and config.adapter.init in CHANGING_INITS:
        return formats.read_params(source, model, mesh), config.base_dtype
    return formats.read_params(source, model, mesh, config.base_dtype), None
