"""Parameter trees by path: names of their leaves, and comparison of structures.

A parameter tree is nested dicts. Its key path follows the Hugging Face module path, except that the
layers of a model may be stacked along a leading axis, in which case the layer index is left out:

    tree path      model / layers / self_attn / q_proj / kernel      (layers, in, out)
    module paths   model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj, ...

Layers of several shapes are several stacks, whose keys name their layers:

    tree path      model / layers / 2,5 / self_attn / q_proj / kernel      (2, in, out)
    module paths   model.layers.2.self_attn.q_proj, model.layers.5.self_attn.q_proj

Users name modules by the second form.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.errors import UserError
from lora_jax.leaves import kind_of

Path = tuple[str, ...]

STACKS = (
    "layers",
    "h",
    "layer",
    "blocks",
)  # containers whose children share a leading `layers` axis
# Names of a module's own arrays: those that are its weight in files, and those with names of their
# own there.
WEIGHTS = ("kernel", "embedding", "scale", "taps")
LEAVES = (*WEIGHTS, "bias", "sinks", "A_log", "dt_bias")
# Fused projections, and the names of their parts.
FUSED = {
    "c_attn": ("q", "k", "v"),
    "qkv_proj": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
}
OUTPUT_HEADS = ("lm_head", "score", "classifier")  # linears that `all-linear` leaves out
CONV1D = ("c_attn", "c_fc", "c_proj")  # GPT-2's linears, in `h`: in files as here, (in, out)
TOWERS = ("language_model", "text_model")  # decoders inside a model that reads images
_STACK = re.compile(r"(\d+)(-\d+)?(,\d+(-\d+)?)*")  # the key of one of several stacks
TIED_EMBEDDINGS = ("embed_tokens", "wte")  # in a tree without `lm_head` they are the head too


class _Index(str):
    """An integer key (as in NNX lists) as a string in a path. `unflatten` makes it an integer
    again: "10" sorts before "2" as a string, and `nnx.merge` takes leaves in sorted order.
    """


def flatten(tree: Mapping) -> dict[Path, Any]:
    """Return the leaves by key path, every key as a string."""

    def text(key: Any) -> str:
        return _Index(key) if isinstance(key, int) else str(key)

    return {tuple(map(text, path)): leaf for path, leaf in flatten_dict(dict(tree)).items()}


def unflatten(leaves: Mapping[Path, Any]) -> dict:
    """Invert `flatten`."""
    return unflatten_dict(
        {
            tuple(int(key) if isinstance(key, _Index) else key for key in path): leaf
            for path, leaf in leaves.items()
        }
    )


def dotted(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


def stack_position(path: Path) -> int | None:
    """Return the position of the layer index in the module path of a stacked leaf; None if the leaf
    is not stacked: no container of that name, or one with numbered children, or a module that
    happens to be called so.
    """
    for position, key in enumerate(path[:-1]):
        below = path[position + 1]
        if key in STACKS and not below.isdigit() and below not in (*STACKS, *LEAVES):
            return position + 1
    return None


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return first and last of each run of consecutive numbers, in their order.

    >>> runs([0, 1, 3, 4, 7])
    [(0, 1), (3, 4), (7, 7)]
    """
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def ranges(numbers: Iterable[int]) -> str:
    """Return increasing numbers as text, `0-1,3`."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs(numbers))


def stack_key(layers: Iterable[int]) -> str:
    """Return the key of the stack of `layers`, one of several in a model: `0-1,3`; of a single
    layer `2-2`, as `2` is a layer in a list.
    """
    text = ranges(layers)
    return f"{text}-{text}" if text.isdigit() else text


def stack_layers(path: Path) -> tuple[int, ...] | None:
    """Return the numbers of the layers of one of several stacks; None for other leaves."""
    position = stack_position(path)
    key = "" if position is None else path[position]
    if not _STACK.fullmatch(key) or key.isdigit():
        return None
    ends = [part.split("-") for part in key.split(",")]
    return tuple(i for own in ends for i in range(int(own[0]), int(own[-1]) + 1))


def layer_number(path: Path) -> int | None:
    """Return the number of a layer that is one of a list, not of a stack; None for other leaves."""
    pairs = zip(path, path[1:], strict=False)
    return next((int(below) for key, below in pairs if key in STACKS and below.isdigit()), None)


def in_layers(path: Path) -> bool:
    """Return True for a leaf of a layer, of a stack or a list."""
    return stack_position(path) is not None or layer_number(path) is not None


def one_layer(leaves: Mapping[Path, Any]) -> dict[Path, Any]:
    """Return the leaves of stacked layers: of several stacks those of the one with most layers, and
    of layers in a list those of the last.
    """
    last = max((layer_number(path) or 0 for path in leaves), default=0)
    stacks = {stack_layers(path): None for path in leaves}
    most = max(stacks, key=lambda own: len(own or ()), default=None)
    return {
        path: leaf
        for path, leaf in leaves.items()
        if in_layers(path) and layer_number(path) in (None, last) and stack_layers(path) == most
    }


def is_conv1d(module: Path) -> bool:
    """Return True if Hugging Face files hold the kernel of a module as (in, out)."""
    return module[-1] in CONV1D and "layers" not in module


def in_tower(name: str) -> bool:
    """Return True for a module path inside a model that reads images."""
    return any(f".{tower}." in name for tower in TOWERS)


def has_experts(path: Path) -> bool:
    """Return True if a leaf has an axis of experts, behind that of the layers; numbered experts
    have none.
    """
    return any(
        key == "experts" and not below.isdigit() for key, below in zip(path, path[1:], strict=False)
    )


def lead_axes(path: Path) -> int:
    """Return the number of axes before those of one matrix or vector: of layers and of experts."""
    return (stack_position(path) is not None) + has_experts(path)


def is_router(path: Path, leaves: Mapping[Path, Any]) -> bool:
    """Return True for a linear that chooses among the experts of its module: it has an output for
    each.
    """
    *home, _, leaf = path
    experts = (*home, "experts")
    if leaf != "kernel" or has_experts(path):
        return False
    sibling = next((other for other in leaves if other[: len(experts)] == experts), None)
    if sibling is None:
        return False
    is_list = not has_experts(sibling)  # numbered experts
    return is_list or leaves[path].shape[-1] == leaves[sibling].shape[lead_axes(sibling) - 1]


def fused_columns(path: Path, leaves: Mapping[Path, Any]) -> dict[str, tuple[int, int]]:
    """Return first and last column of the parts of a fused projection, by name; empty for other
    weights.
    """
    *home, module, leaf = path
    parts = FUSED.get(module)
    in_turns = has_experts(path) and (*home, module, "bias") in leaves  # columns of gpt-oss
    if parts is None or leaf != "kernel" or in_turns:
        return {}
    total = leaves[path].shape[-1]
    widths = [total // len(parts)] * len(parts)
    if module == "qkv_proj":  # fewer heads of keys and values than of queries
        output = leaves.get((*home, "o_proj", "kernel"))
        if output is None:
            return {}
        queries = output.shape[-2]
        widths = [queries, (total - queries) // 2, (total - queries) // 2]
    if sum(widths) != total:
        return {}
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return {name: (end - width, end) for name, width, end in zip(parts, widths, ends, strict=True)}


def slice_names(path: Path, shape: Sequence[int]) -> tuple[str, ...]:
    """Return the name of every slice of a leaf or module: its dotted path with the layer index."""
    position, own = stack_position(path), stack_layers(path)
    if position is None:
        return (dotted(path),)
    if own is not None:
        return tuple(dotted((*path[:position], i, *path[position + 1 :])) for i in own)
    return tuple(dotted((*path[:position], i, *path[position:])) for i in range(shape[0]))


def layer_index(name: str) -> int | None:
    """Return the first integer in a module path: 3 for `model.layers.3.mlp.up_proj`, None for
    `lm_head`.
    """
    return next((int(key) for key in name.split(".") if key.isdigit()), None)


def tied_embedding(params: Mapping) -> Path | None:
    """Return the path of the embedding that is the output head too, or None."""
    paths = list(flatten(params))
    if any("lm_head" in path for path in paths):
        return None
    return next((p for p in paths if p[-1] == "embedding" and p[-2] in TIED_EMBEDDINGS), None)


def check_same_structure(given: Mapping, expected: Mapping, what: str) -> None:
    """Raise one `UserError` that lists the missing, unexpected and mis-shaped leaves of `given`."""
    have, want = flatten(given), flatten(expected)
    problems = [
        f"missing {dotted(path)} {tuple(want[path].shape)}" for path in want if path not in have
    ]
    problems += [
        f"unexpected {dotted(path)} {tuple(have[path].shape)}" for path in have if path not in want
    ]
    problems += [
        f"{dotted(path)} has shape {tuple(have[path].shape)}, expected {tuple(want[path].shape)}"
        for path in want
        if path in have and tuple(have[path].shape) != tuple(want[path].shape)
    ]
    if problems:
        raise UserError(f"{what}: " + summarize(problems))


def are_adapters(given: Any) -> bool:
    """Return True for a tree of trainable leaves alone, and at least one."""
    names = [path[-1] for path in flatten(given)] if isinstance(given, Mapping) else []
    return bool(names) and all(kind_of(name) is not None for name in names)


def check_parameters(given: Any, call: str) -> None:
    """Raise for an argument of `call` that is no tree of parameters: adapters, or no tree at all.

    Raises:
        UserError: it says what was given.
    """
    if are_adapters(given):
        names = [dotted(path) for path in flatten(given)]
        raise UserError(f"{call}: got adapters in place of parameters ({summarize(names, 2)})")
    if isinstance(given, tuple):
        raise UserError(f"{call}: got a tuple; lora.init returns two trees, params, adapters")
    if not isinstance(given, Mapping):
        hint = "; its parameters are model.params" if hasattr(given, "params") else ""
        raise UserError(f"{call}: got {_kind(given)}{hint}")


def check_adapters(given: Any, call: str) -> None:
    """Raise for an argument of `call` that is no tree, such as a config.

    Raises:
        UserError: it says what was given.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{call}: got {_kind(given)} in place of adapters")


def _kind(given: Any) -> str:
    name = type(given).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def summarize(problems: Sequence[str], most: int = 8) -> str:
    """Join the first problems and a count of the rest, so that an error fits on a screen."""
    more = f"\n  ... and {len(problems) - most} more" if len(problems) > most else ""
    return "\n  ".join(problems[:most]) + more


def count(tree: Any) -> int:
    """Count the elements of a tree of weights: arrays, shapes, or leaf types in place of arrays."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def nbytes(tree: Any) -> int:
    """Count the bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
