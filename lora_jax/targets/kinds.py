"""Parts of a model that a config trains, by kind: shapes, names and counts, no arrays."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lora_jax.config import AdapterConfig
from lora_jax.leaves import FROZEN, Kind, known_kind, label_of, shared_leaves, trained_name
from lora_jax.tree import Path, unflatten

HEAD = ("lm_head", "kernel")  # where a tied head would have its weight


@dataclass(frozen=True)
class Leaf:
    """A leaf of the trainable tree."""

    path: Path
    shape: tuple[int, ...]  # with padding
    kind: Kind
    label: str  # of the optimizer
    weight: Path | None = None  # the weight of the base that it belongs to

    @property
    def name(self) -> str:
        return self.path[-1]


@dataclass(frozen=True)
class Target:
    """A weight that takes an adapter: one matrix, or a stack with a rank and an alpha for each
    layer. It may be a part of a fused projection, with its own module path such as `qkv_proj.k`.
    """

    path: Path  # of the module in the tree
    leaf: str  # name of the weight in it
    shape: tuple[int, int]  # (in, out) of one matrix; (vocab, d) of an embedding
    stacked: bool  # over layers
    names: tuple[str, ...]  # module path in every layer
    ranks: tuple[int, ...]  # in every layer; 0: not adapted
    alphas: tuple[float, ...]  # in every layer
    columns: tuple[int, int] | None = None  # first and last of a fused projection; None: all
    experts: int | None = None  # matrices per layer, in a stack of experts
    leaves: tuple[str, ...] = ("lora_a", "lora_b")  # names of its leaves in the trainable tree

    @property
    def weight(self) -> Path:
        """The path of the weight in the tree."""
        return (*(self.path if self.columns is None else self.path[:-1]), self.leaf)

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes in front of those of one matrix: layers, experts."""
        layers = (len(self.ranks),) if self.stacked else ()
        return layers if self.experts is None else (*layers, self.experts)

    def per_layer(self, values: Any) -> np.ndarray:
        """A value for every layer, broadcastable to the weight."""
        shape = (-1, *(1,) * (len(self.lead) + 1)) if self.stacked else ()
        return np.asarray(values).reshape(shape)

    @property
    def rank(self) -> int:
        """The stored rank: the largest of the slices; smaller ones are padded with zeros."""
        return max(self.ranks)

    @property
    def factors(self) -> tuple[str, ...]:
        """The leaves that make the update."""
        return tuple(name for name in self.leaves if known_kind(name).is_factor)

    @property
    def parameters(self) -> int:
        """Number of parameters in the factors of all layers, without padding."""
        return sum(map(self.numbers, self.factors))

    def leaf_shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Shape of a leaf for one matrix of this rank, such as (in, rank) of `lora_a`."""
        sizes = {"in": self.shape[0], "out": self.shape[1], "rank": rank}
        return tuple(sizes[axis] for axis in known_kind(name).axes or ())

    def numbers(self, name: str, ranks: tuple[int, ...] | None = None) -> int:
        """Number of parameters in a leaf, without padding; `ranks` replace those of the layers."""
        layers = (math.prod(self.leaf_shape(name, rank)) for rank in ranks or self.ranks if rank)
        return sum(layers) * (self.experts or 1)

    def scales(self, use_rslora: bool) -> np.ndarray:
        """alpha / rank (rsLoRA: alpha / sqrt(rank)) per layer, broadcastable to lora_b; 0 where not
        adapted.
        """
        values = [
            alpha / (math.sqrt(rank) if use_rslora else rank) if rank else 0.0
            for rank, alpha in zip(self.ranks, self.alphas, strict=True)
        ]
        return self.per_layer(values).astype(np.float32)

    def rank_mask(self) -> np.ndarray:
        """1 where a column of lora_a is real, 0 where it is padding, broadcastable to it."""
        ranks = self.per_layer(self.ranks) if self.stacked else self.rank
        return np.atleast_2d(np.arange(self.rank) < ranks).astype(np.float32)


@dataclass(frozen=True)
class FullWeight:
    """A weight that trains in full, or the slices of a stack that do."""

    path: Path  # of the weight in the tree
    shape: tuple[int, ...]  # of the leaf, with all its slices
    names: tuple[str, ...]  # module path of every slice
    chosen: tuple[bool, ...]  # which slices train

    @property
    def trained(self) -> Path:
        """The path of the trained values."""
        return (*self.path[:-1], trained_name(self.path[-1]))

    @property
    def parameters(self) -> int:
        return math.prod(self.shape) // len(self.chosen) * sum(self.chosen)

    def mask(self) -> np.ndarray:
        """True for slices that train, broadcastable to the leaf."""
        return np.asarray(self.chosen).reshape(-1, *(1,) * (len(self.shape) - 1))


@dataclass(frozen=True)
class TrainableTokens:
    """Rows of an embedding that train."""

    path: Path  # of the embedding in the tree
    indices: tuple[int, ...]
    features: int

    @property
    def trained(self) -> Path:
        """The path of the trained rows."""
        return (*self.path[:-1], "trainable_tokens")

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.indices), self.features

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Trainable:
    """All that a config trains in a model. `find_trainable` computes it once; the functions of
    `lora_jax.adapters` accept it in place of the config.
    """

    config: AdapterConfig
    targets: tuple[Target, ...] = ()
    whole: tuple[FullWeight, ...] = ()
    rows: tuple[TrainableTokens, ...] = ()
    untied: Path | None = None  # a tied embedding that becomes two weights by this
    virtual: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # shapes

    @functools.cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaves of the trainable tree, including frozen ones."""
        found = [self._leaf(part.trained, part.shape, part.path) for part in self.whole]
        found += [self._leaf(part.trained, part.shape, part.path) for part in self.rows]
        for target in self.targets:
            for name in target.leaves:
                shape = (*target.lead, *target.leaf_shape(name, target.rank))
                found.append(self._leaf((*target.path, name), shape, target.weight))
        at_root = {**self.virtual, **self.shared}
        return (*found, *(self._leaf((name,), shape) for name, shape in at_root.items()))

    def _leaf(self, path: Path, shape: tuple[int, ...], weight: Path | None = None) -> Leaf:
        label = label_of(path[-1], self.config.freeze_a)
        return Leaf(path, shape, known_kind(path[-1]), label, weight)

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the leaves that all targets share."""
        names = shared_leaves(self.config)
        if not names:
            return {}
        sizes = {
            "in": max(target.shape[0] for target in self.targets),
            "out": max(target.shape[1] for target in self.targets),
            "rank": max(target.rank for target in self.targets),
        }
        return {name: tuple(sizes[axis] for axis in known_kind(name).axes or ()) for name in names}

    @property
    def shapes(self) -> dict:
        """The trainable tree as shapes."""
        return unflatten(
            {leaf.path: jax.ShapeDtypeStruct(leaf.shape, np.float32) for leaf in self.leaves}
        )

    @property
    def parameters(self) -> int:
        """Number of trainable parameters, without padding, frozen leaves and unselected layers."""
        return self._outside() + sum(
            target.numbers(name)
            for target in self.targets
            for name in target.leaves
            if label_of(name, self.config.freeze_a) != FROZEN
        )

    @property
    def exported(self) -> int:
        """Number of parameters in the exported adapter; an init that changes the base doubles the
        rank there.
        """
        growth = 2 if self.config.changes_base else 1
        shared = sum(math.prod(shape) for shape in self.shared.values())
        return (
            self._outside()
            + shared
            + sum(
                target.numbers(name) * (growth if name in target.factors else 1)
                for target in self.targets
                for name in target.leaves
                if known_kind(name).file
            )
        )

    def _outside(self) -> int:
        """Number of parameters that train outside the targets."""
        parts = sum(part.parameters for part in (*self.whole, *self.rows))
        return parts + sum(math.prod(shape) for shape in self.virtual.values())
