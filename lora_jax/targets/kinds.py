"""What there is to train, by kind: shapes, names and counts, no arrays."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.config import (
    AdapterConfig,
)
from lora_jax.tree import (
    Path,
)

HEAD = ("lm_head", "kernel")  # where a tied head would have its weight


@dataclass(frozen=True)
class Target:
    """A weight that takes an adapter: one matrix, or a stack of them with a rank and an alpha for
    each layer. Of a fused projection it can be some of the columns, which then have a module path
    of their own, such as `qkv_proj.k`.
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
    def parameters(self) -> int:
        """Numbers in `lora_a` and `lora_b`, padding left out."""
        return sum(self.ranks) * sum(self.shape) * (self.experts or 1)

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
class Whole:
    """A weight that trains itself, or those slices of a stack that do."""

    path: Path  # of the weight in the tree
    shape: tuple[int, ...]  # of the whole leaf
    names: tuple[str, ...]  # module path of every slice
    chosen: tuple[bool, ...]  # which slices train

    @property
    def trained(self) -> Path:
        """The path of the trained values."""
        return (*self.path[:-1], f"full_{self.path[-1]}")

    @property
    def parameters(self) -> int:
        return math.prod(self.shape) // len(self.chosen) * sum(self.chosen)

    def mask(self) -> np.ndarray:
        """Which slices train, broadcastable to the leaf."""
        return np.asarray(self.chosen).reshape(-1, *(1,) * (len(self.shape) - 1))


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that train."""

    path: Path  # of the embedding in the tree
    indices: tuple[int, ...]
    features: int

    @property
    def trained(self) -> Path:
        """The path of the trained rows."""
        return (*self.path[:-1], "trainable_tokens")

    @property
    def parameters(self) -> int:
        return len(self.indices) * self.features


@dataclass(frozen=True)
class Trainable:
    """Everything that a config trains in a model."""

    config: AdapterConfig
    targets: tuple[Target, ...] = ()
    whole: tuple[Whole, ...] = ()
    rows: tuple[Rows, ...] = ()
    untied: Path | None = None  # a tied embedding that becomes two weights by this
    virtual: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # shapes

    @property
    def parameters(self) -> int:
        """Trainable numbers; padding, frozen parts and layers that are not chosen left out."""
        frozen = (
            sum(t.ranks) * t.shape[0] * (t.experts or 1)
            for t in self.targets
            if self.config.freeze_a
        )
        return self._in_files(factors=1) - sum(frozen)

    @property
    def exported(self) -> int:
        """Numbers in the exported adapter; an init that changes the base doubles the rank there."""
        return self._in_files(factors=2 if self.config.changes_base else 1)

    def _in_files(self, factors: int) -> int:
        count = sum(part.parameters for part in (*self.whole, *self.rows))
        count += sum(math.prod(shape) for shape in self.virtual.values())
        count += factors * sum(target.parameters for target in self.targets)
        if self.config.use_dora:
            count += sum(
                sum(rank > 0 for rank in t.ranks) * t.shape[1] * (t.experts or 1)
                for t in self.targets
            )
        return count
