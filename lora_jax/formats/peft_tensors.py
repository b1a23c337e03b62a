"""The tensors of PEFT's adapter files: their names, and what each one is in the trainable tree.

    .../q_proj/lora_a, lora_b      layers.3.self_attn.q_proj.lora_A.weight (r, in), .lora_B (out, r)
    .../q_proj/magnitude           layers.3.self_attn.q_proj.lora_magnitude_vector (out,)
    .../experts/down_proj/lora_a   layers.3.mlp.experts.lora_A.weight (experts * r, in)
    .../experts/down_proj/lora_b   layers.3.mlp.experts.lora_B.weight (out, r * experts)
    embed_tokens/lora_a, lora_b    model.embed_tokens.lora_embedding_A (r, vocab), _B (d, r)
    .../q_proj/full_bias           ....q_proj.base_layer.bias if adapted, else ....q_proj.bias
    .../experts/.../full_kernel    layers.3.mlp.experts.down_proj (experts, out, in)
    lm_head/full_kernel            lm_head.weight (out, in); of a Conv1D (in, out)
    .../trainable_tokens           model.embed_tokens.token_adapter.trainable_tokens_delta (n, d)

An embedding that trains as one with the output head stands in the file under both names. In PEFT
the stacks of experts are parameters of one module, which it wraps once for each, from the inside:
where both of a layer are adapted, gate_up_proj is `experts.base_layer`. `layout` is the only list
of all this; `pack` and `unpack` follow it in the two directions.

PEFT knows no parts of a fused projection: `with_whole_matrices` makes one adapter of them.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.errors import UserError
from lora_jax.targets import HEAD, FullWeight, Target, Trainable, TrainableTokens
from lora_jax.tree import Path, dotted, has_experts, is_conv1d, stack_position, summarize

PREFIX = "base_model.model."
EXPERTS = ("gate_up_proj", "down_proj")  # the parameters of a module of experts, in PEFT's order
_WEIGHTS = {"kernel": ("weight", True), "embedding": ("weight", False), "scale": ("weight", False)}

Leaves = Mapping[Path, Any]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file and its place in the trainable tree."""

    key: str  # in the file
    shape: tuple[int, ...]  # in the file
    path: Path  # of the leaf in the tree
    index: int | None  # of the slice, where the leaf is a stack over layers
    sizes: tuple[int, ...]  # in the tree, padding left out
    axes: tuple[int, ...]  # of the tree in the order of the file, where neighbours may be joined
    repeats: str | None = None  # key of the tensor whose numbers it holds once more

    def to_file(self, value: np.ndarray) -> np.ndarray:
        """`value`, of the tree with padding, as it stands in the file."""
        real = value[tuple(slice(size) for size in self.sizes)]
        return np.ascontiguousarray(real.transpose(self.axes).reshape(self.shape))

    def to_tree(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `to_file`, without padding."""
        apart = value.reshape([self.sizes[axis] for axis in self.axes])
        return apart.transpose(np.argsort(self.axes))


def layout(found: Trainable) -> list[Tensor]:
    """Every tensor of the file of an adapter that trains what `found` says, in which every target
    is a whole matrix.
    """
    tied = found.config.ensure_weight_tying is True
    adapted = set(adapted_modules(found))
    tensors = [
        tensor for target in found.targets for tensor in _of_target(found, target, tied, adapted)
    ]
    tensors += [tensor for whole in found.whole for tensor in _of_whole(whole, adapted, tied)]
    return tensors + [_of_rows(rows) for rows in found.rows]


def adapted_modules(found: Trainable) -> dict[str, tuple[int, float]]:
    """Rank and alpha in the file of every module that has an adapter, by its path."""
    return {
        name: (rank, alpha)
        for parts in _by_matrix(found)
        for name, (rank, alpha) in zip(_names(parts), _joint(parts, found), strict=True)
        if rank
    }


def is_parameter(target: Target) -> bool:
    """Whether transformers holds the weight as a parameter of a module that is no linear, as it
    does routers and stacks of experts: PEFT then names the parameter.
    """
    router = target.columns is None and target.path[-1] == "gate"
    return router or target.experts is not None


def parameter_name(name: str, target: Target) -> str:
    """What PEFT calls the parameter of the module `name`."""
    return name if target.experts is not None else f"{name}.weight"


def _by_matrix(found: Trainable) -> list[list[Target]]:
    """The targets, those of one matrix together."""
    groups: dict[Path, list[Target]] = {}
    for target in found.targets:
        groups.setdefault(target.weight, []).append(target)
    return list(groups.values())


def _names(parts: Sequence[Target]) -> Sequence[str]:
    """The module path of the whole matrix in every layer."""
    first = parts[0]
    return [n if first.columns is None else n.rpartition(".")[0] for n in first.names]


def _joint(parts: Sequence[Target], found: Trainable) -> list[tuple[int, float]]:
    """Rank and alpha in every layer of one adapter that stands for those of all parts, with the
    scale of the first of them.
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
    """The same adapters with one for every matrix, side by side in rank where parts of it have
    their own; `widths` are the columns of the matrices.

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
            small |= _side_by_side(whole, parts, leaves, found)
            targets.append(whole)
        else:
            targets.append(first)
    return small, dataclasses.replace(found, targets=tuple(targets))


def _side_by_side(
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


def _of_target(found: Trainable, target: Target, tied: bool, adapted: set[str]) -> Iterable[Tensor]:
    rows, columns = target.shape
    embedding = target.leaf == "embedding"
    a_name, b_name = (
        ("lora_embedding_A", "lora_embedding_B")
        if embedding
        else ("lora_A.weight", "lora_B.weight")
    )
    a, b, magnitude = ((*target.path, leaf) for leaf in ("lora_a", "lora_b", "magnitude"))
    for i, (name, rank) in enumerate(zip(target.names, target.ranks, strict=True)):
        if not rank:
            continue
        index = i if target.stacked else None
        if target.experts is not None:
            yield from _of_experts(target, index, rank, _wrapped(name, adapted))
            continue
        first, second = f"{PREFIX}{name}.{a_name}", f"{PREFIX}{name}.{b_name}"
        yield Tensor(first, (rank, rows), a, index, (rows, rank), (1, 0))
        yield Tensor(second, (columns, rank), b, index, (rank, columns), (1, 0))
        if embedding and tied:  # the head is its transpose, so the two factors change places
            head = f"{PREFIX}{HEAD[0]}"
            own, other = (rank, columns), (rows, rank)
            yield Tensor(f"{head}.lora_A.weight", own, b, index, own, (0, 1), second)
            yield Tensor(f"{head}.lora_B.weight", other, a, index, other, (0, 1), first)
        if found.config.use_dora:
            key = f"{PREFIX}{name}.lora_magnitude_vector"
            yield Tensor(key, (columns,), magnitude, index, (columns,), (0,))


def _wrapped(name: str, adapted: set[str]) -> str:
    """Where PEFT keeps the adapter of a stack of experts."""
    module, _, own = name.rpartition(".")
    inner = own == EXPERTS[0] and f"{module}.{EXPERTS[1]}" in adapted
    return f"{module}.base_layer" if inner else module


def _of_experts(target: Target, index: int | None, rank: int, name: str) -> Iterable[Tensor]:
    (rows, columns), count = target.shape, target.experts or 0
    yield Tensor(
        f"{PREFIX}{name}.lora_A.weight",
        (count * rank, rows),
        (*target.path, "lora_a"),
        index,
        (count, rows, rank),
        (0, 2, 1),
    )
    yield Tensor(
        f"{PREFIX}{name}.lora_B.weight",
        (columns, rank * count),
        (*target.path, "lora_b"),
        index,
        (count, rank, columns),
        (2, 1, 0),
    )


def _of_whole(whole: FullWeight, adapted: set[str], tied: bool) -> Iterable[Tensor]:
    leaf, stacked = whole.path[-1], stack_position(whole.path) is not None
    shape = whole.shape[1:] if stacked else whole.shape
    suffix, turned = _WEIGHTS.get(leaf, (leaf, False))
    axes = tuple(range(len(shape)))
    if turned and not is_conv1d(whole.path[:-1]):
        axes = (*axes[:-2], axes[-1], axes[-2])
    for i, (name, chosen) in enumerate(zip(whole.names, whole.chosen, strict=True)):
        if not chosen:
            continue
        index = i if stacked else None
        inner = "base_layer." if leaf == "bias" and name in adapted else ""
        key = f"{PREFIX}{name}" if has_experts(whole.path) else f"{PREFIX}{name}.{inner}{suffix}"
        stored = tuple(shape[axis] for axis in axes)
        yield Tensor(key, stored, whole.trained, index, shape, axes)
        if leaf == "embedding" and tied:
            head = f"{PREFIX}{HEAD[0]}.{suffix}"
            yield Tensor(head, shape, whole.trained, index, shape, axes, key)


def _of_rows(rows: TrainableTokens) -> Tensor:
    key = f"{PREFIX}{dotted(rows.path[:-1])}.token_adapter.trainable_tokens_delta"
    shape = (len(rows.indices), rows.features)
    return Tensor(key, shape, rows.trained, None, shape, (0, 1))


def copies(keys: Iterable[str], found: Trainable) -> list[str]:
    """The keys by which PEFT saves more than it needs: the frozen weight of adapted embeddings and
    heads, and with bias=all the biases of modules_to_save once more.
    """
    modules = {HEAD[0], *adapted_modules(found)}
    frozen = {f"{PREFIX}{name}.base_layer.weight" for name in modules}
    inner = tuple(
        f"{PREFIX}{name}.{part}."
        for name in found.config.modules_to_save or ()
        for part in ("modules_to_save", "original_module")
    )
    return [key for key in keys if key in frozen or (inner and key.startswith(inner))]


def pack(leaves: Leaves, found: Trainable) -> dict[str, np.ndarray]:
    """The tensors of the file, sorted by name; padding is left out."""
    tensors = {}
    for tensor in layout(found):
        value = np.asarray(leaves[tensor.path], np.float32)
        tensors[tensor.key] = tensor.to_file(value if tensor.index is None else value[tensor.index])
    return dict(sorted(tensors.items()))


def unpack(tensors: Mapping[str, np.ndarray], found: Trainable, shapes: Leaves) -> dict:
    """Leaves (float32) of the trainable tree, whose shapes are `shapes`; zero where the file has
    nothing: in padding and in slices that do not train.
    """
    leaves = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
    for tensor in layout(found):
        if not tensor.repeats:
            place = leaves[tensor.path]
            place = place if tensor.index is None else place[tensor.index]
            place[tuple(slice(size) for size in tensor.sizes)] = tensor.to_tree(tensors[tensor.key])
    return leaves


def check(tensors: Mapping[str, np.ndarray], found: Trainable, what: str) -> None:
    """That a file holds what `found` trains and nothing else.

    Raises:
        UserError: tensors that are missing, unexpected, mis-shaped, not finite, or not the same
            under both names of a tied embedding; all of them listed, after `what`.
    """
    expected = layout(found)
    wanted = {tensor.key: tensor.shape for tensor in expected}
    missing = [f"missing {key} {shape}" for key, shape in wanted.items() if key not in tensors]
    problems = [f"unexpected {k} {array.shape}" for k, array in tensors.items() if k not in wanted]
    if any(re.search(r"\.experts\.\d+\.", key) for key in tensors):
        raise UserError(
            f"{what}: it holds an adapter for every single expert, as PEFT wrote before "
            "transformers 5; load it in PEFT and save it again, which stacks them"
        )
    problems += [
        f"{key} has shape {tensors[key].shape}, expected {shape}"
        for key, shape in wanted.items()
        if key in tensors and tensors[key].shape != shape
    ]
    problems += [
        f"{key} holds numbers that are not finite"
        for key, array in tensors.items()
        if not np.isfinite(array.astype(np.float32)).all()
    ]
    if not problems and not missing:
        by_key = {tensor.key: tensor for tensor in expected}
        problems += [
            f"{tensor.key} does not hold the numbers of {tensor.repeats}, although "
            "ensure_weight_tying is true"
            for tensor in expected
            if tensor.repeats and not _same(tensor, by_key[tensor.repeats], tensors)
        ]
    if lists := [summarize(lines) for lines in (problems, missing) if lines]:
        raise UserError(f"{what}:\n  " + "\n  ".join(lists))


def _same(one: Tensor, other: Tensor, tensors: Mapping[str, np.ndarray]) -> bool:
    first, second = (tensor.to_tree(tensors[tensor.key]) for tensor in (one, other))
    return np.array_equal(first, second)


def within_limits(leaves: Leaves, found: Trainable) -> tuple[dict[Path, Any], Trainable]:
    """The same adapters with no rank above min(in, out), which as the sum of two they can have: a
    product of so many columns is one of the smaller side's identity and a matrix.
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
    """The same adapters with one rank and one alpha for all modules, for readers that know no
    patterns: padded to the largest rank, the rest of every scale in `lora_b`.
    """
    config, small, targets = found.config, dict(leaves), []
    rank = max(target.rank for target in found.targets)
    for target in found.targets:
        ranks = tuple(rank if own else 0 for own in target.ranks)
        alphas = (config.alpha,) * len(ranks)
        uniform = dataclasses.replace(target, ranks=ranks, alphas=alphas)
        old, new = target.scales(config.use_rslora), uniform.scales(config.use_rslora)
        factor = np.divide(old, new, out=np.zeros_like(old), where=new > 0)
        a, b = (np.asarray(leaves[(*target.path, leaf)]) for leaf in ("lora_a", "lora_b"))
        missing = rank - a.shape[-1]
        lead = ((0, 0),) * (a.ndim - 2)
        small[(*target.path, "lora_a")] = np.pad(a, (*lead, (0, 0), (0, missing)))
        small[(*target.path, "lora_b")] = np.pad(b * factor, (*lead, (0, missing), (0, 0)))
        targets.append(uniform)
    config = dataclasses.replace(config, rank=rank, rank_pattern={}, alpha_pattern={})
    return small, dataclasses.replace(found, config=config, targets=tuple(targets))
