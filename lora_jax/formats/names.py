"""Names: the tensors of a Hugging Face file that make up each leaf of the tree.

model/layers/self_attn/q_proj/kernel             (layers, in, out)
    model.layers.3.self_attn.q_proj.weight       (out, in), one per layer
model/layers/mlp/experts/gate_up_proj/kernel     (layers, experts, in, 2 f)
    ....experts.5.gate_proj.weight and up_proj   (f, in) each, one pair per layer and expert
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax import tree
from lora_jax.models import Names
from lora_jax.targets import HEAD

# Modules that torch puts around others, one by one too; no model has modules of these names.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
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


def canonical(
    stored: Iterable[str], names: Names, params: Mapping, expected: Collection[str]
) -> dict[str, str]:
    """Names of the weights in a file -> what they are called today and in a whole model, whose
    tensors are `expected`.

    A file of the bare model has no `names.base` in front, and the wrappers of other tools put
    theirs there (`_orig_mod.`, `module.`, `base_model.model.`): one prefix may be missing or too
    much, if it is the same everywhere. Otherwise names stay as they are.
    """
    weights = [name for name in stored if not re.fullmatch(names.no_weights, name)]
    heads = tuple(f"{head}." for head in tree.OUTPUT_HEADS)
    found = {}
    for name in weights:
        new = _today(name, names)
        found[name] = new if new.startswith((names.base, *heads)) else names.base + new
    if {*found.values()} <= {*expected}:
        return found
    unwrapped = unwrap(weights, params)
    known = {
        name: _today(new, names)
        for name, new in unwrapped.items()
        if not re.fullmatch(names.no_weights, new)
    }
    hits = [len({*one.values()} & {*expected}) for one in (found, known)]
    return known if hits[1] > hits[0] else found


def _today(name: str, names: Names) -> str:
    for old, new in names.old:
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


def unwrap(stored: Iterable[str], params: Mapping) -> dict[str, str]:
    """Names in a file -> the same below the modules of `params`, by the prefix that all of them
    have; the names as they are where they have several. Wrappers of torch may be anywhere.

    model.layers.0._orig_mod.mlp.up_proj.weight   model.layers.0.mlp.up_proj.weight
    model._orig_mod.layers.0.mlp.up_proj.weight   model.layers.0.mlp.up_proj.weight
    module.lm_head.weight                         lm_head.weight
    """
    roots = {HEAD[0]: ""}
    for first, *rest in tree.flatten(params):
        is_head = first in tree.OUTPUT_HEADS or len(rest) < 2
        roots[first if is_head else rest[0]] = "" if is_head else f"{first}."
    names = {name: [part for part in name.split(".") if part not in _WRAPPERS] for name in stored}
    found, bodies, heads, outer = {}, set(), set(), set()
    for name, parts in names.items():
        at = next((i for i, part in enumerate(parts) if part in roots), None)
        if at is not None:
            base, prefix = roots[parts[at]], "".join(f"{part}." for part in parts[:at])
            found[name] = base + tree.dotted(parts[at:])
            (bodies if base else heads).add(prefix)
            if base and prefix.endswith(base):
                outer.add(prefix.removesuffix(base))
    one = len(bodies) <= 1 and len(heads) <= 1
    if not one or not all(body.startswith(head) for body in bodies for head in heads):
        return {name: name for name in names}
    wrapper = next(iter(heads | outer), "")
    return {
        name: found.get(name, ".".join(parts).removeprefix(wrapper))
        for name, parts in names.items()
    }
