"""EVA (arXiv 2410.07170): lora_a along the directions in which the inputs of a weight vary most.

X (tokens, in) are the centred inputs of a weight. lora_a holds the r right singular vectors of X
with the largest singular values, each of norm 1, and lora_b is zero. A direction explains sigma^2 /
|X|^2 of the variance. As in PEFT, the mean is subtracted, only supervised tokens count, and the
largest entry of a direction is positive.

No inputs are stored. `weights.Probe` accumulates C Q during a backward pass, with C = X^T X (in,
in) and Q (in, k), so a few passes are a subspace iteration (Halko et al., arXiv 0909.4061) over all
weights at once. For k = in, the first pass is exact.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.inits import Factors
from lora_jax.config import AdapterConfig
from lora_jax.errors import UserError
from lora_jax.targets import Target, Trainable
from lora_jax.tree import Path, dotted, flatten, unflatten
from lora_jax.weights import Probe

_PASSES = 6  # on SmolLM2, 4 find 0.9999 of the variance that the best directions explain
_SPARE = 16  # columns of Q beyond twice the directions that are wanted
Spectrum = tuple[jax.Array, jax.Array]  # directions (layers, in, k), shares of the variance


def factors(
    key: jax.Array, params: Mapping, targets: Sequence[Target], calibrate: Callable
) -> dict[Path, Factors]:
    """Return, by target, `lora_a` (..., in, rank) and `lora_b` (..., rank, out) in float32, padding
    zero.

    Raises:
        UserError: as `measure`.
    """
    wanted: dict[Path, int] = {}
    for target in targets:
        wanted[target.weight] = max(target.rank, wanted.get(target.weight, 0))
    spectra, found = measure(key, params, wanted, calibrate), {}
    for target in targets:
        directions, _ = spectra[target.weight]
        b = jnp.zeros((*target.lead, target.rank, target.shape[1]))
        found[target.path] = (directions[..., : target.rank] * target.rank_mask(), b)
    return found


def measure(
    key: jax.Array, params: Mapping, wanted: Mapping[Path, int], calibrate: Callable
) -> dict[Path, Spectrum]:
    """Return, by weight, the leading directions of its inputs (..., in, wanted), and the share of
    the variance that each explains (..., wanted), largest first.

    `calibrate` maps parameters to the mean loss of some data, differentiably; it is a pytree, such
    as `jax.tree_util.Partial`. It runs up to 6 times forward and backward, with memory for two
    float32 arrays (..., in, 2 wanted + 16) for each weight.

    Raises:
        UserError: a weight whose inputs are not counted, or fewer tokens than directions.
    """
    leaves, bases = flatten(params), {}
    for path, count in wanted.items():
        shape = leaves[path].shape
        bases[path] = _first_basis(key, path, shape, min(shape[-2], 2 * count + _SPARE))

    exact = all(q.shape[-2] == q.shape[-1] for q in bases.values())
    products, energies = {}, {}
    for i in range(1 if exact else _PASSES):
        if i:
            bases = {path: jnp.linalg.qr(product)[0] for path, product in products.items()}
        moments = _count_inputs(bases, params, calibrate)
        if not i:
            _check_counts(moments, wanted)
        for path, q in bases.items():
            products[path], energies[path] = _without_mean(moments[path], q)
    return {
        path: _largest(q, products[path], energies[path], wanted[path]) for path, q in bases.items()
    }


def redistribute(
    key: jax.Array, params: Mapping, found: Trainable, calibrate: Callable
) -> AdapterConfig:
    """Return the config with ranks redistributed by explained variance.

    The directions of all modules compete, and as many are kept as the ranks add up to, at most
    `eva_rho` times its rank in each module. alpha changes with the rank, so alpha / rank does not.
    Modules without a kept direction are no longer targets.

    Raises:
        UserError: as `measure`.
    """
    config, targets = found.config, found.targets
    most = {  # by module; PEFT rounds as Python does
        (target, i): min(round(rank * config.eva_rho), *target.shape)
        for target in targets
        for i, rank in enumerate(target.ranks)
    }
    wanted: dict[Path, int] = {}
    for (target, _), count in most.items():
        wanted[target.weight] = max(count, wanted.get(target.weight, 0))
    spectra = measure(key, params, wanted, calibrate)
    shares, owners = [], []
    for (target, i), count in most.items():
        own = np.asarray(spectra[target.weight][1])
        shares += (own[i] if target.stacked else own)[:count].tolist()
        owners += [(target, i)] * count
    budget = sum(rank for target in targets for rank in target.ranks)
    ranks = dict.fromkeys(most, 0)
    for place in np.argsort(-np.asarray(shares), kind="stable")[:budget]:
        ranks[owners[place]] += 1
    names = {target.names[i]: rank for (target, i), rank in ranks.items() if rank}
    alphas = {
        target.names[i]: target.alphas[i] * rank / target.ranks[i]
        for (target, i), rank in ranks.items()
        if rank
    }
    return dataclasses.replace(
        config,
        target_modules=list(names),
        exclude_modules=None,
        layers_to_transform=None,
        rank_pattern={name: rank for name, rank in names.items() if rank != config.rank},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != config.alpha},
    )


def _first_basis(key: jax.Array, path: Path, shape: Sequence[int], width: int) -> jax.Array:
    *lead, rows, _ = shape
    if width == rows:
        return jnp.broadcast_to(jnp.eye(rows), (*lead, rows, rows))
    own = jax.random.fold_in(key, zlib.crc32(dotted(path).encode()))
    return jnp.linalg.qr(jax.random.normal(own, (*lead, rows, width)))[0]


@jax.jit
def _count_inputs(bases: dict, params: Mapping, calibrate: Any) -> dict:
    """Return the moments that `weights.Probe` counts, by weight."""
    leaves = flatten(params)
    zeros = {
        path: jnp.zeros((*q.shape[:-2], q.shape[-2] + 1, q.shape[-1] + 2))
        for path, q in bases.items()
    }

    def loss(zeros: dict) -> jax.Array:
        probes = {path: Probe(leaves[path], q, zeros[path]) for path, q in bases.items()}
        return calibrate(unflatten(leaves | probes))

    return jax.grad(loss)(zeros)


def _check_counts(moments: Mapping[Path, jax.Array], wanted: Mapping[Path, int]) -> None:
    for path, moment in moments.items():
        counted = float(jnp.min(moment[..., -1, -2]))
        if counted == 0:
            raise UserError(
                f"init=eva: the inputs of {dotted(path)} cannot be counted: the model does not put "
                "them through lora_jax.weights.linear, or the data have no supervised token"
            )
        if counted <= wanted[path]:  # centring removes one direction
            raise UserError(
                f"init=eva: {dotted(path)} needs {wanted[path]} directions of {counted:.0f} "
                "supervised tokens; give it more data (adapter.calibration_batches) or lower "
                "the rank"
            )


def _without_mean(moments: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return C Q (..., in, k) and |X|^2 (...,) of inputs without their mean."""
    counted, mean = moments[..., -1:, -2:-1], moments[..., :-1, -2:-1] / moments[..., -1:, -2:-1]
    with jax.default_matmul_precision("highest"):
        of_mean = jnp.swapaxes(mean, -1, -2) @ q
    product = moments[..., :-1, :-2] - counted * mean * of_mean
    energy = moments[..., -1, -1] - (counted * mean * mean).sum(axis=(-2, -1))
    return product, energy


def _largest(q: jax.Array, product: jax.Array, energy: jax.Array, wanted: int) -> Spectrum:
    """Return the best of the directions that Q spans (Rayleigh and Ritz)."""
    with jax.default_matmul_precision("highest"):
        inner = jnp.swapaxes(q, -1, -2) @ product
        values, vectors = jnp.linalg.eigh((inner + jnp.swapaxes(inner, -1, -2)) / 2)
        directions = (q @ vectors)[..., ::-1][..., :wanted]
    largest = jnp.abs(directions).argmax(axis=-2, keepdims=True)
    sign = jnp.where(jnp.take_along_axis(directions, largest, axis=-2) < 0, -1.0, 1.0)
    return sign * directions, values[..., ::-1][..., :wanted] / energy[..., None]
