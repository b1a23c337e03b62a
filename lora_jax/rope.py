"""Rotary positions (arXiv 2104.09864), and the ways of stretching them that configs name.

`parameters` is one `rope_parameters` mapping of a config: rope_theta, rope_type and its fields.

    default     plain
    linear      every frequency divided by `factor` (arXiv 2306.15595)
    dynamic     theta grows with the length read so far (NTK scaling)
    llama3      low frequencies divided, high ones kept, smooth between
    yarn        as llama3 by another ramp, and cosines scaled (arXiv 2309.00071)
    longrope    two lists of divisors, for short and for long texts (arXiv 2402.13753)

Where frequencies depend on the length (dynamic, longrope), a token gets those of the text up to
itself: what a decoder with a cache computes token by token, so that generation and the full forward
agree.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ORIGINAL = "original_max_position_embeddings"
# What each rope_type needs besides rope_theta, and what it may have.
FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor",),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
}
_LISTS = ("short_factor", "long_factor")
_ABOVE_ZERO = ("rope_theta", "factor", "partial_rotary_factor", ORIGINAL)


def problems(head_dim: int, parameters: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the values of the fields that a rope_type has."""
    numbers = {name: parameters[name] for name in parameters if name not in ("rope_type", *_LISTS)}
    truncate = numbers.pop("truncate", True)
    if not isinstance(truncate, bool):
        yield f"truncate={truncate!r} is not true or false"
    for name, value in numbers.items():
        if not _is_number(value):
            yield f"{name}={value!r} is not a number"
        elif name in _ABOVE_ZERO and value <= 0:
            yield f"{name}={value!r} is not above 0"
    share = parameters.get("partial_rotary_factor", 1.0)
    if not _is_number(share):
        return
    if share > 1:
        yield f"partial_rotary_factor={share!r} is above 1"
    pairs = len(range(0, rotary_features(head_dim, parameters), 2))
    for name in _LISTS:
        values = parameters.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or not all(_is_number(x) and x > 0 for x in values):
            yield f"{name}={values!r} is not a list of numbers above 0"
        elif len(values) != pairs:
            yield f"{name} has {len(values)} numbers, and {pairs} pairs of features turn in a head"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rotary_features(head_dim: int, parameters: Mapping[str, Any]) -> int:
    """How many features of a head are rotated, from the first on."""
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def rope(
    positions: jax.Array, head_dim: int, parameters: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (b, t, 1, features) in float32 for positions (b, t)."""
    frequencies = _frequencies(positions, rotary_features(head_dim, parameters), parameters)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    scale = _attention_factor(parameters)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate queries or keys (b, t, heads, h) by their positions; halves are paired as in Hugging
    Face models, and features beyond those of `cos_sin` stay as they are.
    """
    cos, sin = (part.astype(x.dtype) for part in cos_sin)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = jnp.split(turned, 2, axis=-1)
    turned = turned * cos + jnp.concatenate([-second, first], axis=-1) * sin
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def _frequencies(positions: jax.Array, dim: int, parameters: Mapping[str, Any]) -> jax.Array:
    """Inverse frequencies (dim / 2,), or (b, t, dim / 2) where they depend on the position."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    theta = np.float32(parameters["rope_theta"])
    inverse = np.float32(1.0) / theta**exponents
    length = positions[:, :, None] + 1
    match parameters["rope_type"]:
        case "linear":
            return jnp.asarray(inverse / np.float32(parameters["factor"]))
        case "dynamic":
            limit, factor = parameters["max_position_embeddings"], parameters["factor"]
            ratio = factor * jnp.maximum(length, limit).astype(jnp.float32) / limit
            base = theta * (ratio - (factor - 1)) ** (dim / (dim - 2))
            return 1.0 / base**exponents
        case "llama3":
            return jnp.asarray(_llama3(inverse, parameters))
        case "yarn":
            return jnp.asarray(_yarn(inverse, dim, parameters))
        case "longrope":
            short, long = (
                inverse / np.asarray(parameters[f"{name}_factor"], np.float32)
                for name in ("short", "long")
            )
            return jnp.where(length > parameters[ORIGINAL], long, short)
    return jnp.asarray(inverse)


def _llama3(inverse: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelength = 2 * np.pi / inverse
    smooth = np.clip((parameters[ORIGINAL] / wavelength - low) / (high - low), 0, 1)
    return ((1 - smooth) * inverse / parameters["factor"] + smooth * inverse).astype(np.float32)


def _yarn(inverse: np.ndarray, dim: int, parameters: Mapping[str, Any]) -> np.ndarray:
    def dimension(rotations: float) -> float:
        """The feature pair that turns so many times within the original length."""
        length = parameters[ORIGINAL]
        theta = float(parameters["rope_theta"])
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
    ramp = np.clip(ramp, 0, 1).astype(np.float32)
    return inverse / np.float32(parameters["factor"]) * ramp + inverse * (1 - ramp)


def _attention_factor(parameters: Mapping[str, Any]) -> float:
    """What cosines and sines are multiplied with."""
    given = parameters.get("attention_factor")
    match parameters["rope_type"]:
        case "yarn" | "longrope" if given is not None:
            return float(given)
        case "yarn":
            one, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
            factor = parameters["factor"]
            if one and all_dim:
                return _yarn_size(factor, one) / _yarn_size(factor, all_dim)
            return _yarn_size(factor, 1.0)
        case "longrope":
            original = parameters[ORIGINAL]
            factor = parameters.get("factor") or parameters["max_position_embeddings"] / original
            return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0


def _yarn_size(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
