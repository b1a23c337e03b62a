"""Names of the tensors in Hugging Face files that make up each leaf of the tree.

model/layers/self_attn/q_proj/kernel             (layers, in, out)
    model.layers.3.self_attn.q_proj.weight       (out, in), one per layer
model/layers/mlp/experts/gate_up_proj/kernel     (layers, experts, in, 2 f)
    ....experts.5.gate_proj.weight and up_proj   (f, in) each, one pair per layer and expert
    ....experts.gate_up_proj                     (experts, in, 2 f), one per layer, in gpt-oss
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax import tree
from lora_jax.models import Names
from lora_jax.targets import HEAD

# Wrapper modules of torch, around the model or single modules; no model has such names.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Leaf name -> (name in the file, True if stored transposed).
_LEAVES = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
    "taps": ("weight", False),
    **{name: (name, False) for name in ("sinks", "A_log", "dt_bias", "layer_scalar")},
}


@dataclass(frozen=True)
class Piece:
    """A tensor of a file, and the part of a leaf that it holds."""

    name: str
    lead: tuple[int, ...]  # layer and expert, if the leaf has these axes
    start: int  # first index on the last axis of the leaf
    shape: tuple[int, ...]  # in the leaf
    transposed: bool

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape

    def place(self) -> tuple[Any, ...]:
        """Return the index of this part in the leaf."""
        return (*self.lead, ..., slice(self.start, self.start + self.shape[-1]))

    def read(self, source: Any, ranges: Sequence[slice]) -> np.ndarray:
        """Read the part within `ranges`, one slice per axis of this part in the leaf."""
        part = source[tuple(ranges[::-1] if self.transposed else ranges)]
        return part.T if self.transposed else part

    def read_one(self, source: Any, index: Sequence[int]) -> np.ndarray:
        """Read the part of one matrix or vector; its `index` in the leaf begins with `lead`."""
        rest = index[len(self.lead) :]
        inner = self.shape[len(rest) :]
        own = [slice(i, i + 1) for i in rest]
        return self.read(source, [*own, *map(slice, inner)]).reshape(inner)


def pieces(path: tree.Path, shape: Sequence[int], names: Names) -> list[Piece]:
    """Return all tensors that make up a leaf of `shape`."""
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
        if not parts:
            name = f"{module}_bias" if path[-1] == "bias" else module
            found.append(Piece(name, index, 0, tuple(shape[len(index) :]), False))
            continue
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
    """Map the names of weights in a file to their current names in the whole model, whose tensors
    are `expected`.

    A file of the model without its head lacks the prefix `names.base`, and wrappers of other tools
    add one (`_orig_mod.`, `module.`, `base_model.model.`). One prefix may be missing or extra, if
    it is the same for all weights; otherwise names stay as they are.
    """
    weights = [name for name in stored if _is_read(name, names)]
    heads = tuple(f"{head}." for head in (*tree.OUTPUT_HEADS, *names.heads))
    found = {}
    for name in weights:
        new = _today(name, names)
        found[name] = new if new.startswith((names.base, *heads)) else names.base + new
    if {*found.values()} <= {*expected}:
        return found
    unwrapped = unwrap(weights, params)
    known = {name: _today(new, names) for name, new in unwrapped.items() if _is_read(new, names)}
    hits = [len({*one.values()} & {*expected}) for one in (found, known)]
    return known if hits[1] > hits[0] else found


def is_carried(name: str, names: Names) -> bool:
    """Return True for a tensor that is not read, and that an export copies."""
    return not {*names.carried}.isdisjoint(name.split("."))


def _is_read(name: str, names: Names) -> bool:
    return not re.fullmatch(names.no_weights, name) and not is_carried(name, names)


def _today(name: str, names: Names) -> str:
    for old, new in names.moved:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in names.old:
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


def unwrap(stored: Iterable[str], params: Mapping) -> dict[str, str]:
    """Map names in a file to names below the modules of `params`, without the prefix that all
    share; names with several prefixes stay as they are. Wrappers of torch may be anywhere.

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
