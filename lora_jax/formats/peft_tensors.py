"""The tensors of PEFT's adapter files: their names, and what each one is in the trainable tree.

    .../q_proj/lora_a, lora_b      layers.3.self_attn.q_proj.lora_A.weight (r, in), .lora_B (out, r)
    .../q_proj/magnitude           layers.3.self_attn.q_proj.lora_magnitude_vector (out,)
    embed_tokens/lora_a, lora_b    model.embed_tokens.lora_embedding_A (r, vocab), _B (d, r)
    .../q_proj/full_bias           ....q_proj.base_layer.bias if adapted, else ....q_proj.bias
    lm_head/full_kernel            lm_head.weight (out, in)
    .../trainable_tokens           model.embed_tokens.token_adapter.trainable_tokens_delta (n, d)

An embedding that trains as one with the output head stands in the file under both names. `layout`
is the only list of all this; `pack` and `unpack` follow it in the two directions.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.config import UserError
from lora_jax.targets import HEAD, Rows, Target, Trainable, Whole
from lora_jax.tree import Path, dotted, stack_position, summarize

PREFIX = "base_model.model."
_WEIGHTS = {"kernel": ("weight", True), "embedding": ("weight", False), "scale": ("weight", False)}

Leaves = Mapping[Path, Any]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file and its place in the trainable tree."""

    key: str  # in the file
    shape: tuple[int, ...]  # in the file
    path: Path  # of the leaf in the tree
    index: int | None = None  # of the slice, where the leaf is a stack
    transposed: bool = False  # between tree and file
    repeats: str | None = None  # key of the tensor whose numbers it holds once more


def layout(found: Trainable) -> list[Tensor]:
    """Every tensor of the file of an adapter that trains what `found` says."""
    tied = found.config.ensure_weight_tying is True
    adapted = set(adapted_modules(found))
    tensors = [tensor for target in found.targets for tensor in _of_target(found, target, tied)]
    tensors += [tensor for whole in found.whole for tensor in _of_whole(whole, adapted, tied)]
    return tensors + [_of_rows(rows) for rows in found.rows]


def adapted_modules(found: Trainable) -> dict[str, tuple[int, float]]:
    """Rank and alpha of every module that has an adapter, by its path."""
    return {
        name: (rank, alpha)
        for target in found.targets
        for name, rank, alpha in zip(target.names, target.ranks, target.alphas, strict=True)
        if rank
    }


def _of_target(found: Trainable, target: Target, tied: bool) -> Iterable[Tensor]:
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
        first, second = f"{PREFIX}{name}.{a_name}", f"{PREFIX}{name}.{b_name}"
        yield Tensor(first, (rank, rows), a, index, True)
        yield Tensor(second, (columns, rank), b, index, True)
        if embedding and tied:  # the head is its transpose, so the two factors change places
            head = f"{PREFIX}{HEAD[0]}"
            yield Tensor(f"{head}.lora_A.weight", (rank, columns), b, index, False, second)
            yield Tensor(f"{head}.lora_B.weight", (rows, rank), a, index, False, first)
        if found.config.use_dora:
            yield Tensor(f"{PREFIX}{name}.lora_magnitude_vector", (columns,), magnitude, index)


def _of_whole(whole: Whole, adapted: set[str], tied: bool) -> Iterable[Tensor]:
    leaf, stacked = whole.path[-1], stack_position(whole.path) is not None
    shape = whole.shape[1:] if stacked else whole.shape
    suffix, transposed = _WEIGHTS.get(leaf, (leaf, False))
    for i, (name, chosen) in enumerate(zip(whole.names, whole.chosen, strict=True)):
        if not chosen:
            continue
        index = i if stacked else None
        inner = "base_layer." if leaf == "bias" and name in adapted else ""
        key = f"{PREFIX}{name}.{inner}{suffix}"
        yield Tensor(key, shape[::-1] if transposed else shape, whole.trained, index, transposed)
        if leaf == "embedding" and tied:
            head = f"{PREFIX}{HEAD[0]}.{suffix}"
            yield Tensor(head, shape, whole.trained, index, False, key)


def _of_rows(rows: Rows) -> Tensor:
    key = f"{PREFIX}{dotted(rows.path[:-1])}.token_adapter.trainable_tokens_delta"
    return Tensor(key, (len(rows.indices), rows.features), rows.trained)


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
        value = value if tensor.index is None else value[tensor.index]
        sizes = tensor.shape[::-1] if tensor.transposed else tensor.shape
        value = value[tuple(slice(size) for size in sizes)]
        tensors[tensor.key] = np.ascontiguousarray(value.T if tensor.transposed else value)
    return dict(sorted(tensors.items()))


def unpack(tensors: Mapping[str, np.ndarray], found: Trainable, shapes: Leaves) -> dict:
    """Leaves (float32) of the trainable tree, whose shapes are `shapes`; zero where the file has
    nothing: in padding and in slices that do not train.
    """
    leaves = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
    for tensor in layout(found):
        if tensor.repeats:
            continue
        value = tensors[tensor.key].astype(np.float32)
        value = value.T if tensor.transposed else value
        place = leaves[tensor.path]
        place = place if tensor.index is None else place[tensor.index]
        place[tuple(slice(size) for size in value.shape)] = value
    return leaves


def check(tensors: Mapping[str, np.ndarray], found: Trainable, what: str) -> None:
    """That a file holds what `found` trains and nothing else.

    Raises:
        UserError: tensors that are missing, unexpected, mis-shaped, not finite, or not the same
            under both names of a tied embedding; all of them listed, after `what`.
    """
    expected = layout(found)
    wanted = {tensor.key: tensor.shape for tensor in expected}
    problems = [f"missing {key} {shape}" for key, shape in wanted.items() if key not in tensors]
    problems += [f"unexpected {k} {array.shape}" for k, array in tensors.items() if k not in wanted]
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
    if not problems:
        by_key = {tensor.key: tensor for tensor in expected}
        problems += [
            f"{tensor.key} does not hold the numbers of {tensor.repeats}, although "
            "ensure_weight_tying is true"
            for tensor in expected
            if tensor.repeats and not _same(tensor, by_key[tensor.repeats], tensors)
        ]
    if problems:
        raise UserError(f"{what}:\n  " + summarize(problems))


def _same(one: Tensor, other: Tensor, tensors: Mapping[str, np.ndarray]) -> bool:
    first, second = (tensors[t.key].T if t.transposed else tensors[t.key] for t in (one, other))
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
