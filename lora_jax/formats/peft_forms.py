"""Adapters in the forms that PEFT and its readers can hold.

    with_whole_matrices   one adapter for every matrix, where parts of it have their own
    within_limits         no rank above min(in, out)
    with_one_scale        one rank and one alpha for all modules

Each takes the flat leaves of an adapter and what it trains, and returns both in another form with
the same update.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.targets import Target, Trainable
from lora_jax.tree import Path

EXPERTS = ("gate_up_proj", "down_proj")  # the parameters of a module of experts, in PEFT's order

Leaves = Mapping[Path, Any]


def adapted_modules(found: Trainable) -> dict[str, tuple[int, float]]:
    """Return rank and alpha in the file of every module that has an adapter, by its path."""
    return {
        name: (rank, alpha)
        for parts in _by_matrix(found)
        for name, (rank, alpha) in zip(_names(parts), _joint(parts, found), strict=True)
        if rank
    }


def is_parameter(target: Target) -> bool:
    """Return True for routers and stacks of experts, which transformers holds as parameters of a
    module that is no linear: PEFT then names the parameter.
    """
    router = target.columns is None and target.path[-1] in ("gate", "router")
    return router or target.experts is not None


def parameter_name(name: str, target: Target) -> str:
    """Return PEFT's name of the parameter of the module `name`."""
    return name if target.experts is not None else f"{name}.weight"


def _by_matrix(found: Trainable) -> list[list[Target]]:
    """Group the targets by matrix."""
    groups: dict[Path, list[Target]] = {}
    for target in found.targets:
        groups.setdefault(target.weight, []).append(target)
    return list(groups.values())


def _names(parts: Sequence[Target]) -> Sequence[str]:
    """Return the module path of the whole matrix in every layer."""
    first = parts[0]
    return [n if first.columns is None else n.rpartition(".")[0] for n in first.names]


def _joint(parts: Sequence[Target], found: Trainable) -> list[tuple[int, float]]:
    """Return rank and alpha, in every layer, of one adapter in place of those of all parts, with
    the scale of the first of them.
    """
    joint = []
    for ranks, alphas in zip(
        zip(*(part.ranks for part in parts), strict=True),
        zip(*(part.alphas for part in parts), strict=True),
        strict=True,
    ):
        first = next((i for i, rank in enumerate(ranks) if rank), 0)
        growth = sum(ranks) / max(ranks[first], 1)
        power = 0.5 if found.config.use_rslora else 1.0
        joint.append((sum(ranks), alphas[first] * growth**power))
    return joint


def with_whole_matrices(
    leaves: Leaves, found: Trainable, widths: Mapping[Path, int]
) -> tuple[dict[Path, Any], Trainable]:
    """Return the adapters with one for every matrix: where parts of it have their own, the ranks
    are concatenated. `widths` are the columns of the matrices.

    The scale of all is that of the first; what the others differ by goes into `lora_b`.
    """
    small, targets = dict(leaves), []
    for parts in _by_matrix(found):
        first = parts[0]
        if len(parts) > 1 or first.columns is not None:
            joint = _joint(parts, found)
            whole = dataclasses.replace(
                first,
                path=first.weight[:-1],
                shape=(first.shape[0], widths[first.weight]),
                names=tuple(_names(parts)),
                ranks=tuple(rank for rank, _ in joint),
                alphas=tuple(alpha for _, alpha in joint),
                columns=None,
            )
            small |= _concatenate_parts(whole, parts, leaves, found)
            targets.append(whole)
        else:
            targets.append(first)
    return small, dataclasses.replace(found, targets=tuple(targets))


def _concatenate_parts(
    whole: Target, parts: Sequence[Target], leaves: Leaves, found: Trainable
) -> dict[Path, np.ndarray]:
    rows, columns = whole.shape
    a = np.zeros((*whole.lead, rows, whole.rank), np.float32)
    b = np.zeros((*whole.lead, whole.rank, columns), np.float32)
    magnitude = np.zeros((*whole.lead, columns), np.float32)
    scale = whole.scales(found.config.use_rslora)
    used = [0] * len(whole.ranks)
    for part in parts:
        own = slice(*(part.columns or (0, columns)))
        factor = np.divide(
            part.scales(found.config.use_rslora), scale, out=np.zeros_like(scale), where=scale > 0
        )
        part_a = np.asarray(leaves[(*part.path, "lora_a")])
        part_b = np.asarray(leaves[(*part.path, "lora_b")]) * factor
        for i, rank in enumerate(part.ranks):
            if not rank:
                continue
            layer = (i,) if whole.stacked else ()
            place = slice(used[i], used[i] + rank)
            a[(*layer, ..., place)] = part_a[layer][..., :rank]
            b[(*layer, ..., place, own)] = part_b[layer][..., :rank, :]
            if found.config.use_dora:
                trained = np.asarray(leaves[(*part.path, "magnitude")])
                magnitude[(*layer, ..., own)] = trained[layer]
            used[i] += rank
    joined = {(*whole.path, "lora_a"): a, (*whole.path, "lora_b"): b}
    return joined | ({(*whole.path, "magnitude"): magnitude} if found.config.use_dora else {})


def within_limits(leaves: Leaves, found: Trainable) -> tuple[dict[Path, Any], Trainable]:
    """Return the adapters with no rank above min(in, out), which the sum of two ranks can be. A
    product of more columns equals one of the identity of the smaller side and a matrix.
    """
    small, targets = dict(leaves), []
    for target in found.targets:
        limit = min(target.shape)
        if target.rank > limit:
            small |= _cut(target, leaves, limit)
            share = [limit / max(limit, rank) for rank in target.ranks]
            share = [x**0.5 for x in share] if found.config.use_rslora else share
            alphas = tuple(alpha * x for alpha, x in zip(target.alphas, share, strict=True))
            ranks = tuple(min(rank, limit) for rank in target.ranks)
            target = dataclasses.replace(target, ranks=ranks, alphas=alphas)
        targets.append(target)
    return small, dataclasses.replace(found, targets=tuple(targets))


def _cut(target: Target, leaves: Leaves, limit: int) -> dict[Path, np.ndarray]:
    paths = [(*target.path, leaf) for leaf in ("lora_a", "lora_b")]
    a, b = (np.asarray(leaves[path]) for path in paths)
    a, b = (a, b) if target.stacked else (a[None], b[None])
    new_a, new_b = a[..., :limit].copy(), b[..., :limit, :].copy()
    for i, rank in enumerate(target.ranks):
        if rank > limit:
            product = a[i].astype(np.float64) @ b[i]
            tall = target.shape[0] > limit
            new_a[i], new_b[i] = (product, np.eye(limit)) if tall else (np.eye(limit), product)
    new = (new_a, new_b) if target.stacked else (new_a[0], new_b[0])
    return dict(zip(paths, new, strict=True))


def with_one_scale(leaves: Leaves, found: Trainable) -> tuple[dict[Path, Any], Trainable]:
    """Return the adapters with one rank, one alpha and the scale alpha / rank for all modules, for
    readers that know neither patterns nor rsLoRA: padded to the largest rank, with the rest of
    every scale in `lora_b`.
    """
    config, small, targets = found.config, dict(leaves), []
    rank = max(target.rank for target in found.targets)
    for target in found.targets:
        ranks = tuple(rank if own else 0 for own in target.ranks)
        alphas = (config.alpha,) * len(ranks)
        uniform = dataclasses.replace(target, ranks=ranks, alphas=alphas)
        old, new = target.scales(config.use_rslora), uniform.scales(False)
        factor = np.divide(old, new, out=np.zeros_like(old), where=new > 0)
        a, b = (np.asarray(leaves[(*target.path, leaf)]) for leaf in ("lora_a", "lora_b"))
        missing = rank - a.shape[-1]
        lead = ((0, 0),) * (a.ndim - 2)
        small[(*target.path, "lora_a")] = np.pad(a, (*lead, (0, 0), (0, missing)))
        small[(*target.path, "lora_b")] = np.pad(b * factor, (*lead, (0, missing), (0, 0)))
        targets.append(uniform)
    config = dataclasses.replace(config, rank=rank, rank_pattern={}, alpha_pattern={})
    config = dataclasses.replace(config, use_rslora=False)
    return small, dataclasses.replace(found, config=config, targets=tuple(targets))
