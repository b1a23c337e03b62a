"""The tensors of PEFT's adapter files: their names, and what each one is in the trainable tree.

    .../q_proj/lora_a, lora_b      layers.3.self_attn.q_proj.lora_A.weight (r, in), .lora_B (out, r)
    .../q_proj/magnitude           layers.3.self_attn.q_proj.lora_magnitude_vector (out,)
    .../experts/down_proj/lora_a   layers.3.mlp.experts.lora_A.weight (experts * r, in)
    .../experts/down_proj/lora_b   layers.3.mlp.experts.lora_B.weight (out, r * experts)
    embed_tokens/lora_a, lora_b    model.embed_tokens.lora_embedding_A (r, vocab), _B (d, r)
    .../q_proj/full_bias           ....q_proj.base_layer.bias if adapted, else ....q_proj.bias
    .../experts/.../full_kernel    layers.3.mlp.experts.down_proj (experts, out, in), or as here
    .../experts/.../full_bias      layers.3.mlp.experts.down_proj_bias (experts, out)
    lm_head/full_kernel            lm_head.weight (out, in); of a Conv1D (in, out)
    .../trainable_tokens           model.embed_tokens.token_adapter.trainable_tokens_delta (n, d)

An embedding that trains as one with the output head is in the file under both names. In PEFT
the stacks of experts are parameters of one module, which it wraps once for each, from the inside:
where both of a layer are adapted, gate_up_proj is `experts.base_layer`. `layout` is the only list
of all this; `pack` and `unpack` follow it in the two directions. PEFT knows no parts of a fused
projection: `peft_forms` makes one adapter of them first.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lora_jax.errors import UserError
from lora_jax.formats.peft_forms import EXPERTS, Leaves, adapted_modules
from lora_jax.leaves import known_kind
from lora_jax.targets import HEAD, FullWeight, Leaf, Target, Trainable, TrainableTokens
from lora_jax.tree import WEIGHTS, Path, dotted, has_experts, is_conv1d, stack_position, summarize

PREFIX = "base_model.model."
_WEIGHTS: dict[str, str] = dict.fromkeys(WEIGHTS, "weight")


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
        """Return `value`, of the tree with padding, as it is in the file."""
        real = value[tuple(slice(size) for size in self.sizes)]
        return np.ascontiguousarray(real.transpose(self.axes).reshape(self.shape))

    def to_tree(self, value: np.ndarray) -> np.ndarray:
        """Invert `to_file`, without padding."""
        apart = value.reshape([self.sizes[axis] for axis in self.axes])
        return apart.transpose(np.argsort(self.axes))


def layout(found: Trainable) -> list[Tensor]:
    """List the tensors in the file of an adapter that trains `found`, in which every target is a
    whole matrix.
    """
    tied = found.config.ensure_weight_tying is True
    adapted = set(adapted_modules(found))
    tensors = [tensor for target in found.targets for tensor in _of_target(target, tied, adapted)]
    # Experts with biases, gpt-oss's, are (experts, in, out) in transformers.
    straight = {w.path[:-1] for w in found.whole if w.path[-1] == "bias" and has_experts(w.path)}
    for whole in found.whole:
        turned = whole.path[-1] == "kernel" and not is_conv1d(whole.path[:-1])
        tensors += _of_whole(whole, adapted, tied, turned and whole.path[:-1] not in straight)
    tensors += [_of_shared(leaf) for leaf in found.leaves if leaf.name in found.shared]
    return tensors + [_of_tokens(tokens) for tokens in found.rows]


def _of_target(target: Target, tied: bool, adapted: set[str]) -> Iterable[Tensor]:
    embedding = target.leaf == "embedding"
    for i, (name, rank) in enumerate(zip(target.names, target.ranks, strict=True)):
        if not rank:
            continue
        index = i if target.stacked else None
        if target.experts is not None:
            yield from _of_experts(target, index, rank, _wrapped(name, adapted))
            continue
        stored = [leaf for leaf in target.leaves if known_kind(leaf).file]
        tensors = [_of_leaf(target, leaf, index, name, rank) for leaf in stored]
        yield from tensors
        if embedding and tied:  # the head is its transpose, so the two factors change places
            for first, suffix in zip(tensors[:2], ("lora_B.weight", "lora_A.weight"), strict=True):
                key, axes = f"{PREFIX}{HEAD[0]}.{suffix}", (0, 1)
                yield Tensor(key, first.sizes, first.path, index, first.sizes, axes, first.key)


def _of_leaf(target: Target, leaf: str, index: int | None, name: str, rank: int) -> Tensor:
    """Return the tensor of a leaf in one layer: the same numbers, transposed."""
    kind, sizes = known_kind(leaf), target.leaf_shape(leaf, rank)
    file = kind.embedding_file if target.leaf == "embedding" else None
    key = f"{PREFIX}{name}.{file or kind.file}"
    axes = tuple(reversed(range(len(sizes))))
    return Tensor(key, sizes[::-1], (*target.path, leaf), index, sizes, axes)


def _wrapped(name: str, adapted: set[str]) -> str:
    """Return the module in which PEFT keeps the adapter of a stack of experts."""
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


def _of_whole(whole: FullWeight, adapted: set[str], tied: bool, turned: bool) -> Iterable[Tensor]:
    leaf, stacked = whole.path[-1], stack_position(whole.path) is not None
    shape = whole.shape[1:] if stacked else whole.shape
    suffix = _WEIGHTS.get(leaf, leaf)
    axes = tuple(range(len(shape)))
    if turned:
        axes = (*axes[:-2], axes[-1], axes[-2])
    for i, (name, chosen) in enumerate(zip(whole.names, whole.chosen, strict=True)):
        if not chosen:
            continue
        index = i if stacked else None
        inner = "base_layer." if leaf == "bias" and name in adapted else ""
        key = f"{PREFIX}{name}.{inner}{suffix}"
        if has_experts(whole.path):
            key = f"{PREFIX}{name}{'' if leaf == 'kernel' else '_bias'}"
        stored = tuple(shape[axis] for axis in axes)
        yield Tensor(key, stored, whole.trained, index, shape, axes)
        if leaf == "embedding" and tied:
            head = f"{PREFIX}{HEAD[0]}.{suffix}"
            yield Tensor(head, shape, whole.trained, index, shape, axes, key)


def _of_tokens(tokens: TrainableTokens) -> Tensor:
    file = known_kind(tokens.trained[-1]).file
    key, shape = f"{PREFIX}{dotted(tokens.path[:-1])}.{file}", tokens.shape
    return Tensor(key, shape, tokens.trained, None, shape, (0, 1))


def _of_shared(leaf: Leaf) -> Tensor:
    """Return the tensor of a leaf that all targets share, outside of the modules of the model."""
    key = f"{PREFIX.partition('.')[0]}.{leaf.kind.file}"
    return Tensor(key, leaf.shape[::-1], leaf.path, None, leaf.shape, (1, 0))


def copies(keys: Iterable[str], found: Trainable) -> list[str]:
    """List the keys by which PEFT saves more than it needs: the frozen weight of adapted embeddings
    and heads, and with bias=all the biases of modules_to_save once more.
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
    """Return the tensors of the file, sorted by name; padding is left out."""
    tensors = {}
    for tensor in layout(found):
        value = np.asarray(leaves[tensor.path], np.float32)
        tensors[tensor.key] = tensor.to_file(value if tensor.index is None else value[tensor.index])
    return dict(sorted(tensors.items()))


def unpack(tensors: Mapping[str, np.ndarray], found: Trainable) -> dict[Path, np.ndarray]:
    """Return the leaves (float32) of the trainable tree; zero where the file has nothing: in
    padding and in slices that do not train.
    """
    leaves = {leaf.path: np.zeros(leaf.shape, np.float32) for leaf in found.leaves}
    for tensor in layout(found):
        if not tensor.repeats:
            place = leaves[tensor.path]
            place = place if tensor.index is None else place[tensor.index]
            place[tuple(slice(size) for size in tensor.sizes)] = tensor.to_tree(tensors[tensor.key])
    return leaves


def check(tensors: Mapping[str, np.ndarray], found: Trainable, what: str) -> None:
    """Check that a file holds what `found` trains and nothing else.

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
