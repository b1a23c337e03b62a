"""Parameter trees by path: which weights an adapter targets, and what structures must agree.

A parameter tree is nested dicts. Its key path follows the Hugging Face module path, except that the
layers of a model may be stacked along a leading axis, in which case the layer index is left out:

    tree path      model / layers / self_attn / q_proj / kernel      (layers, in, out)
    module paths   model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj, ...

Users name modules by the second form, with the rules of PEFT; `find_targets` is the only place that
translates.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.config import AdapterConfig, UserError, adapter_problems, nearest, raise_all

Path = tuple[str, ...]

STACKS = (
    "layers",
    "h",
    "layer",
    "blocks",
)  # containers whose children share a leading `layers` axis
OUTPUT_HEADS = ("lm_head", "score", "classifier")  # linears that `all-linear` leaves out


@dataclass(frozen=True)
class Target:
    """A weight that takes an adapter: one matrix, or a stack of them with a rank and an alpha for
    each slice.
    """

    path: Path  # of the module in the tree
    leaf: str  # name of the weight in it
    shape: tuple[int, int]  # (in, out) of one slice
    stacked: bool
    names: tuple[str, ...]  # module path of every slice
    ranks: tuple[int, ...]  # of every slice; 0: not adapted
    alphas: tuple[float, ...]  # of every slice

    @property
    def rank(self) -> int:
        """The stored rank: the largest of the slices; smaller ones are padded with zeros."""
        return max(self.ranks)

    @property
    def parameters(self) -> int:
        """Trainable numbers, padding left out."""
        return sum(self.ranks) * sum(self.shape)

    def scales(self, use_rslora: bool) -> np.ndarray:
        """alpha / rank (rsLoRA: alpha / sqrt(rank)) per slice, broadcastable to lora_b; 0 where not
        adapted.
        """
        values = [
            alpha / (math.sqrt(rank) if use_rslora else rank) if rank else 0.0
            for rank, alpha in zip(self.ranks, self.alphas, strict=True)
        ]
        return np.asarray(values, np.float32).reshape((-1, 1, 1) if self.stacked else ())

    def rank_mask(self) -> np.ndarray:
        """1 where a column of lora_a is real, 0 where it is padding: (layers, 1, rank), or (1,
        rank) if not stacked.
        """
        mask = np.arange(self.rank) < np.asarray(self.ranks)[:, None]
        return mask.astype(np.float32)[:, None, :] if self.stacked else mask.astype(np.float32)


def flatten(tree: Mapping) -> dict[Path, Any]:
    """Leaves by key path, every key as a string (NNX lists have integer keys)."""
    return {tuple(map(str, path)): leaf for path, leaf in flatten_dict(dict(tree)).items()}


def unflatten(leaves: Mapping[Path, Any]) -> dict:
    """The inverse of `flatten`."""
    return unflatten_dict(leaves)


def dotted(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


def stack_position(path: Path) -> int | None:
    """Where the layer index belongs in the module path of a stacked leaf; None if the leaf is not
    stacked.
    """
    for position, key in enumerate(path[:-1]):
        if key in STACKS and not path[position + 1].isdigit():
            return position + 1
    return None


def slice_names(path: Path, shape: Sequence[int]) -> tuple[str, ...]:
    """The name of every slice of a leaf or module: its dotted path with the layer index put in."""
    position = stack_position(path)
    if position is None:
        return (dotted(path),)
    return tuple(dotted((*path[:position], i, *path[position:])) for i in range(shape[0]))


def matches(name: str, spec: str | Sequence[str]) -> bool:
    """PEFT's rule: a string must match the whole module path as a regex, a list entry is the path
    or a suffix of it.
    """
    if isinstance(spec, str):
        return re.fullmatch(spec, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in spec)


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that ends the module path (PEFT's rank_pattern and
    alpha_pattern).
    """
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def find_targets(params: Mapping, config: AdapterConfig) -> list[Target]:
    """The weights that `config` adapts, in the order of the tree; `params` may hold arrays or only
    shapes.

    Raises:
        UserError: an entry of target_modules, exclude_modules, rank_pattern or alpha_pattern that
            matches nothing, an invalid regex, a layer index that does not exist, a rank above
            min(in, out), an impossible value; all problems at once.
    """
    linears: dict[Path, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for path, leaf in flatten(params).items():
        if path[-1] == "kernel" and len(leaf.shape) == (2 if stack_position(path) is None else 3):
            linears[path] = (tuple(leaf.shape), slice_names(path[:-1], leaf.shape))
    names = [name for _, slices in linears.values() for name in slices]
    problems = adapter_problems(config) + list(_selection_problems(config, names))
    raise_all(problems)
    selected = {name for name in names if _is_selected(name, config)}
    problems = list(_pattern_problems(config, selected))
    if any("is not a valid regex" in problem for problem in problems):
        raise_all(problems)  # ranks cannot be looked up
    targets = []
    for path, (shape, slices) in linears.items():
        ranks = tuple(
            pattern_value(config.rank_pattern, name, config.rank) if name in selected else 0
            for name in slices
        )
        if not any(ranks):
            continue
        alphas = tuple(
            float(pattern_value(config.alpha_pattern, name, config.alpha)) for name in slices
        )
        width, height = shape[-2:]
        if max(ranks) > min(width, height):
            name = slices[ranks.index(max(ranks))]
            problems.append(
                f"rank={max(ranks)} is larger than {name} allows: its shape is {(width, height)}, "
                f"so a rank above {min(width, height)} adds parameters and no expressive power"
            )
        targets.append(
            Target(path[:-1], path[-1], (width, height), len(shape) == 3, slices, ranks, alphas)
        )
    raise_all(problems)
    return targets


def _layers_to_transform(config: AdapterConfig) -> list[int] | None:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else layers


def layer_index(name: str) -> int | None:
    """The first number in a module path: `model.layers.3.mlp.up_proj` is in layer 3, `lm_head` in
    none.
    """
    return next((int(key) for key in name.split(".") if key.isdigit()), None)


def _is_selected(name: str, config: AdapterConfig) -> bool:
    if config.target_modules == "all-linear":
        wanted = name.rpartition(".")[2] not in OUTPUT_HEADS
    else:
        wanted = matches(name, config.target_modules)
    layers = _layers_to_transform(config)
    if layers is not None:
        whole = not isinstance(config.target_modules, str) and name in config.target_modules
        wanted = wanted and (
            whole or layer_index(name) in layers
        )  # PEFT: a whole path holds in any layer
    return wanted and not (config.exclude_modules and matches(name, config.exclude_modules))


def _entry_problems(field: str, spec: Any, names: Sequence[str]) -> Iterable[str]:
    short = sorted({name.rpartition(".")[2] for name in names})
    if isinstance(spec, str):
        try:
            if not any(matches(name, spec) for name in names):
                hint = nearest(spec, short).replace("'", "['", 1).replace("'?", "']?")
                yield (
                    f"{field}={spec!r} matches no weight. A string is a regex for the whole "
                    "module path, such as "
                    f"{max(names, key=len)!r}; a list holds names; the model has: "
                    f"{', '.join(short)}.{hint}"
                )
        except re.error as error:
            yield f"{field}={spec!r} is not a valid regex: {error}"
        return
    if (
        not isinstance(spec, Sequence)
        or not spec
        or not all(isinstance(entry, str) for entry in spec)
    ):
        yield (
            f"{field}={spec!r} must be a string or a non-empty list of strings; the model has: "
            f"{', '.join(short)}."
        )
        return
    for entry in spec:
        if not any(matches(name, [entry]) for name in names):
            candidates = short if "." not in entry else names
            yield (
                f"{field}=[{entry!r}] matches no weight; the model has: {', '.join(short)}."
                f"{nearest(entry, candidates)}"
            )


def _selection_problems(config: AdapterConfig, names: Sequence[str]) -> Iterable[str]:
    if not names:
        yield "the model has no linear weight that could take an adapter"
        return
    if config.target_modules != "all-linear":
        yield from _entry_problems("target_modules", config.target_modules, names)
    if config.exclude_modules:
        yield from _entry_problems("exclude_modules", config.exclude_modules, names)
    layers = _layers_to_transform(config)
    if layers is not None:
        known = sorted({index for index in map(layer_index, names) if index is not None})
        if (
            not isinstance(layers, Sequence)
            or not layers
            or any(type(i) is not int for i in layers)
        ):
            yield (
                f"layers_to_transform={layers!r} must be a layer index or a non-empty list of them"
            )
        elif missing := sorted(set(layers) - set(known)):
            yield (
                f"layers_to_transform={missing} does not exist; the model has layers {known[0]} "
                f"to {known[-1]}"
            )


def _pattern_problems(config: AdapterConfig, selected: set[str]) -> Iterable[str]:
    if not selected:
        yield (
            f"target_modules={config.target_modules!r} with "
            f"exclude_modules={config.exclude_modules!r} and "
            f"layers_to_transform={config.layers_to_transform!r} leaves no weight to adapt"
        )
    short = sorted({name.rpartition(".")[2] for name in selected})
    for field, patterns in (
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        for pattern in patterns:
            try:
                if not any(pattern_value({pattern: True}, name, False) for name in selected):
                    yield (
                        f"{field}[{pattern!r}] matches no adapted module; they are: "
                        f"{', '.join(short)}."
                        f"{nearest(pattern, short)}"
                    )
            except re.error as error:
                yield f"{field}[{pattern!r}] is not a valid regex: {error}"


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


def summarize(problems: Sequence[str], most: int = 8) -> str:
    """The first problems and a count of the rest, so that an error stays on one screen."""
    more = f"\n  ... and {len(problems) - most} more" if len(problems) > most else ""
    return "\n  ".join(problems[:most]) + more


def count(tree: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
