"""Updates of a model, matrix by matrix, on the host.

    LoRA              W + a b                                     a b of low rank, scale in b
    DoRA              magnitude * (W + a b) / |(W + a b)|_column  of full rank
    trained in full   V                                           of full rank

Only the last two need W. A matrix is named by its leaf in the tree and its place there:
(("model", "layers", "self_attn", "q_proj", "kernel"), (3,)) is that of layer 3, and a stack of
experts has one more index.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.adapters.low_rank import as_plain
from lora_jax.adapters.svd import Factors
from lora_jax.config import AdapterConfig
from lora_jax.targets import HEAD, FullWeight, Target, Trainable, as_trainable, find_trainable
from lora_jax.tree import Path, flatten, lead_axes, stack_position, tied_embedding, unflatten
from lora_jax.weights import materialize

Key = tuple[Path, tuple[int, ...]]
Read = Callable[[Path, tuple[int, ...]], np.ndarray]  # a matrix of the base, by leaf and place


@dataclass(frozen=True)
class Product:
    """LoRA or DoRA of one matrix (in, out), in float64."""

    name: str  # module path
    a: np.ndarray  # (in, rank)
    b: np.ndarray  # (rank, out), every scale in it
    magnitude: np.ndarray | None = None  # DoRA's (out,); nan where a column has none

    def dense(self, base: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the update as a dense matrix; `base` returns the weight and is called only for
        DoRA.
        """
        if self.magnitude is None:
            return self.a @ self.b
        weight = base()
        moved = weight + self.a @ self.b
        norms = np.linalg.norm(moved, axis=0)
        sound = (norms > 0) & ~np.isnan(self.magnitude)
        return moved * np.where(sound, self.magnitude / np.where(sound, norms, 1), 1) - weight

    def transposed(self) -> "Product":
        """Return the update of the output head from that of the tied embedding."""
        return Product(HEAD[0], self.b.T, self.a.T)


@dataclass(frozen=True)
class Trained:
    """A trained matrix or vector that replaces the weight, in float64."""

    name: str  # module path
    value: np.ndarray

    def dense(self, base: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the difference from the weight that `base` returns."""
        return self.value - base()

    def transposed(self) -> "Trained":
        """Return the trained output head from the tied embedding."""
        return Trained(HEAD[0], self.value.T)


Update = Product | Trained


@dataclass(frozen=True)
class Combined:
    """Adapters computed from other adapters or from weights, and their errors."""

    adapters: dict
    trainable: Trainable
    errors: Mapping[str, float]  # by module: |result - exact| / |exact|; empty without truncation
    error: float  # the same over all modules

    @property
    def config(self) -> AdapterConfig:
        return self.trainable.config


def reader(params: Mapping) -> Read:
    """Return the function `read` of a tree of arrays."""
    leaves = flatten(params)
    return lambda path, index: np.asarray(materialize(leaves[path])[index], np.float64)


def base_matrix(params: Mapping, read: Read, key: Key) -> np.ndarray:
    """Return a weight in float64; a tied head is the embedding transposed."""
    tied = tied_embedding(params)
    if key[0] == HEAD and tied is not None:
        return np.asarray(read(tied, ()), np.float64).T
    return np.asarray(read(*key), np.float64)


def find_updates(
    params: Mapping, adapters: Mapping, config: AdapterConfig | Trainable
) -> dict[Key, Update]:
    """Return the updates of all matrices and vectors that an adapter changes, except token rows.
    `params` may be shapes. Parts of a fused projection are joined into one update.

    Raises:
        UserError: as `find_trainable`.
    """
    found = as_trainable(params, config)
    small: Any = {path: np.asarray(leaf) for path, leaf in flatten(adapters).items()}
    if found.config.changes_base:
        small, found = as_plain(small, found)
    updates: dict[Key, Update] = {}
    for target in found.targets:
        leaf = flatten(params).get(target.weight)
        width = target.shape[1] if leaf is None else leaf.shape[-1]
        _add_target(updates, target, small, found, width)
    for whole in found.whole:
        for key, name in slices(whole):
            value = np.asarray(small[whole.trained][key[1]], np.float64)
            updates[key] = Trained(name, value)
    return updates


def _add_target(
    updates: dict[Key, Update], target: Target, small: Mapping, found: Trainable, width: int
) -> None:
    a, b = (np.asarray(small[(*target.path, leaf)], np.float64) for leaf in ("lora_a", "lora_b"))
    b = b * target.scales(found.config.use_rslora)
    columns = slice(*(target.columns or (0, width)))
    for index, name, rank in places(target):
        wide = np.zeros((rank, width))
        wide[:, columns] = b[index][:rank]
        magnitude = None
        if found.config.use_dora:
            magnitude = np.full(width, np.nan)
            magnitude[columns] = small[(*target.path, "magnitude")][index]
        name = name if target.columns is None else name.rpartition(".")[0]
        update = Product(name, a[index][:, :rank], wide, magnitude)
        key = target.weight, index
        other = updates.get(key)
        updates[key] = _join_parts(other, update) if isinstance(other, Product) else update


def _join_parts(one: Product, other: Product) -> Product:
    """Return the updates of two parts of a fused projection as one."""
    magnitude = None
    if one.magnitude is not None and other.magnitude is not None:
        magnitude = np.where(np.isnan(one.magnitude), other.magnitude, one.magnitude)
    a = np.concatenate([one.a, other.a], axis=1)
    return Product(one.name, a, np.concatenate([one.b, other.b]), magnitude)


def places(target: Target) -> list[tuple[tuple[int, ...], str, int]]:
    """Return place, module path and rank of every matrix that a target adapts."""
    found = []
    for index in np.ndindex(*target.lead):
        layer = index[0] if target.stacked else 0
        if target.ranks[layer]:
            found.append((index, target.names[layer], target.ranks[layer]))
    return found


def slices(whole: FullWeight) -> list[tuple[Key, str]]:
    """Return every matrix or vector of a leaf that trains, and its module path."""
    found = []
    stacked = stack_position(whole.path) is not None
    for index in np.ndindex(*whole.shape[: lead_axes(whole.path)]):
        layer = index[0] if stacked else 0
        if whole.chosen[layer]:
            found.append(((whole.path, index), whole.names[layer]))
    return found


def plain_trainable(params: Mapping, ranks: Mapping[str, int], **fields: Any) -> Trainable:
    """Return the `Trainable` of adapters of these ranks, by module path, whose scale is one.
    `fields` are further settings of the adapter.
    """
    counts = sorted(ranks.values())
    rank = max(set(counts), key=counts.count) if counts else 1
    patterns = {name: own for name, own in sorted(ranks.items()) if own != rank}
    config = AdapterConfig(
        rank=rank,
        alpha=float(rank),
        target_modules=sorted(ranks),
        rank_pattern=patterns,
        alpha_pattern={name: float(own) for name, own in patterns.items()},
        **fields,
    )
    return find_trainable(params, config)


def build(
    found: Trainable,
    factors: Callable[[Key, int], Factors],
    value: Callable[[Key], np.ndarray],
    rows: Callable[[], np.ndarray] | None = None,
) -> Combined:
    """Build the adapters of a `plain_trainable`, matrix by matrix.

    Args:
        factors: function of a matrix and its rank: factors, distance and norm, as in `svd`.
        value: function of a matrix or vector: its fully trained value.
        rows: function that returns the token rows, in the order of the config.
    """
    leaves: dict[Path, np.ndarray] = {}
    sums: dict[str, np.ndarray] = {}
    for target in found.targets:
        (tall, wide), rank = target.shape, target.rank
        a = leaves[(*target.path, "lora_a")] = np.zeros((*target.lead, tall, rank), np.float32)
        b = leaves[(*target.path, "lora_b")] = np.zeros((*target.lead, rank, wide), np.float32)
        for index, name, own in places(target):
            a[index][:, :own], b[index][:own], *sizes = factors((target.weight, index), own)
            sums[name] = sums.get(name, np.zeros(2)) + np.square(sizes)
    for whole in found.whole:
        full = leaves[whole.trained] = np.zeros(whole.shape, np.float32)
        for key, _ in slices(whole):
            full[key[1]] = value(key)
    for tokens in found.rows:
        assert rows is not None
        leaves[tokens.trained] = rows().astype(np.float32)
    errors = {name: _ratio(*pair) for name, pair in sums.items()}
    total = _ratio(*np.sum(list(sums.values()), axis=0)) if sums else 0.0
    return Combined(unflatten(leaves), found, errors, total)


def _ratio(lost: float, whole: float) -> float:
    return float(np.sqrt(lost / whole)) if whole else 0.0


def rank_problems(most: Mapping[str, int], rank: int | None) -> list[str]:
    """List the problems of `rank`; `most` is the largest usable rank by module path."""
    if rank is None or not most:
        return []
    if rank < 1:
        return [f"rank={rank} must be at least 1"]
    name = max(most, key=lambda name: most[name])
    if rank <= most[name]:
        return []
    return [
        f"rank={rank} is larger than any module can use: the most is {most[name]} ({name}); give "
        f"{most[name]} or less"
    ]
