"""Rotary positions (arXiv 2104.09864), and their extensions for long texts.

`parameters` is one `rope_parameters` mapping of a config: rope_theta, rope_type and its fields.

    default     plain
    linear      every frequency divided by `factor` (arXiv 2306.15595)
    dynamic     theta grows with the length of the text (NTK scaling)
    llama3      low frequencies divided, high ones kept, smooth between
    yarn        as llama3 by another ramp, and cosines scaled (arXiv 2309.00071)
    longrope    two lists of divisors, for short and for long texts (arXiv 2402.13753)
    proportional  as linear, for a share of the pairs of a whole head; the others do not turn

`NO_ROTATION` is for layers that do not rotate; config.json cannot name it.

With dynamic and longrope the length of the text chooses the frequencies of all its tokens. In a
packed row it is the length of each segment, without padding, with virtual tokens. When a text in a
cache grows to a length at which they change (`next_change`), the cache must be recomputed.

Inverse frequencies follow transformers operation by operation, since the position multiplies their
last bits. Powers are computed in float64 and rounded once, which gives the same bits on every
processor.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.config import is_finite

ORIGINAL = "original_max_position_embeddings"
# Fields that each rope_type requires in addition to rope_theta, and optional ones.
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
    "proportional": ((), ("factor", "partial_rotary_factor")),
}
USUAL = tuple(name for name in FIELDS if name != "proportional")  # types of most families
NO_ROTATION = {"rope_type": "none", "rope_theta": 1.0}  # every position has the angle 0
_LISTS = ("short_factor", "long_factor")
_ABOVE_ZERO = ("rope_theta", "factor", "partial_rotary_factor", ORIGINAL)


def problems(head_dim: int, parameters: Mapping[str, Any]) -> Iterator[str]:
    """Yield problems with the values of the fields of a rope_type."""
    numbers = {name: parameters[name] for name in parameters if name not in ("rope_type", *_LISTS)}
    truncate = numbers.pop("truncate", True)
    if not isinstance(truncate, bool):
        yield f"truncate={truncate!r} is not true or false"
    for name, value in numbers.items():
        if not _is_number(value):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            yield f"{name}={value!r} is not a {'finite ' * number}number"
        elif name in _ABOVE_ZERO and value <= 0:
            yield f"{name}={value!r} is not above 0"
    share = parameters.get("partial_rotary_factor", 1.0)
    if not _is_number(share):
        return
    if share > 1:
        yield f"partial_rotary_factor={share!r} is above 1"
    pairs = len(range(0, rotary_features(head_dim, parameters), 2))
    if parameters["rope_type"] == "dynamic" and pairs < 2:
        yield f"rope_type='dynamic' needs two pairs of features in a head, not {pairs}"
    for name in _LISTS:
        values = parameters.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or not all(_is_number(x) and x > 0 for x in values):
            yield f"{name}={values!r} is not a list of finite numbers above 0"
        elif len(values) != pairs:
            yield f"{name} has {len(values)} numbers, for {pairs} rotated pairs in a head"


def _is_number(value: Any) -> bool:
    return is_finite(value) and not isinstance(value, bool)


def rotary_features(head_dim: int, parameters: Mapping[str, Any]) -> int:
    """Return the number of rotated features of a head, which are the first ones."""
    if parameters.get("rope_type") == "proportional":
        return head_dim
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def by_length(parameters: Mapping[str, Any]) -> bool:
    """Return True if frequencies depend on the length of the text."""
    return parameters["rope_type"] in ("dynamic", "longrope")


def next_change(parameters: Mapping[str, Any], length: int) -> int | None:
    """Return the next length at which a text of `length` tokens has other frequencies than with
    one token less; None if there is none.
    """
    match parameters["rope_type"]:
        case "dynamic":
            return max(length, int(parameters["max_position_embeddings"])) + 1
        case "longrope":
            change = int(parameters[ORIGINAL]) + 1
            return change if length < change else None
    return None


def text_lengths(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Return the length (b, t) of the text of each token: the last position of its segment plus 1.
    The tokens of a segment must be adjacent.
    """
    time = positions.shape[1]
    last = jnp.pad(
        segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True
    )
    ends = jax.lax.cummin(jnp.where(last, jnp.arange(time), time), axis=1, reverse=True)
    return jnp.take_along_axis(positions, ends, axis=1) + 1


def rope(
    positions: jax.Array,
    head_dim: int,
    parameters: Mapping[str, Any],
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines (b, t, 1, features) in float32 for positions (b, t). The text
    lengths, `lengths` (b, t), are needed only if frequencies depend on them (`by_length`).
    """
    dim = rotary_features(head_dim, parameters)
    if not by_length(parameters):
        frequencies = jnp.asarray(inverse_frequencies(dim, parameters))
    elif lengths is None:
        raise ValueError(f"rope_type={parameters['rope_type']!r} needs the lengths of the texts")
    else:
        frequencies = frequencies_of(lengths[:, :, None], dim, parameters)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    scale = attention_factor(parameters)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate queries or keys (b, t, heads, h) by their positions. The first half of the features is
    paired with the second, as in Hugging Face models; features beyond those of `cos_sin` are kept.
    """
    cos, sin = (part.astype(x.dtype) for part in cos_sin)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = jnp.split(turned, 2, axis=-1)
    turned = turned * cos + jnp.concatenate([-second, first], axis=-1) * sin
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def rotate_pairs(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate as `rotate`, with each even feature paired with the next one."""
    features = cos_sin[0].shape[-1]
    cos, sin = (part[..., : features // 2].astype(x.dtype) for part in cos_sin)
    first, second = x[..., :features:2], x[..., 1:features:2]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.reshape(*x.shape[:-1], features)
    rest = x[..., features:]
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def inverse_frequencies(dim: int, parameters: Mapping[str, Any], long: bool = False) -> np.ndarray:
    """Return inverse frequencies (dim / 2,) in float32. For `dynamic` and `longrope` they are those
    of texts up to the original length; with `long`, those of `longrope` for longer ones.
    """
    theta = parameters["rope_theta"]
    match parameters["rope_type"]:
        case "dynamic":
            factor, limit = parameters["factor"], parameters["max_position_embeddings"]
            theta *= ((factor * limit / limit) - (factor - 1)) ** (dim / (dim - 2))
    periods = _power(theta, _exponents(dim))  # over 2 pi
    match parameters["rope_type"]:
        case "none":
            return np.zeros_like(periods)
        case "linear":
            return 1 / periods / np.float32(parameters["factor"])
        case "proportional":
            pairs = int(parameters.get("partial_rotary_factor", 1.0) * dim // 2)
            kept = 1 / periods / np.float32(parameters.get("factor", 1.0))
            return np.where(np.arange(len(kept)) < pairs, kept, np.float32(0))
        case "llama3":
            return _llama3(1 / periods, parameters)
        case "yarn":
            return _yarn(periods, dim, parameters)
        case "longrope":
            divisors = parameters["long_factor" if long else "short_factor"]
            return 1 / (np.asarray(divisors, np.float32) * periods)
    return 1 / periods


def _exponents(dim: int) -> np.ndarray:
    return np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)


def _power(base: float, exponents: np.ndarray) -> np.ndarray:
    """Return base ** exponents in float32, rounded once. Float32 powers of NumPy may be off by one
    bit, and differ between processors.
    """
    return (np.float64(np.float32(base)) ** exponents.astype(np.float64)).astype(np.float32)


def frequencies_of(lengths: jax.Array, dim: int, parameters: Mapping[str, Any]) -> jax.Array:
    """Return inverse frequencies (b, t, dim / 2) of tokens in texts of `lengths` (b, t, 1)."""
    short = inverse_frequencies(dim, parameters)
    if parameters["rope_type"] == "longrope":
        long = inverse_frequencies(dim, parameters, long=True)
        return jnp.where(lengths > parameters[ORIGINAL], long, short)
    # The last bits equal those of transformers only in the same order of operations; the compiler
    # would turn 1 / x ** y into x ** -y, and a division by a constant into a product.
    barrier = jax.lax.optimization_barrier
    limit, factor = parameters["max_position_embeddings"], parameters["factor"]
    beyond = lengths > limit
    over = jnp.where(beyond, jnp.float32(limit), 1)
    ratio = barrier(factor * lengths.astype(jnp.float32)) / over - (factor - 1)
    ratio = jnp.where(beyond, ratio, 1)
    # ratio ** (dim / (dim - 2)), an exponent that has more digits than float32.
    grown = ratio + ratio * jnp.expm1(jnp.log(ratio) * (2 / (dim - 2)))
    base = np.float32(parameters["rope_theta"]) * grown
    return jnp.where(beyond, 1 / barrier(base ** _exponents(dim)), short)


def _llama3(inverse: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    factor, original = np.float32(parameters["factor"]), parameters[ORIGINAL]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    # torch computes a number divided by a tensor as the number times the reciprocal.
    wavelength = (1 / inverse) * np.float32(2 * math.pi)
    smooth = (1 / wavelength) * np.float32(original) - np.float32(low)
    smooth = smooth / np.float32(high - low)
    between = (1 - smooth) * inverse / factor + smooth * inverse
    is_low, is_high = wavelength > original / low, wavelength < original / high
    return np.where(is_low, inverse / factor, np.where(is_high, inverse, between))


def _yarn(periods: np.ndarray, dim: int, parameters: Mapping[str, Any]) -> np.ndarray:
    def dimension(rotations: float) -> float:
        """Return the feature pair with this many rotations within the original length."""
        length = parameters[ORIGINAL]
        theta = float(parameters["rope_theta"])
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    stretched = 1 / (np.float32(parameters["factor"]) * periods)
    return stretched * (1 - kept) + 1 / periods * kept


def attention_factor(parameters: Mapping[str, Any]) -> float:
    """Return the factor of cosines and sines."""
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
