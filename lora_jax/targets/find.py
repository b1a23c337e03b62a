"""Resolution of a config's module names to the weights that train."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_jax.config import AdapterConfig, virtual_tokens
from lora_jax.errors import UserError, raise_all
from lora_jax.leaves import target_leaves
from lora_jax.targets.checks import combination_problems, dense_problems
from lora_jax.targets.kinds import HEAD, FullWeight, Target, Trainable, TrainableTokens
from lora_jax.targets.match import (
    matcher,
    pattern_problems,
    pattern_values,
    selection_problems,
    selector,
    unmatched,
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
    stack_layers,
    stack_position,
    summarize,
    tied_embedding,
)

_RANDOM = ("default", "gaussian", "zero_a")  # inits that do not read the weight


def as_trainable(params: Mapping, config: AdapterConfig | Trainable) -> Trainable:
    """Return what `config` trains in `params`; a `Trainable` is returned unchanged.

    Raises:
        UserError: as `find_trainable`.
    """
    return config if isinstance(config, Trainable) else find_trainable(params, config)


def find_trainable(params: Mapping, config: AdapterConfig) -> Trainable:
    """Return what `config` trains in `params`, in the order of the tree; `params` may be shapes.

    Raises:
        UserError: an entry of target_modules, exclude_modules, modules_to_save, rank_pattern or
            alpha_pattern that matches nothing, an invalid regex, a layer or token that does not
            exist, a rank above min(in, out), an impossible value, contradictory settings, a tied
            head without `ensure_weight_tying`. The error lists all problems of a kind.
    """
    if config.trains_everything:
        everything = Trainable(config, whole=tuple(_whole(params, lambda name, path: True)))
        raise_all(list(dense_problems(params, everything)))
        return everything
    if config.trains_virtual_tokens:
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
    raise_all([*combination_problems(params, found), *dense_problems(params, found)])
    return _tie(params, found)


def _find_virtual(params: Mapping, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of virtual tokens: as wide as the embedding, or as the keys of a layer."""
    count, leaves = virtual_tokens(config), flatten(params)
    embedding = _token_embedding(leaves)
    if embedding is None:
        raise UserError(f"method={config.method}: the model has no token embedding")
    own = any("embed_tokens_per_layer" in path for path in leaves)
    if config.trains_prompt and own:
        raise UserError(
            "method=prompt: layers of the model look up embeddings of the tokens, and virtual "
            "tokens have none"
        )
    if config.trains_prompt:
        return {"prompt_embeddings": (count, leaves[embedding].shape[1])}
    if any(stack_layers(path) is not None for path in leaves):
        raise UserError(
            "method=prefix: layers of the model differ, and some may have no keys and values"
            + ("" if own else "; method=prompt works for this model")
        )
    for path, leaf in leaves.items():
        start, stop = fused_columns(path, leaves).get("k", (0, leaf.shape[-1]))
        if path[-1] == "kernel" and (path[-2] == "k_proj" or stop - start < leaf.shape[-1]):
            shape = (leaf.shape[0], count, stop - start)
            gate = {"prefix_gate": shape[:1]} if config.prefix_gate else {}
            return {"prefix_keys": shape, "prefix_values": shape} | gate
    raise UserError("method=prefix: the model has no k_proj, qkv_proj or c_attn that makes keys")


def _token_embedding(leaves: Mapping[Path, Any]) -> Path | None:
    return next((p for p in leaves if p[-1] == "embedding" and p[-2] in TIED_EMBEDDINGS), None)


def find_targets(params: Mapping, config: AdapterConfig | Trainable) -> list[Target]:
    """Return the weights that take an adapter.

    Raises:
        UserError: as `find_trainable`.
    """
    return list(as_trainable(params, config).targets)


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
    """Return linear weights, parts of fused ones, stacks of experts, embeddings and a tied head."""
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
    """Yield matrices in places where a stack of them is expected."""
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
    selected = {*filter(selector(config), (name for name in names if name in usual))}
    selected |= _named_parts(parts, config, selected)
    problems = list(pattern_problems(config, selected))
    found = [one for one in candidates if set(one.names) & selected]
    targets = _as_targets(found, config, selected)
    raise_all([*problems, *(_rank_problems(targets, config.init) if config.trains_lora else ())])
    return targets


def _as_targets(
    candidates: Iterable[_Candidate], config: AdapterConfig, selected: set[str]
) -> list[Target]:
    rank_of = pattern_values(config.rank_pattern, "rank_pattern")
    alpha_of = pattern_values(config.alpha_pattern, "alpha_pattern")
    targets = []
    for one in candidates:
        path = (*one.path, one.leaf)
        ranks = (rank_of(name, config.rank) if name in selected else 0 for name in one.names)
        ranks = tuple(ranks)
        alphas = tuple(float(alpha_of(name, config.alpha)) for name in one.names)
        target = Target(
            one.path,
            one.leaf,
            shape=(one.shape[-2], one.shape[-1]),
            stacked=stack_position(path) is not None,
            names=one.names,
            ranks=ranks,
            alphas=alphas if config.trains_lora else tuple(map(float, ranks)),  # no scale: 1
            columns=one.columns,
            experts=one.shape[-3] if has_experts(path) else None,
            leaves=target_leaves(config),
        )
        targets.append(target)
    return targets


def _rank_problems(targets: Sequence[Target], init: str) -> Iterable[str]:
    for target in targets:
        # PEFT adapts a linear with one output, too; a rank above 1 does no harm there.
        is_one = min(target.shape) == 1 and init in _RANDOM
        if target.rank > min(target.shape) and not is_one:
            name = target.names[target.ranks.index(target.rank)]
            yield (
                f"rank={target.rank} is larger than {name} allows: its shape is {target.shape}, "
                f"so a rank above {min(target.shape)} adds parameters and no expressive power"
            )
        odd = [rank for rank in target.ranks if rank % 2]
        if init == "orthogonal" and odd:
            name = target.names[target.ranks.index(odd[0])]
            yield f"init=orthogonal needs an even rank; it is {odd[0]} at {name}"


def _named_parts(parts: set[str], config: AdapterConfig, selected: set[str]) -> set[str]:
    """Return the adapted parts of fused projections. A part must be named with its module; a regex
    that matches the fused matrix does not select its parts.
    """
    spec = config.target_modules
    if spec == "all-linear":
        return set()
    if isinstance(spec, str):
        parts = {name for name in parts if name.rpartition(".")[0] not in selected}
        return {*filter(selector(config), parts)}
    named = [entry for entry in spec if "." in entry]
    return {*filter(selector(dataclasses.replace(config, target_modules=named)), parts)}


def _whole(params: Mapping, choose: Any) -> Iterable[FullWeight]:
    for path, leaf in flatten(params).items():
        names = slice_names(path[:-1], leaf.shape)
        chosen = tuple(choose(name, path) for name in names)
        if any(chosen):
            yield FullWeight(path, tuple(leaf.shape), names, chosen)


def _ancestors(name: str) -> Iterable[str]:
    """Yield `model.layers.3.mlp` -> itself, `model.layers.3`, `model.layers`, `model`."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def _find_saved(params: Mapping, config: AdapterConfig) -> list[FullWeight]:
    """Find the weights of modules_to_save."""
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
    listed = f"matches no module; the model has: {', '.join(short)}."
    raise_all(unmatched("modules_to_save", entries, known, listed))
    is_entry = matcher(entries)

    def is_saved(name: str) -> bool:
        return any(map(is_entry, _ancestors(name)))

    found = list(_whole(params, lambda name, path: is_saved(name))) if entries else []
    if tied is not None and is_saved(HEAD[0]):
        shape = flatten(params)[tied].shape
        found.append(FullWeight(HEAD, (shape[1], shape[0]), (HEAD[0],), (True,)))
    return found


def _joined(parts: Sequence[FullWeight]) -> tuple[FullWeight, ...]:
    """Join the entries of a weight whose slices train for different reasons."""
    joined: dict[Path, FullWeight] = {}
    for part in parts:
        other = joined.get(part.path, part)
        chosen = tuple(a or b for a, b in zip(part.chosen, other.chosen, strict=True))
        joined[part.path] = dataclasses.replace(part, chosen=chosen)
    return tuple(joined.values())


def _find_biases(params: Mapping, config: AdapterConfig, adapted: set[str]) -> list[FullWeight]:
    if config.bias == "none":
        return []

    def trains(name: str, path: Path) -> bool:
        is_bias = path[-1] == "bias" and not has_experts(path)  # PEFT leaves those of experts alone
        return is_bias and (config.bias == "all" or name in adapted)

    found = list(_whole(params, trains))
    if not found:
        whose = "the model has no bias" if config.bias == "all" else "no adapted module has a bias"
        raise UserError(f"bias={config.bias!r}: {whose}; leave it at 'none'")
    return found


def _find_rows(params: Mapping, config: AdapterConfig) -> tuple[TrainableTokens, ...]:
    if config.trainable_token_indices is None:
        return ()
    indices = config.trainable_token_indices
    leaves = flatten(params)
    path = _token_embedding(leaves)
    if path is None:
        raise UserError("trainable_token_indices: the model has no token embedding")
    vocab, features = leaves[path].shape
    counts = Counter(indices)
    wrong = sorted(index for index in counts if not 0 <= index < vocab)
    twice = sorted(index for index, times in counts.items() if times > 1)
    if wrong or twice or not indices:
        raise UserError(
            f"trainable_token_indices={(wrong or twice or indices)[:50]}: "
            + (
                f"the model has tokens 0 to {vocab - 1}"
                if wrong
                else "every token once, and at least one"
            )
        )
    return (TrainableTokens(path, tuple(indices), features),)


def _tie(params: Mapping, found: Trainable) -> Trainable:
    """Apply ensure_weight_tying: keep one entry for embedding and head, the embedding's."""
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
        whole += [FullWeight(tied, weight.shape[::-1], names, (True,)) for weight in heads]
    return dataclasses.replace(found, targets=tuple(targets), whole=tuple(whole))
