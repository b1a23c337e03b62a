"""The frozen base of a run, from which fresh adapters may subtract their factors."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from lora_jax import adapters as methods
from lora_jax import formats
from lora_jax.config import Config
from lora_jax.models.common import Model
from lora_jax.quantize import SCHEMES, quantize_tree
from lora_jax.report.progress import SILENT, Display


def load_base(
    config: Config,
    source: Path,
    model: Model,
    mesh: Mesh,
    key: jax.Array,
    calibrate: Callable | None = None,
    display: Display = SILENT,
) -> tuple[Config, Mapping, Mapping]:
    """Return the config with the ranks of the adapters, the base as the run uses it, and fresh
    adapters. `calibrate` is that of `adapters.init`.

    An init that subtracts its factors from the base, or corrects its quantisation, reads the float
    weights; the remainder is then quantised (arXiv 2404.02948, section 4). Other inits read the
    quantised base.

    Raises:
        UserError: what `formats.read_params` and `adapters.init` refuse.
    """
    params, scheme = _read(config, source, model, mesh, config.adapter.needs_float_base, display)
    here = contextlib.nullcontext() if calibrate is None else jax.set_mesh(mesh)
    with here, display.phase(f"starting the adapters ({config.adapter.init})"):
        if calibrate is not None:
            ranked = methods.redistribute(key, params, config.adapter, calibrate)
            config = dataclasses.replace(config, adapter=ranked)
        params, adapters = methods.init(key, params, config.adapter, calibrate, scheme=scheme)
    return config, quantize_tree(params, scheme) if scheme else params, adapters


def reload_base(
    config: Config,
    source: Path,
    model: Model,
    mesh: Mesh,
    adapters: Mapping,
    display: Display = SILENT,
) -> Mapping:
    """Return the base under `adapters`: the one that `load_base` returned with them.

    Raises:
        UserError: what `formats.read_params` refuses.
    """
    params, scheme = _read(config, source, model, mesh, config.adapter.changes_base, display)
    params = methods.residual(params, adapters, config.adapter)
    return quantize_tree(params, scheme) if scheme else params


def _read(
    config: Config, source: Path, model: Model, mesh: Mesh, floats: bool, display: Display
) -> tuple[Mapping, str | None]:
    """Return the weights and, with `floats`, the scheme to quantise them with later."""
    later = config.base_dtype in SCHEMES and floats
    dtype = None if later else config.base_dtype
    return read_params(source, model, mesh, dtype, display), config.base_dtype if later else None


def read_params(
    source: Path, model: Model, mesh: Mesh, dtype: str | None, display: Display
) -> Mapping:
    """Call `formats.read_params` and show its progress."""
    count = len(jax.tree.leaves(model.params))
    with display.phase("loading weights", count, "arrays") as phase:
        return formats.read_params(source, model, mesh, dtype, phase.advance)
