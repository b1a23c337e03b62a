"""VeRA (arXiv 2310.11454): trained vectors that scale two random matrices shared by all targets.

    y = x W + lambda_b * ((lambda_d * (x A)) B)

params    model/layers/self_attn/q_proj/kernel                (layers, in, out)
adapters  vera_a, vera_b                                      (widest in, r), (r, widest out)
          model/layers/self_attn/q_proj/{lambda_d, lambda_b}  (layers, r), (layers, out)
bound     model/layers/self_attn/q_proj/kernel                LoraWeight(base, A, B)

A target takes the first rows of `vera_a` and the first columns of `vera_b`. These two never train.
They depend on `projection_prng_key` alone and equal PEFT's, so all adapters of one key and one set
of widths share them. `lambda_b` starts at zero.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.inits import Factors
from lora_jax.targets import Target, Trainable
from lora_jax.tree import Path


def init(found: Trainable) -> dict[Path, jax.Array]:
    """Return fresh adapters in float32."""
    matrices = projections(found.config.projection_prng_key, found.shared)
    adapters: dict[Path, jax.Array] = {
        (name,): jnp.asarray(matrix) for name, matrix in matrices.items()
    }
    for target in found.targets:
        start = jnp.full((*target.lead, 1, target.rank), found.config.d_initial, jnp.float32)
        adapters[(*target.path, "lambda_d")] = (start * _chosen(target))[..., 0, :]
        adapters[(*target.path, "lambda_b")] = jnp.zeros((*target.lead, target.shape[1]))
    return adapters


def factors(target: Target, small: Mapping[Path, Any], found: Trainable) -> Factors:
    """Return A lambda_d (..., in, rank) and B lambda_b (..., rank, out) of a target."""
    rows, columns = target.shape
    a, b = (jax.lax.stop_gradient(small[(name,)]) for name in ("vera_a", "vera_b"))
    d, scale = (small[(*target.path, name)][..., None, :] for name in ("lambda_d", "lambda_b"))
    return a[:rows] * d, b[:, :columns] * (scale * _chosen(target))


def _chosen(target: Target) -> np.ndarray:
    """Return 1 for layers that are adapted and 0 for the others, broadcastable to the weight."""
    return target.per_layer(np.asarray(target.ranks) > 0).astype(np.float32)


def projections(key: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return `vera_a` and `vera_b` in float32, as PEFT draws them with torch from a key.

    Both are uniform in +-sqrt(6 / fan), the fan being the columns of the matrix as PEFT stores it,
    transposed. torch seeds a Mersenne twister with the low 32 bits of the key and takes 24 bits of
    each draw.
    """
    generator = np.random.RandomState(key & 0xFFFFFFFF)
    found = {}
    for name in ("vera_a", "vera_b"):
        rows, columns = shapes[name][::-1]
        bound = np.float32(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns)))
        draws = generator.randint(0, 2**32, (rows, columns), np.uint32) & np.uint32(0xFFFFFF)
        # In float64, and rounded once: torch multiplies and adds in one operation.
        uniform = draws * 2.0**-24 * np.float64(bound + bound) - np.float64(bound)
        found[name] = np.ascontiguousarray(uniform.astype(np.float32).T)
    return found
