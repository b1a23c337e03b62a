"""Extraction of a LoRA from a fully fine-tuned model: the nearest product to every V - W.

changes = find_changes(params, read, tuned)     which weights moved, and how far
found   = plan(params, changes, rank=16)        what takes an adapter, what is stored in full
made    = extract(params, found, read, tuned)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.adapters import svd
from lora_jax.adapters.updates import (
    Combined,
    Key,
    Read,
    base_matrix,
    build,
    places,
    plain_trainable,
    rank_problems,
)
from lora_jax.config import AdapterConfig
from lora_jax.errors import UserError, raise_all
from lora_jax.targets import HEAD, Trainable, find_trainable
from lora_jax.targets.match import selector
from lora_jax.tree import dotted, flatten, lead_axes, slice_names, summarize, tied_embedding

UNCOVERED = ("refuse", "save", "drop")


@dataclass(frozen=True)
class Change:
    """The distance that one matrix or vector moved."""

    name: str  # module path
    numbers: int
    lost: float  # |V - W|
    size: float  # |W|


def find_changes(params: Mapping, read: Read, tuned: Read) -> dict[Key, Change]:
    """Find the matrices and vectors that differ between two models, reading one pair at a time.

    Args:
        params: the model, or its shapes.
        read: function that returns a matrix of it.
        tuned: function that returns the same matrix of the other model.
    """
    found = {}
    for path, leaf in flatten(params).items():
        names = slice_names(path[:-1], leaf.shape)
        lead = leaf.shape[: lead_axes(path)]
        for index in np.ndindex(*lead):
            weight = np.asarray(read(path, index), np.float64)
            distance = float(np.linalg.norm(np.asarray(tuned(path, index), np.float64) - weight))
            if distance:
                name = names[index[0] if len(names) > 1 else 0]
                size = float(np.linalg.norm(weight))
                found[path, index] = Change(name, weight.size, distance, size)
    return found


def plan(
    params: Mapping,
    changes: Mapping[Key, Change],
    *,
    rank: int,
    target_modules: Any = "all-linear",
    uncovered: str = "refuse",
) -> Trainable:
    """Plan adapters of at most `rank` for the targets that differ. Other weights that differ
    (norms, embeddings, biases) are refused, stored in full ("save") or left as in the base
    ("drop").

    Raises:
        UserError: no target differs; a rank that no module can use; a part of a fused projection
            among the targets; other weights differ and `uncovered` is "refuse"; what
            `find_trainable` refuses.
    """
    if uncovered not in UNCOVERED:
        raise UserError(f"uncovered={uncovered!r} is not one of: {', '.join(UNCOVERED)}")
    if not changes:
        raise UserError("the two models have the same weights: there is nothing to extract")
    matrices = _matrices(params, target_modules)
    most = {name: limit for key, (name, limit) in matrices.items() if key in changes}
    if not most:
        raise UserError(f"target_modules={target_modules!r}: none of these weights differ")
    raise_all(rank_problems(most, rank))
    others = [key for key in changes if key not in matrices]
    if others and uncovered == "refuse":
        raise UserError(
            "besides the targets, the fine-tuned model differs in:\n  "
            + summarize(_describe_changes(others, changes), most=24)
            + "\nStore them in full (uncovered=save), leave them as in the base (uncovered=drop), "
            "or name them in target_modules where they are matrices"
        )
    ranks = {name: min(limit, rank) for name, limit in most.items()}
    kept = others if uncovered == "save" else []
    saved = {changes[key].name for key in kept if key[0][-1] != "bias"}
    biases = any(key[0][-1] == "bias" and changes[key].name not in saved for key in kept)
    tied = tied_embedding(params)
    as_one = tied is not None and dotted(tied[:-1]) in {*saved, *ranks}
    return plain_trainable(
        params,
        ranks,
        modules_to_save=sorted(saved) or None,
        bias="all" if biases else "none",
        ensure_weight_tying=as_one or None,
    )


def _matrices(params: Mapping, target_modules: Any) -> dict[Key, tuple[str, int]]:
    """Return module path and largest rank of every matrix that the targets name; a tied head counts
    as the embedding.
    """
    tied = tied_embedding(params)
    one_weight = [] if tied is None else [HEAD[0], dotted(tied[:-1])]
    wanted = AdapterConfig(rank=1, target_modules=target_modules)
    if target_modules != "all-linear" and any(map(selector(wanted), one_weight)):
        wanted = dataclasses.replace(wanted, ensure_weight_tying=True)
    found = find_trainable(params, wanted)
    raise_all(
        [
            f"target_modules={target_modules!r}: {target.names[0]} is a part of a fused "
            "projection; name the whole"
            for target in found.targets
            if target.columns is not None
        ]
    )
    return {
        (target.weight, index): (name, min(target.shape))
        for target in found.targets
        for index, name, _ in places(target)
    }


def _describe_changes(keys: Sequence[Key], changes: Mapping[Key, Change]) -> list[str]:
    """Return a line for every leaf."""
    lines = []
    for path in dict.fromkeys(path for path, _ in keys):
        own = [changes[key] for key in keys if key[0] == path]
        lost, size = (np.linalg.norm([getattr(one, f) for one in own]) for f in ("lost", "size"))
        far = f"{lost / size:.1e} of their size" if size else "from zero"
        numbers = sum(one.numbers for one in own)
        lines.append(f"{dotted(path)}: {numbers:,} numbers of {len(own)} modules, by {far}")
    return lines


def extract(params: Mapping, found: Trainable, read: Read, tuned: Read) -> Combined:
    """Build the adapters of a `plan`. A few matrices in float64 are in memory at a time."""

    def factors(key: Key, rank: int) -> svd.Factors:
        change = base_matrix(params, tuned, key) - base_matrix(params, read, key)
        return svd.nearest(change, rank)

    return build(found, factors, lambda key: base_matrix(params, tuned, key))
