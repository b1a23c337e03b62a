"""Which tensors of a Hugging Face file make up which leaf of the tree.

model/layers/self_attn/q_proj/kernel             (layers, in, out)
    model.layers.3.self_attn.q_proj.weight       (out, in), one per layer
model/layers/mlp/experts/gate_up_proj/kernel     (layers, experts, in, 2 f)
    ....experts.5.gate_proj.weight and up_proj   (f, in) each, one pair per layer and expert
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax import tree
from lora_jax.models import Names

# Leaf name -> (name in the file, stored transposed).
_LEAVES = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
}


@dataclass(frozen=True)
class Piece:
    """One tensor of a file, and the part of a leaf that it holds."""

    name: str
    lead: tuple[int, ...]  # layer and expert, as far as the leaf has these axes
    start: int  # first of its places on the last axis of the leaf
    shape: tuple[int, ...]  # as it lies in the leaf
    transposed: bool

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape

    def place(self) -> tuple[Any, ...]:
        """The index of its part of the leaf."""
        return (*self.lead, ..., slice(self.start, self.start + self.shape[-1]))

    def read(self, source: Any, ranges: Sequence[slice]) -> np.ndarray:
        """The part within `ranges` of the tensor's own axes, as they lie in the leaf."""
        part = source[tuple(ranges[::-1] if self.transposed else ranges)]
        return part.T if self.transposed else part


def pieces(path: tree.Path, shape: Sequence[int], names: Names) -> list[Piece]:
    """Every tensor of a leaf."""
    suffix, transposed = _LEAVES[path[-1]]
    transposed = transposed and not tree.is_conv1d(path[:-1])
    lead = tree.lead_axes(path)
    inner = tuple(shape[lead:])
    found = []
    for layer, module in enumerate(tree.slice_names(path[:-1], shape)):
        for old, new in names.renamed:
            module = module.replace(old, new)
        index = () if tree.stack_position(path) is None else (layer,)
        if not tree.has_experts(path):
            found.append(Piece(f"{module}.{suffix}", index, 0, inner, transposed))
            continue
        experts, _, own = module.rpartition(".")
        parts = names.experts[own]
        width = inner[-1] // len(parts)
        for expert in range(shape[lead - 1]):
            for i, part in enumerate(parts):
                name = f"{experts}.{expert}.{part}.{suffix}"
                block = (*inner[:-1], width)
                found.append(Piece(name, (*index, expert), i * width, block, transposed))
    return found


def canonical(stored: Iterable[str], names: Names) -> dict[str, str]:
    """Names of the weights in a file -> what they are called today and in a whole model."""
    found = {}
    for name in stored:
        if re.fullmatch(names.no_weights, name):
            continue
        new = name
        for old_end, end in names.old:
            new = new.removesuffix(old_end) + end if new.endswith(old_end) else new
        whole = new.startswith((names.base, *(f"{head}." for head in tree.OUTPUT_HEADS)))
        found[name] = new if whole else names.base + new
    return found
