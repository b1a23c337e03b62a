"""Combination of several adapters of one base into a new one.

    sum           sum_i w_i D_i, exactly: factors side by side, scales folded in, ranks added up
    svd           the nearest to it of a given rank
    ties          trim every D_i, elect a sign, mean of those that have it (arXiv 2306.01708)
    dare_linear   sum_i w_i drop(D_i), kept values divided by density (arXiv 2311.03099)
    dare_ties     the sign and the mean of `ties` over drop(D_i)

D_i is the update of one matrix by adapter i, with its scale. The last three give a matrix of full
rank, which is truncated to the nearest product. Means are over w_i D_i. With equal weights they are
those of PEFT and of the paper, whose lambda is the weight; a negative weight flips the signs before
the election. Fully trained weights, biases and token rows use the same formula with D_i = V_i - W,
and are stored in full without truncation.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from lora_jax.adapters import svd
from lora_jax.adapters.updates import (
    Combined,
    Key,
    Product,
    Read,
    Trained,
    Update,
    base_matrix,
    build,
    find_updates,
    plain_trainable,
    rank_problems,
    reader,
)
from lora_jax.config import AdapterConfig
from lora_jax.errors import nearest, raise_all
from lora_jax.targets import HEAD, Trainable, find_trainable
from lora_jax.tree import check_same_structure, dotted, flatten, tied_embedding

METHODS = ("sum", "svd", "ties", "dare_linear", "dare_ties")
_SPARSE = ("ties", "dare_linear", "dare_ties")


@dataclass(frozen=True)
class Part:
    """One adapter of a combination."""

    adapters: Mapping
    config: AdapterConfig
    weight: float = 1.0
    name: str = "adapter"  # in errors


@dataclass(frozen=True)
class Plan:
    """A checked combination and its parts."""

    trainable: Trainable
    params: Mapping
    parts: tuple[Part, ...]
    updates: tuple[Mapping[Key, Update], ...]  # of every part
    method: str
    density: float
    seed: int

    @property
    def config(self) -> AdapterConfig:
        return self.trainable.config


def combine(
    params: Mapping,
    parts: Sequence[Part],
    method: str = "sum",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    read: Read | None = None,
) -> Combined:
    """Combine `parts`, which are all adapters of `params`, by `method`.

    Args:
        params: the base, or its shapes.
        method: one of `METHODS`.
        rank: largest rank of a module; None: the sum of the ranks. `sum` takes no rank.
        density: the share of every update that ties and dare keep.
        seed: seed of the values that dare drops.
        read: function that returns a matrix of the base; None: reads `params`. It is called only
            for DoRA and for fully trained weights.

    Raises:
        UserError: settings that conflict or are out of range, a rank that no module can use, an
            exact sum of DoRA, token rows and their embedding trained by different parts, adapters
            that do not fit their config.

    Example:
        >>> from lora_jax.adapters.combine import Part, combine
        >>> made = combine(params, [Part(adapters, config, 0.7), Part(adapters, config, -0.3)])
        >>> made.config.rank, made.error < 1e-6  # ranks add up to the smaller side of the weight
        (3, True)
    """
    made = plan(params, parts, method, rank=rank, density=density, seed=seed)
    return carry_out(made, read or reader(params))


def plan(
    params: Mapping,
    parts: Sequence[Part],
    method: str = "sum",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Plan:
    """Check the arguments of `combine` and prepare it, without work on matrices."""
    raise_all(list(_setting_problems(parts, method, rank, density)))
    found = [find_trainable(params, part.config) for part in parts]
    for part, own in zip(parts, found, strict=True):
        what = f"{part.name} does not fit model and config"
        check_same_structure(part.adapters, own.shapes, what)
    updates = [
        find_updates(params, part.adapters, own) for part, own in zip(parts, found, strict=True)
    ]
    problems = _part_problems(params, parts, updates, method)
    raise_all([*problems, *_token_problems(params, parts, found, updates)])
    updates, tie = _with_one_tie(params, parts, updates)
    whole = {key for own in updates for key, update in own.items() if isinstance(update, Trained)}
    usual, most = _ranks(updates, whole, method)
    raise_all(rank_problems(most, rank))
    ranks = usual if rank is None else {name: min(own, rank) for name, own in most.items()}
    biases = {part.config.bias for part in parts}
    saved = {name for part in parts for name in part.config.modules_to_save or ()}
    saved |= {dotted(path[:-1]) for path, _ in whole if path in (HEAD, tied_embedding(params))}
    trainable = plain_trainable(
        params,
        ranks,
        bias=next((kind for kind in ("all", "lora_only") if kind in biases), "none"),
        modules_to_save=sorted(saved) or None,
        trainable_token_indices=sorted({i for part in parts for i in _tokens(part)}) or None,
        ensure_weight_tying=tie,
    )
    return Plan(trainable, params, tuple(parts), tuple(updates), method, density or 1.0, seed)


def carry_out(plan: Plan, read: Read) -> Combined:
    """Compute a planned combination. One float64 matrix per part is in memory at a time."""

    def base(key: Key) -> np.ndarray:
        return base_matrix(plan.params, read, key)

    def factors(key: Key, rank: int) -> svd.Factors:
        own = _at(plan, key)
        products = [(weight, update) for _, weight, update in own if _is_low_rank(update)]
        if plan.method in ("sum", "svd") and len(products) == len(own):
            a = np.concatenate([update.a for _, update in products], axis=1)
            b = np.concatenate([weight * update.b for weight, update in products])
            if plan.method == "sum" and rank == a.shape[1]:
                return a, b, 0.0, 1.0
            return svd.truncate(a, b, rank)
        changes = [(i, weight, update.dense(lambda: base(key))) for i, weight, update in own]
        return svd.nearest(_mix(plan, key, changes), rank)

    def value(key: Key) -> np.ndarray:
        own = _at(plan, key)
        if plan.method in _SPARSE:
            changes = [(i, weight, update.dense(lambda: base(key))) for i, weight, update in own]
            return base(key) + (_mix(plan, key, changes) if changes else 0)
        # The base has the rest of the weights: none of it, if they add up to one.
        rest = 1 - sum(weight for _, weight, update in own if isinstance(update, Trained))
        total = base(key) * rest if abs(rest) > 1e-12 else np.zeros(())
        for _, weight, update in own:
            whole = isinstance(update, Trained)
            total = total + weight * (update.value if whole else update.dense(lambda: base(key)))
        return total

    return build(plan.trainable, factors, value, lambda: _token_rows(plan, base))


def trim(x: np.ndarray, density: float) -> np.ndarray:
    """Keep the share `density` of the values, the largest in magnitude and at least one, and set
    the others to zero.
    """
    kept = max(1, int(density * x.size))
    if kept == x.size:
        return x
    places = np.argpartition(np.abs(x), x.size - kept, axis=None)[-kept:]
    trimmed = np.zeros_like(x)
    trimmed.flat[places] = x.flat[places]
    return trimmed


def drop(x: np.ndarray, density: float, rng: np.random.Generator) -> np.ndarray:
    """Keep each value with probability `density`, divided by it, and set the others to zero."""
    return np.where(rng.random(x.shape) < density, x / density, 0)


def elect(changes: Sequence[np.ndarray]) -> np.ndarray:
    """Return the elementwise mean over the values that have the sign of their sum; a sum of zero
    counts as positive.
    """
    stacked = np.stack(changes)
    sign = np.where(stacked.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(stacked) == sign
    return np.where(agree, stacked, 0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def _mix(plan: Plan, key: Key, changes: Sequence[tuple[int, float, np.ndarray]]) -> np.ndarray:
    """Mix the updates of one matrix, each given with its part and its weight."""
    own = (zlib.crc32(dotted(key[0]).encode()), *key[1])

    def dropped(part: int, x: np.ndarray) -> np.ndarray:
        return drop(x, plan.density, np.random.default_rng((plan.seed, part, *own)))

    match plan.method:
        case "ties":
            return elect([weight * trim(x, plan.density) for _, weight, x in changes])
        case "dare_ties":
            return elect([weight * dropped(part, x) for part, weight, x in changes])
        case "dare_linear":
            return np.sum([weight * dropped(part, x) for part, weight, x in changes], axis=0)
        case _:
            return np.sum([weight * x for _, weight, x in changes], axis=0)


def _at(plan: Plan, key: Key) -> list[tuple[int, float, Update]]:
    """List the updates of a matrix, each with its part and its weight."""
    return [
        (i, part.weight, updates[key])
        for i, (part, updates) in enumerate(zip(plan.parts, plan.updates, strict=True))
        if key in updates
    ]


def _is_low_rank(update: Update) -> TypeGuard[Product]:
    return isinstance(update, Product) and update.magnitude is None


def _tokens(part: Part) -> Sequence[int]:
    return part.config.trainable_token_indices or ()


def _token_rows(plan: Plan, base: Callable[[Key], np.ndarray]) -> np.ndarray:
    """Return the token rows that any part trains; ties and dare treat them as one matrix."""
    tokens = list(plan.config.trainable_token_indices or ())
    (rows,) = plan.trainable.rows
    path = rows.path
    start = base((path, ()))[tokens]
    changes = []
    for i, part in enumerate(plan.parts):
        own = _tokens(part)
        if not own:
            continue
        places = [tokens.index(token) for token in own]
        change = np.zeros_like(start)
        trained = flatten(part.adapters)[rows.trained]
        change[places] = np.asarray(trained, np.float64) - start[places]
        changes.append((i, part.weight, change))
    return start + _mix(plan, (path, ()), changes)


def _ranks(
    updates: Sequence[Mapping[Key, Update]], whole: set[Key], method: str
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the default rank of every module, and the largest that it can use."""
    sides: dict[Key, tuple[int, int]] = {}
    sums: dict[Key, int] = {}
    full: set[Key] = set()
    names = {}
    for own in updates:
        for key, update in own.items():
            if key in whole or isinstance(update, Trained):
                continue
            names[key] = update.name
            sides[key] = (update.a.shape[0], update.b.shape[1])
            sums[key] = sums.get(key, 0) + update.a.shape[1]
            if method in _SPARSE or not _is_low_rank(update):
                full.add(key)
    usual = {names[key]: min(rank, *sides[key]) for key, rank in sums.items()}
    most = {
        names[key]: min(sides[key]) if key in full else min(rank, *sides[key])
        for key, rank in sums.items()
    }
    return usual, most


def _with_one_tie(
    params: Mapping, parts: Sequence[Part], updates: Sequence[Mapping[Key, Update]]
) -> tuple[list[Mapping[Key, Update]], bool | None]:
    """Split each update of a tied embedding into one per use if another part changes only one use.
    Also return `ensure_weight_tying` of the combination.
    """
    tied = tied_embedding(params)
    if tied is None:
        return list(updates), None
    keys = {(tied, ()), (HEAD, ())}
    ties = [
        bool(part.config.ensure_weight_tying) if keys & set(own) else None
        for part, own in zip(parts, updates, strict=True)
    ]
    if False not in ties:
        return list(updates), True if True in ties else None
    return [
        {**own, (HEAD, ()): own[tied, ()].transposed()} if tie else own
        for own, tie in zip(updates, ties, strict=True)
    ], False


def _setting_problems(
    parts: Sequence[Part], method: str, rank: int | None, density: float | None
) -> Iterable[str]:
    if method not in METHODS:
        known = ", ".join(METHODS)
        yield f"method={method!r} is not one of: {known}.{nearest(str(method), METHODS)}"
    if not parts:
        yield "there is no adapter to combine"
    for part in parts:
        if not np.isfinite(part.weight) or part.weight == 0:
            yield f"{part.name}: weight={part.weight} must be a number other than zero"
        if not part.config.trains_lora:
            virtual = part.config.trains_virtual_tokens
            yield (
                f"{part.name}: method={part.config.method} "
                f"{'has no updates of weights' if virtual else 'cannot be combined'}; only "
                "adapters of method=lora (rsLoRA, DoRA, .. too) are combined"
            )
    if method == "sum" and rank is not None:
        yield f"method=sum is exact and has the sum of the ranks; for rank={rank} use method=svd"
    if method == "svd" and rank is None:
        yield "method=svd needs a rank; without one, method=sum is exact"
    if method in _SPARSE and density is None:
        yield (
            f"method={method} needs a density, the share of every update that is kept: 0.2 in the "
            "paper of TIES, 0.1 to 0.5 in that of DARE"
        )
    if density is not None and method in METHODS and method not in _SPARSE:
        yield f"density={density} is for {', '.join(_SPARSE)}, not for method={method}"
    if density is not None and not 0 < density <= 1:
        yield f"density={density} must be above 0 and at most 1"


def _part_problems(
    params: Mapping, parts: Sequence[Part], updates: Sequence[Mapping[Key, Update]], method: str
) -> Iterable[str]:
    tied = tied_embedding(params)
    for part, own in zip(parts, updates, strict=True):
        if part.config.use_dora and method == "sum":
            yield (
                f"{part.name} is a DoRA adapter (use_dora), whose update has full rank, so that no "
                "adapter is its exact sum with others; use method=svd and a rank, or merge it into "
                "the model"
            )
        if part.config.use_dora and part.config.ensure_weight_tying and (tied, ()) in own:
            yield (
                f"{part.name}: use_dora=true and ensure_weight_tying=true: an adapter of both "
                "has a magnitude for the embedding and another for the head"
            )


def _token_problems(
    params: Mapping,
    parts: Sequence[Part],
    found: Sequence[Trainable],
    updates: Sequence[Mapping[Key, Update]],
) -> Iterable[str]:
    """Yield parts that change an embedding whose token rows another part trains."""
    trains = [(part, own.rows[0]) for part, own in zip(parts, found, strict=True) if own.rows]
    if not trains:
        return
    (first, rows), tied = trains[0], tied_embedding(params)
    path = rows.path
    keys = {(path, ()), (HEAD, ())} if path == tied else {(path, ())}
    for part, own in zip(parts, updates, strict=True):
        if keys & set(own):
            yield (
                f"{first.name} trains tokens (trainable_token_indices) and {part.name} the "
                f"embedding {dotted(path[:-1])}: no adapter holds both; merge one of them into the "
                "model"
            )
