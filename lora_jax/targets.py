"""What a config trains: weights that take an adapter, weights that train whole, rows of tokens.

Users name modules by their Hugging Face path, with the rules of PEFT; `find_trainable` is the only
place that translates. The trainable tree has its leaves beside the weights they belong to:

    model/layers/self_attn/q_proj/{lora_a, lora_b}     an update of low rank
    model/layers/self_attn/q_proj/magnitude            DoRA's size of every column
    model/norm/full_scale, lm_head/full_kernel         the weight itself, trained
    model/embed_tokens/trainable_tokens                rows of an embedding
    prompt_embeddings                                  virtual tokens (p, d)
    prefix_{keys,values,gate}                          the same in every layer (layers, p, k * h)

A model whose embedding is its output head too (tied) has no `lm_head` in its tree; it can still be
named, and then has leaves of its own.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.config import (
    DATA_INITS,
    SOFT,
    AdapterConfig,
    UserError,
    adapter_problems,
    nearest,
    raise_all,
    virtual_tokens,
)
from lora_jax.quantize import Int8Weight, NF4Weight, quantizes
from lora_jax.selection import (
    is_selected,
    matches,
    pattern_problems,
    pattern_value,
    selection_problems,
)
from lora_jax.tree import (
    OUTPUT_HEADS,
    TIED_EMBEDDINGS,
    Path,
    dotted,
    flatten,
    fused_columns,
    has_experts,
    is_router,
    lead_axes,
    slice_names,
    stack_position,
    summarize,
    tied_embedding,
)

HEAD = ("lm_head", "kernel")  # where a tied head would have its weight


def changes_base(config: AdapterConfig) -> bool:
    """Whether the init takes its part out of the base; loftq does from its second round on."""
    if config.init == "loftq":
        return config.loftq_iter > 1
    return config.init in ("pissa", "olora", "lora_ga")


def needs_floats(config: AdapterConfig) -> bool:
    """Whether the init needs the weights as they are before they are quantised."""
    return config.init == "loftq" or changes_base(config)


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
        return self._in_files(factors=2 if changes_base(self.config) else 1)

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


def find_trainable(params: Mapping, config: AdapterConfig) -> Trainable:
    """What `config` trains of `params`, which may hold arrays or only shapes; in the order of the
    tree.

    Raises:
        UserError: an entry of target_modules, exclude_modules, modules_to_save, rank_pattern or
            alpha_pattern that matches nothing, an invalid regex, a layer or token that does not
            exist, a rank above min(in, out), an impossible value, settings that contradict each
            other, a tied head without a decision; all problems of a kind at once.
    """
    raise_all(adapter_problems(config))
    if config.method == "full":
        everything = Trainable(config, whole=tuple(_whole(params, lambda name, path: True)))
        raise_all(list(_dense_problems(params, everything)))
        return everything
    if config.method in SOFT:
        return Trainable(config, virtual=_find_virtual(params, config))
    saved = _find_saved(params, config)
    whole = {
        name
        for found in saved
        for name, chosen in zip(found.names, found.chosen, strict=True)
        if chosen
    }
    targets = _find_lora(params, config, whole)
    adapted = {
        name
        for target in targets
        for name, rank in zip(target.names, target.ranks, strict=True)
        if rank
    }
    biases = _find_biases(params, config, adapted)
    rows = _find_rows(params, config)
    found = Trainable(config, tuple(targets), _joined([*saved, *biases]), rows)
    raise_all([*_combination_problems(params, found), *_dense_problems(params, found)])
    return _tie(params, found)


def _find_virtual(params: Mapping, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of virtual tokens: their features are those of the embedding, or of the keys of a
    layer.
    """
    count, leaves = virtual_tokens(config), flatten(params)
    embedding = _token_embedding(leaves)
    if embedding is None:
        raise UserError(f"method={config.method}: the model has no embedding of tokens to go with")
    if config.method == "prompt":
        return {"prompt_embeddings": (count, leaves[embedding].shape[1])}
    for path, leaf in leaves.items():
        start, stop = fused_columns(path, leaves).get("k", (0, leaf.shape[-1]))
        if path[-1] == "kernel" and (path[-2] == "k_proj" or stop - start < leaf.shape[-1]):
            shape = (leaf.shape[0], count, stop - start)
            gate = {"prefix_gate": shape[:1]} if config.prefix_gate else {}
            return {"prefix_keys": shape, "prefix_values": shape} | gate
    raise UserError("method=prefix: the model has no k_proj, qkv_proj or c_attn that makes keys")


def _token_embedding(leaves: Mapping[Path, Any]) -> Path | None:
    return next((p for p in leaves if p[-1] == "embedding" and p[-2] in TIED_EMBEDDINGS), None)


def find_targets(params: Mapping, config: AdapterConfig) -> list[Target]:
    """The weights that take an adapter.

    Raises:
        UserError: as `find_trainable`.
    """
    return list(find_trainable(params, config).targets)


@dataclass(frozen=True)
class _Candidate:
    """A weight that can take an adapter."""

    path: Path  # of the module, or of a part of a fused one
    leaf: str
    shape: tuple[int, ...]  # of the leaf, in the columns it has
    columns: tuple[int, int] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return slice_names(self.path, self.shape)


def _candidates(params: Mapping) -> list[_Candidate]:
    """Linears, parts of fused ones, stacks of experts, embeddings, a tied head."""
    leaves, found = flatten(params), []
    for path, leaf in leaves.items():
        if path[-1] not in ("kernel", "embedding") or len(leaf.shape) != lead_axes(path) + 2:
            continue
        shape = tuple(leaf.shape)
        found.append(_Candidate(path[:-1], path[-1], shape))
        for part, (start, stop) in fused_columns(path, leaves).items():
            of_part = (*shape[:-1], stop - start)
            found.append(_Candidate((*path[:-1], part), path[-1], of_part, (start, stop)))
    if (tied := tied_embedding(params)) is not None:
        found.append(_Candidate(HEAD[:-1], HEAD[-1], tuple(leaves[tied].shape[::-1])))
    return found


def _stack_problems(leaves: Mapping[Path, Any]) -> Iterable[str]:
    """Matrices that stand where a stack of them is expected: nothing is left out in silence."""
    for path, leaf in leaves.items():
        if path[-1] in ("kernel", "embedding") and len(leaf.shape) == 2 and lead_axes(path):
            position = stack_position(path)
            container = "experts" if position is None else path[position - 1]
            yield (
                f"{dotted(path)} has shape {tuple(leaf.shape)}: weights below a module called "
                f"{container!r} are stacks with a leading axis; give it another name, or make it a "
                "list of modules"
            )


def _find_lora(params: Mapping, config: AdapterConfig, saved: set[str]) -> list[Target]:
    leaves, candidates = flatten(params), _candidates(params)
    if problems := list(_stack_problems(leaves)):
        raise UserError(summarize(problems))
    names = [name for one in candidates for name in one.names]
    linears = [
        one
        for one in candidates
        if one.leaf == "kernel" and one.columns is None and (*one.path, one.leaf) in leaves
    ]
    listed = [name for one in linears for name in one.names]
    raise_all(list(selection_problems(config, names, listed)))
    usual = {
        name
        for one in linears
        for name in one.names
        if not set(one.path) & set(OUTPUT_HEADS)
        and not is_router((*one.path, one.leaf), leaves)
        and name not in saved
    }
    parts = {name for one in candidates if one.columns is not None for name in one.names}
    if config.target_modules != "all-linear":
        usual = set(names) - parts
    selected = {name for name in names if name in usual and is_selected(name, config)}
    selected |= {name for name in parts if _is_named_part(name, config, selected)}
    problems = list(pattern_problems(config, selected))
    if any("is not a valid regex" in problem for problem in problems):
        raise_all(problems)  # ranks cannot be looked up
    targets = []
    for one in candidates:
        ranks = tuple(
            pattern_value(config.rank_pattern, name, config.rank) if name in selected else 0
            for name in one.names
        )
        if not any(ranks):
            continue
        alphas = tuple(
            float(pattern_value(config.alpha_pattern, name, config.alpha)) for name in one.names
        )
        width, height = one.shape[-2:]
        if max(ranks) > min(width, height):
            name = one.names[ranks.index(max(ranks))]
            problems.append(
                f"rank={max(ranks)} is larger than {name} allows: its shape is {(width, height)}, "
                f"so a rank above {min(width, height)} adds parameters and no expressive power"
            )
        odd = [rank for rank in ranks if rank % 2]
        if config.init == "orthogonal" and odd:
            name = one.names[ranks.index(odd[0])]
            problems.append(
                f"init=orthogonal needs an even rank: it halves it; rank={odd[0]} at {name}"
            )
        stacked = stack_position((*one.path, one.leaf)) is not None
        path = (*one.path, one.leaf)
        experts = one.shape[-3] if has_experts(path) else None
        shape = (width, height)
        targets.append(
            Target(
                one.path, one.leaf, shape, stacked, one.names, ranks, alphas, one.columns, experts
            )
        )
    raise_all(problems)
    return targets


def _is_named_part(name: str, config: AdapterConfig, selected: set[str]) -> bool:
    """Whether a part of a fused projection is adapted: it has to be named with its module, and a
    regex that takes the whole matrix does not mean its parts.
    """
    spec, whole = config.target_modules, name.rpartition(".")[0]
    if isinstance(spec, str):
        return spec != "all-linear" and whole not in selected and is_selected(name, config)
    named = [entry for entry in spec if "." in entry]
    return is_selected(name, dataclasses.replace(config, target_modules=named))


def _whole(params: Mapping, choose: Any) -> Iterable[Whole]:
    for path, leaf in flatten(params).items():
        names = slice_names(path[:-1], leaf.shape)
        chosen = tuple(choose(name, path) for name in names)
        if any(chosen):
            yield Whole(path, tuple(leaf.shape), names, chosen)


def _ancestors(name: str) -> Iterable[str]:
    """`model.layers.3.mlp` -> itself, `model.layers.3`, `model.layers`, `model`."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def _find_saved(params: Mapping, config: AdapterConfig) -> list[Whole]:
    """The weights of modules_to_save."""
    entries = config.modules_to_save or []
    known = {
        name
        for path, leaf in flatten(params).items()
        for slice_name in slice_names(path[:-1], leaf.shape)
        for name in _ancestors(slice_name)
    }
    tied = tied_embedding(params)
    if tied is not None:
        known.add(HEAD[0])
    short = sorted({name.rpartition(".")[2] for name in known if not name[-1].isdigit()})
    raise_all(
        [
            f"modules_to_save=[{entry!r}] matches no module; the model has: {', '.join(short)}."
            f"{nearest(entry, known if '.' in entry else short)}"
            for entry in entries
            if not any(matches(name, [entry]) for name in known)
        ]
    )

    def is_saved(name: str) -> bool:
        return any(matches(part, entries) for part in _ancestors(name))

    found = list(_whole(params, lambda name, path: is_saved(name))) if entries else []
    if tied is not None and is_saved(HEAD[0]):
        shape = flatten(params)[tied].shape
        found.append(Whole(HEAD, (shape[1], shape[0]), (HEAD[0],), (True,)))
    return found


def _joined(parts: Sequence[Whole]) -> tuple[Whole, ...]:
    """One entry for a weight of which some slices train for one reason and some for another."""
    joined: dict[Path, Whole] = {}
    for part in parts:
        other = joined.get(part.path, part)
        chosen = tuple(a or b for a, b in zip(part.chosen, other.chosen, strict=True))
        joined[part.path] = dataclasses.replace(part, chosen=chosen)
    return tuple(joined.values())


def _find_biases(params: Mapping, config: AdapterConfig, adapted: set[str]) -> list[Whole]:
    if config.bias == "none":
        return []

    def trains(name: str, path: Path) -> bool:
        return path[-1] == "bias" and (config.bias == "all" or name in adapted)

    found = list(_whole(params, trains))
    if not found:
        whose = "the model has no bias" if config.bias == "all" else "no adapted module has a bias"
        raise UserError(f"bias={config.bias!r}: {whose}; leave it at 'none'")
    return found


def _find_rows(params: Mapping, config: AdapterConfig) -> tuple[Rows, ...]:
    if config.trainable_token_indices is None:
        return ()
    indices = config.trainable_token_indices
    leaves = flatten(params)
    path = _token_embedding(leaves)
    if path is None:
        raise UserError("trainable_token_indices: the model has no embedding of tokens")
    vocab, features = leaves[path].shape
    wrong = sorted(index for index in set(indices) if not 0 <= index < vocab)
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if wrong or twice or not indices:
        raise UserError(
            f"trainable_token_indices={wrong or twice or indices}: "
            + (
                f"the model has tokens 0 to {vocab - 1}"
                if wrong
                else "every token once, and at least one"
            )
        )
    return (Rows(path, tuple(indices), features),)


def _combination_problems(params: Mapping, found: Trainable) -> Iterable[str]:
    """Settings that each are possible and together are not; both are named."""
    config, tied = found.config, tied_embedding(params)
    lora: dict[Path, Target] = {}
    for target in found.targets:
        lora.setdefault(target.weight, target)
    for part in found.targets:
        whole = lora[part.weight]  # comes before its parts, and is a part if there is none
        both = [n for n, r, s in zip(part.names, part.ranks, whole.ranks, strict=True) if r and s]
        if part.columns is not None and whole.columns is None and both:
            yield (
                f"target_modules={config.target_modules!r} names {dotted(whole.path)} and "
                f"{dotted(part.path)}, which is a part of it; name the whole or its parts"
            )
    saved = {whole.path: whole for whole in found.whole}
    for path, whole in saved.items():
        target = lora.get(path)
        both = target and [
            n for n, r, c in zip(target.names, target.ranks, whole.chosen, strict=True) if r and c
        ]
        if both:
            yield (
                f"target_modules={config.target_modules!r} and modules_to_save="
                f"{config.modules_to_save!r} both name {both[0]}; it can have an adapter or train "
                "whole"
            )
    for rows in found.rows:
        for field, paths in (("target_modules", lora), ("modules_to_save", saved)):
            if rows.path in paths or (rows.path == tied and HEAD in paths):
                name = dotted(rows.path[:-1] if rows.path in paths else HEAD[:-1])
                yield f"trainable_token_indices and {field} both train {name}; choose one"
    yield from _init_problems(params, found)
    # A head that is tied to its embedding is adapted as one.
    as_one = {HEAD} if tied is not None and config.ensure_weight_tying else set()
    embeddings = [path for path in lora if path[-1] == "embedding" or path in as_one]
    if config.freeze_a and embeddings:
        yield (
            f"freeze_a=true and target_modules={config.target_modules!r}: lora_a of "
            f"{dotted(embeddings[0][:-1])} starts at zero, and frozen it would stay there"
        )
    head = HEAD in lora or HEAD in saved
    embedding = tied in lora or tied in saved
    tie = config.ensure_weight_tying
    if tied is None:
        if tie:
            yield "ensure_weight_tying=true: the model's embedding and head are not tied"
        return
    name = dotted(tied[:-1])
    field = "target_modules" if HEAD in lora else "modules_to_save"
    if head and tie is None:
        yield (
            f"{field} names lm_head, which is {name} in this model (tied): set "
            "ensure_weight_tying=true to train both as one, or false to train the head alone, "
            "which is exported untied"
        )
    if tie and not (head or embedding or found.rows):
        yield (
            f"ensure_weight_tying=true, and neither target_modules nor modules_to_save names "
            f"{name} or lm_head"
        )
    if changes_base(config) and not tie and (tied in lora or HEAD in lora):
        yield (
            f"init={config.init} takes its part out of {name}, which is the output head too; with "
            "target_modules naming one of the two, ensure_weight_tying must be true"
        )
    if tie and ((tied in lora and HEAD in saved) or (tied in saved and HEAD in lora)):
        yield (
            f"ensure_weight_tying=true, and of {name} and lm_head one is in target_modules and the "
            "other in modules_to_save"
        )


def _init_problems(params: Mapping, found: Trainable) -> Iterable[str]:
    """Weights that an init has no start for, the first of each kind."""
    init, leaves = found.config.init, flatten(params)
    if init not in (*DATA_INITS, "loftq"):
        return
    refused: dict[str, Target] = {}
    for target in found.targets:
        path, why = target.weight, None
        if path not in leaves or target.leaf == "embedding":
            why = "is an embedding"
        elif init == "eva" and set(path) & set(OUTPUT_HEADS):
            why = "is an output head"
        elif init == "eva" and target.experts is not None:
            why = "is a stack of experts"
        elif init == "loftq" and not quantizes(path, leaves):
            why = "is never quantised"
        elif init == "lora_ga" and 2 * target.rank > min(target.shape):
            why = f"has {min(target.shape)} directions, and needs 2 * rank = {2 * target.rank}"
        if why is not None:
            refused.setdefault(why, target)
    for why, target in refused.items():
        yield (
            f"init={init} has no start for {dotted(target.path)}, which {why}; leave it out of "
            f"target_modules{' or lower its rank' if 'rank' in why else ''}"
        )


_NO_NUMBERS = "; a quantised base (base_dtype) has none to change"


def _is_quantized(params: Mapping, path: Path) -> bool:
    return isinstance(flatten(params).get(path), NF4Weight | Int8Weight)


def check_init(params: Mapping, found: Trainable) -> None:
    """Raise if an init would take its part out of a weight that is quantised. What it left may be
    quantised afterwards, so this is asked where adapters begin, not wherever they are bound.
    """
    for target in found.targets:
        if needs_floats(found.config) and _is_quantized(params, target.weight):
            raise UserError(
                f"init={found.config.init} takes its part out of {dotted(target.path)}"
                f"{_NO_NUMBERS}: init on float weights first, and quantise what is left with "
                "quantize_tree"
            )


def _dense_problems(params: Mapping, found: Trainable) -> Iterable[str]:
    """What needs weights as numbers where the base is quantised."""
    config = found.config
    for whole in found.whole:
        if _is_quantized(params, whole.path):
            setting = (
                "method=full"
                if config.method == "full"
                else f"modules_to_save={config.modules_to_save!r}"
            )
            yield f"{setting} trains the numbers of {dotted(whole.path[:-1])}{_NO_NUMBERS}"
            return


def _tie(params: Mapping, found: Trainable) -> Trainable:
    """With ensure_weight_tying, one entry for embedding and head: that of the embedding."""
    tied = tied_embedding(params)
    if tied is None:
        return found
    paths = {target.weight for target in found.targets} | {w.path for w in found.whole}
    if not found.config.ensure_weight_tying:
        return dataclasses.replace(found, untied=tied if paths & {tied, HEAD} else None)
    names = (dotted(tied[:-1]),)

    def as_embedding(target: Target) -> Target:
        return dataclasses.replace(
            target, path=tied[:-1], leaf=tied[-1], shape=target.shape[::-1], names=names
        )

    targets = [target for target in found.targets if target.weight != HEAD]
    whole = [weight for weight in found.whole if weight.path != HEAD]
    if tied not in paths:
        heads = (target for target in found.targets if target.weight == HEAD)
        targets += [as_embedding(target) for target in heads]
        heads = (weight for weight in found.whole if weight.path == HEAD)
        whole += [Whole(tied, weight.shape[::-1], names, (True,)) for weight in heads]
    return dataclasses.replace(found, targets=tuple(targets), whole=tuple(whole))
