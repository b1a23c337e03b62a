"""Adapters as the update that a slot of a bank holds: NumPy arrays padded to the bank's rank.

All of it is computed on the host, so that adapters of another rank or config compile nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lora_jax.config import AdapterConfig
from lora_jax.errors import UserError
from lora_jax.sharding import gather_to_host
from lora_jax.targets import HEAD, Target, Trainable, as_trainable
from lora_jax.tree import Path, check_adapters, check_same_structure, dotted, flatten, summarize


@dataclass(frozen=True)
class Place:
    """Sizes of one weight's part of a slot."""

    lead: tuple[int, ...]  # layers, experts
    rank: int  # with those of all parts of a fused projection
    parts: int  # of a fused projection, else 1
    sizes: tuple[int, int]  # in, out

    def empty(self) -> "Update":
        """Return the update of the base: none."""
        size_in, size_out = self.sizes
        return Update(
            np.zeros((*self.lead, self.rank, size_in), np.float32),
            np.zeros((*self.lead, self.rank, size_out), np.float32),
            np.ones((*self.lead, size_out), np.float32),
            np.zeros((*self.lead, size_out), bool),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Update:
    """The update of one weight, every scale folded into `b`."""

    a: np.ndarray  # (..., rank, in)
    b: np.ndarray  # (..., rank, out)
    magnitude: np.ndarray  # (..., out), DoRA's
    scaled: np.ndarray  # (..., out) bool, columns that have a magnitude


@dataclass(frozen=True)
class Found:
    """The update of adapters by weight, or the problems that keep it out of the bank."""

    by_weight: Mapping[Path, Update]
    problems: tuple[str, ...] = ()


def find_update(
    params: Mapping,
    places: Mapping[Path, Place],
    has_gains: bool,
    adapters: Mapping,
    config: AdapterConfig | Trainable,
) -> Found:
    """Return the update that `adapters` make of `params`, in the places of a bank."""
    check_adapters(adapters, "put takes a slot, adapters and a config, in this order")
    if not isinstance(config, AdapterConfig | Trainable):
        given = type(config).__name__
        raise UserError(f"put takes a slot, adapters and a config; the config is a {given}")
    settings = config.config if isinstance(config, Trainable) else config
    problems = list(_config_problems(settings, has_gains))
    if not settings.trains_lora:
        return Found({}, tuple(problems))
    try:
        found = as_trainable(params, config)
        check_same_structure(adapters, found.shapes, "these adapters do not fit model and config")
    except UserError as error:
        return Found({}, (*problems, str(error)))
    small = {path: gather_to_host(leaf) for path, leaf in flatten(adapters).items()}
    problems += _place_problems(places, found)
    problems += _value_problems(small)
    return Found({} if problems else _updates(places, small, found), tuple(problems))


def _config_problems(config: AdapterConfig, has_gains: bool) -> Iterable[str]:
    """Yield the settings whose results are no low-rank update of the base."""
    if config.trains_virtual_tokens:
        yield (
            f"method={config.method}: virtual tokens change no weight, so that no slot holds them; "
            "pass them to the forward (lora.prefix)"
        )
    elif not config.trains_lora:
        yield (
            f"method={config.method}: a slot holds low-rank updates of the base (method=lora), "
            "nothing else; serve the merged model"
        )
    trained = {
        f"bias={config.bias!r}": config.bias != "none",
        f"modules_to_save={config.modules_to_save!r}": bool(config.modules_to_save),
        "trainable_token_indices": config.trainable_token_indices is not None,
    }
    for setting, trains in trained.items():
        if trains and config.trains_lora:
            yield (
                f"{setting} trains values of the base, and a slot holds low-rank updates alone; "
                "train without it, or serve the merged model"
            )
    if config.init == "loftq" and config.changes_base:
        yield (
            f"loftq_iter={config.loftq_iter} changes the base by no low-rank update; use "
            "loftq_iter=1, or serve the merged model"
        )
    if config.use_dora and not has_gains:
        yield (
            "use_dora=true has a gain per column, and this bank has none; create it with "
            "lora.bank(..., use_dora=True)"
        )
    if config.use_dora and config.ensure_weight_tying:
        yield (
            "use_dora=true and ensure_weight_tying=true: a gain of the embedding's columns is no "
            "gain of the head's; train with one of them, or serve the merged model"
        )


def _place_problems(places: Mapping[Path, Place], found: Trainable) -> Iterable[str]:
    """Yield targets that the bank lacks, and ranks that are above the bank's."""
    ranks: dict[Path, int] = {}
    for target in found.targets:
        for path in _weights(target, found):
            ranks[path] = ranks.get(path, 0) + _rank(target)
    lacking = [dotted(path[:-1]) for path in ranks if path not in places]
    if lacking:
        known = ", ".join(dotted(path[:-1]) for path in places)
        yield (
            f"the bank has no slots for {', '.join(lacking)}; it has: {known}. Create it with "
            "lora.bank(..., modules=[...]) that names all of them"
        )
    large = {path: rank for path, rank in ranks.items() if path in places}
    large = {path: rank for path, rank in large.items() if rank > places[path].rank}
    if large:
        path = max(large, key=lambda path: large[path] / places[path].parts)
        own, parts = places[path].rank // places[path].parts, places[path].parts
        twice = f" (twice that of training, by init={found.config.init})"
        yield (
            f"{dotted(path[:-1])} has rank {large[path]}"
            f"{twice if found.config.changes_base else ''}, and the bank has rank {own}"
            f"{f' for each of {parts} parts' if parts > 1 else ''}; create it with "
            f"rank={-(-large[path] // parts)}"
        )


def _value_problems(small: Mapping[Path, np.ndarray]) -> Iterable[str]:
    wrong = [dotted(path) for path, leaf in small.items() if not np.isfinite(leaf).all()]
    if wrong:
        yield f"values that are not finite (NaN or infinity) in: {summarize(wrong)}"


def _rank(target: Target) -> int:
    return target.rank * (2 if "init_a" in target.leaves else 1)


def _weights(target: Target, found: Trainable) -> tuple[Path, ...]:
    """Return the paths in a bank that a target changes: both uses of a tied embedding."""
    both = found.config.ensure_weight_tying and target.leaf == "embedding"
    return (target.weight, HEAD) if both else (target.weight,)


def _updates(
    places: Mapping[Path, Place], small: Mapping[Path, np.ndarray], found: Trainable
) -> dict[Path, Update]:
    """Return the updates by weight, the ranks of several parts of a fused projection joined."""
    updates: dict[Path, Update] = {}
    used: dict[Path, int] = {}
    for target in found.targets:
        a, b = _factors(target, small, found.config.use_rslora)
        for path in _weights(target, found):
            update = updates.setdefault(path, places[path].empty())
            first = used.get(path, 0)
            ranks = slice(first, first + a.shape[-2])
            used[path] = ranks.stop
            if path != target.weight:  # a tied head: the embedding's update, transposed
                update.a[ranks], update.b[ranks] = b, a
                continue
            columns = slice(*(target.columns or (None,)))
            update.a[..., ranks, :] = a
            update.b[..., ranks, columns] = b
            if found.config.use_dora:
                update.magnitude[..., columns] = small[(*target.path, "magnitude")]
                adapted = target.per_layer(np.asarray(target.ranks) > 0)
                update.scaled[..., columns] = adapted[..., 0] if target.stacked else adapted
    return updates


def _factors(
    target: Target, small: Mapping[Path, np.ndarray], use_rslora: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return a (..., rank, in) and scaled b (..., rank, out) over the original base: behind what
    an init subtracted from the base, if it did.
    """
    scales, leaves = target.scales(use_rslora), {n: small[(*target.path, n)] for n in target.leaves}
    a, b = leaves["lora_a"], leaves["lora_b"] * scales
    if "init_a" in leaves:
        a = np.concatenate([a, leaves["init_a"]], axis=-1)
        b = np.concatenate([b, -leaves["init_b"] * scales], axis=-2)
    return a.swapaxes(-1, -2), b


def slot_problems(numbers: Sequence[Any], slots: int) -> Iterable[str]:
    """Yield slots that no adapter can be put into."""
    if not numbers:
        yield "put needs at least one slot"
    for number in numbers:
        if not isinstance(number, int | np.integer) or isinstance(number, bool):
            yield f"slot={number!r} is no integer; the slots of adapters are 1 to {slots - 1}"
        elif number == 0:
            yield f"slot 0 is the base; the slots of adapters are 1 to {slots - 1}"
        elif not 0 < number < slots:
            yield f"slot {number} does not exist; the slots of adapters are 1 to {slots - 1}"
    if len(set(map(str, numbers))) < len(numbers):
        yield f"slots={list(numbers)} names a slot twice"


def choice_problems(ids: np.ndarray, weights: np.ndarray, slots: int) -> Iterable[str]:
    """Yield problems of the slots of rows, and of their weights."""
    if ids.dtype.kind not in "iu":
        yield f"slot_ids must be integers, not {ids.dtype}"
    elif ids.ndim not in (1, 2) or not ids.size:
        yield f"slot_ids has shape {ids.shape}; it must be (rows,) or (rows, m)"
    elif ids.min() < 0 or ids.max() >= slots:
        wrong = sorted({int(i) for i in ids.flat if not 0 <= i < slots})
        yield f"slot_ids has {wrong}; the bank has slots 0 (the base) to {slots - 1}"
    if weights.shape != ids.shape:
        yield f"slot_weights has shape {weights.shape}, and slot_ids {ids.shape}; give one for each"
    elif weights.dtype.kind not in "iuf" or not np.isfinite(weights).all():
        yield "slot_weights must be finite numbers"
