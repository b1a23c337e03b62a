"""A bank of adapters over one base: every row of a batch has its own.

bank  = lora.bank(params, slots=3, rank=16)           # slot 0 is the base
bank  = bank.put(1, adapters_a, config_a)             # one program for all slots and adapters
bank  = bank.put(2, adapters_b, config_b)
bound = bank.bind(params, slot_ids=[1, 2])            # row 0 has a, row 1 has b
logits = model.apply(bound, tokens)

The targeted leaves of `bound` are `LoraBank`s:

    y = gain * (x @ W + sum_m weight_m * (x @ a[slot_m].T) @ b[slot_m])

An adapter of a smaller rank is padded with zeros. Slots that several rows take are stored once.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax.adapters import dora
from lora_jax.adapters.stacks import count_members, unstack
from lora_jax.bank_updates import Found, Place, Update, choice_problems, find_update, slot_problems
from lora_jax.config import AdapterConfig
from lora_jax.errors import UserError, counted, raise_all
from lora_jax.sharding import gather_to_host, zeros_split_like
from lora_jax.slots import Factors
from lora_jax.targets import HEAD, Trainable, find_targets
from lora_jax.tree import (
    Path,
    check_adapters,
    check_parameters,
    check_same_structure,
    dotted,
    flatten,
    fused_columns,
    nbytes,
    stack_position,
    tied_embedding,
    unflatten,
)
from lora_jax.weights import Layered, LoraBank, Transposed, Untied, widen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bank:
    """Adapters in slots, a pytree of arrays: pass it to compiled functions as an argument."""

    params: Mapping  # the base, not copied
    factors: Mapping[Path, Any]  # `Factors` by weight; of separate layers, a tuple
    scaled: jax.Array | None  # (slots,) bool, slots with a gain (DoRA); None: no slot can have one
    slots: int = field(metadata={"static": True})  # with the base
    rank: int = field(metadata={"static": True})  # largest rank of an adapter

    @property
    def nbytes(self) -> int:
        """Bytes of the slots, without the base."""
        return nbytes(self.factors)

    def put(
        self,
        slot: int | Sequence[int],
        adapters: Mapping,
        config: AdapterConfig | Trainable,
    ) -> "Bank":
        """Return the bank with adapters in a slot. This bank is donated and no longer valid.

        Weights that the adapters do not target have no update in this slot. With several slots,
        `adapters` are as many adapters of one config, stacked (`stack`). One program serves all
        slots and adapters of a bank.

        Raises:
            UserError: a slot that does not exist, or slot 0; adapters that do not fit the config,
                hold more than low-rank updates, or have values that are not finite; a rank,
                a target or a gain that the bank has no place for. The error lists all of them.

        Example:
            >>> bank = lora.bank(params, slots=3, rank=4).put(1, adapters, config)
            >>> bank = bank.put([1, 2], lora.stack([adapters, adapters]), config)
        """
        many = isinstance(slot, Sequence | np.ndarray) and not isinstance(slot, str)
        given: Any = slot
        numbers = [*given] if many else [given]
        problems = list(slot_problems(numbers, self.slots))
        members = _split(adapters, len(numbers)) if many else [adapters]
        found = [self._find(member, config) for member in members]
        problems += dict.fromkeys(line for one in found for line in one.problems)
        raise_all(problems)
        updates = [one.by_weight for one in found]
        bank = self
        for number, update in zip(numbers, updates, strict=True):
            bank = bank._write(number, update)
        return bank

    def check(self, adapters: Mapping, config: AdapterConfig | Trainable) -> None:
        """Check that adapters fit a slot.

        Raises:
            UserError: as `put`.
        """
        raise_all(self._find(adapters, config).problems)

    def _find(self, adapters: Mapping, config: AdapterConfig | Trainable) -> Found:
        return find_update(self.params, _places(self), self.scaled is not None, adapters, config)

    def clear(self, slot: int) -> "Bank":
        """Return the bank with the base in a slot. This bank is donated and no longer valid.

        Raises:
            UserError: a slot that does not exist, or slot 0.
        """
        raise_all(list(slot_problems([slot], self.slots)))
        return self._write(slot, {})

    def _write(self, slot: int, updates: Mapping[Path, Update]) -> "Bank":
        new = {
            path: _in_form(updates.get(path) or place.empty(), self.factors[path])
            for path, place in _places(self).items()
        }
        has_gain = any(bool(update.scaled.any()) for update in updates.values())
        kept, bases = (dict(self.factors), self.scaled), {} if self.scaled is None else _bases(self)
        turned = HEAD if tied_embedding(self.params) is not None else None
        factors, scaled = _write(kept, new, bases, np.int32(slot), np.bool_(has_gain), turned)
        return dataclasses.replace(self, factors=factors, scaled=scaled)

    def bind(self, params: Mapping, slot_ids: Any, slot_weights: Any = None) -> dict:
        """Return the tree that the model runs on.

        Args:
            params: the base that the bank was created for, in the same form.
            slot_ids: (b,) or (b, m) integers, the slots of every row. They may be traced.
            slot_weights: the same shape, the weight of every slot; 1 by default. The updates of a
                row are added up. Adapters with a gain (DoRA) take no other weight or slot.

        Raises:
            UserError: other parameters than the bank's; outside of `jit`, slots that do not exist
                and weights that are not finite or not 1 for a slot with a gain.

        Example:
            >>> bank = lora.bank(params, slots=3, rank=4).put(1, adapters, config)
            >>> bound = bank.bind(params, slot_ids=[[1, 0], [0, 1]], slot_weights=[[1, 0], [1, -2]])
            >>> type(bound["proj"]["kernel"]).__name__
            'LoraBank'
        """
        check_parameters(params, "bind takes params and slot_ids, in this order")
        check_same_structure(params, self.params, "these are not the parameters of the bank")
        self._check_form(params)
        self._check_choice(slot_ids, slot_weights)
        ids = jnp.asarray(slot_ids, jnp.int32)
        weights = jnp.ones(ids.shape) if slot_weights is None else jnp.asarray(slot_weights)
        choice = tuple(x.reshape(len(ids), -1) for x in (ids, weights.astype(jnp.float32)))
        leaves, tied = flatten(params), tied_embedding(params)
        bound = {
            path: _bound(
                _base(leaves, path, tied), factors, choice, stack_position(path) is not None
            )
            for path, factors in self.factors.items()
        }
        if tied is not None and (tied in bound or HEAD in bound):
            untied = Untied(
                bound.get(tied, _base(leaves, tied, tied)),
                bound.pop(HEAD, _base(leaves, HEAD, tied)),
            )
            bound[tied] = untied
        return unflatten(leaves | bound)

    def _check_form(self, params: Mapping) -> None:
        leaves = flatten(params)
        for path, factors in self.factors.items():
            is_separate = isinstance(leaves.get(path), Layered)
            if is_separate != isinstance(factors, tuple):
                given, own = ("separate", "stacked") if is_separate else ("stacked", "separate")
                raise UserError(
                    f"{dotted(path)}: the layers of these parameters are {given}, and those of the "
                    f"bank {own}; create the bank from the parameters that the model runs on"
                )

    def _check_choice(self, slot_ids: Any, slot_weights: Any) -> None:
        if any(isinstance(x, Tracer) for x in jax.tree.leaves((slot_ids, slot_weights))):
            return
        ids = np.asarray(slot_ids)
        weights = np.ones(ids.shape) if slot_weights is None else np.asarray(slot_weights)
        raise_all(list(choice_problems(ids, weights, self.slots)))
        if self.scaled is None or isinstance(self.scaled, Tracer):
            return
        ids, weights = ids.reshape(len(ids), -1), weights.reshape(len(ids), -1)
        used = (ids != 0) & (weights != 0)
        has_gain = used & np.asarray(self.scaled)[ids]
        wrong = has_gain.any(axis=1) & ((used.sum(axis=1) > 1) | (has_gain & (weights != 1)).any(1))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(
                f"row {row} has slots {ids[row].tolist()} with weights {weights[row].tolist()}, "
                "and a DoRA adapter among them, whose gain has no weighted sum; give it a row of "
                "its own with weight 1"
            )


def bank(
    params: Mapping,
    slots: int,
    rank: int,
    modules: str | Sequence[str] = "all-linear",
    *,
    use_dora: bool = False,
) -> Bank:
    """Return a bank of empty slots over `params`: float32 zeros, split over a mesh like the weights
    that they adapt.

    Args:
        params: the base, plain or quantised; its layers may be separate arrays.
        slots: number of slots, with slot 0, the base.
        rank: largest rank of an adapter; each part of a fused projection has it. An adapter of an
            init that changes the base (pissa) needs twice its rank.
        modules: weights that adapters may change, as `target_modules` of `AdapterConfig`.
        use_dora: True if slots can have gains, which DoRA needs.

    Raises:
        UserError: fewer than 2 slots, a rank below 1, modules that do not exist.

    Example:
        >>> _, trained = lora.init(jax.random.key(0), model.params, config)
        >>> bank = lora.bank(model.params, slots=3, rank=2)
        >>> bank = bank.put(1, trained, config)
        >>> bound = bank.bind(model.params, slot_ids=[1, 0])  # row 1 is the base's
        >>> model.apply(bound, np.array([[3, 5], [3, 5]])).shape[:2]
        (2, 2)
    """
    check_parameters(params, "bank takes params, slots and rank, in this order")
    raise_all(
        [
            f"{name}={value!r} must be an integer of at least {least}"
            for name, value, least in (("slots", slots, 2), ("rank", rank, 1))
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least
        ]
    )
    leaves, tied = flatten(params), tied_embedding(params)
    chosen = AdapterConfig(
        rank=1,
        target_modules=modules if isinstance(modules, str) else list(modules),
        ensure_weight_tying=None if tied is None else False,
    )
    factors = {}
    for path in dict.fromkeys(target.weight for target in find_targets(params, chosen)):
        parts = len(fused_columns(path, leaves)) or 1
        own = functools.partial(_zeros, size=(slots, rank * parts), has_gain=use_dora)
        weight, turned = _base(leaves, path, tied), path == HEAD and tied is not None
        if isinstance(weight, Layered):
            factors[path] = tuple(own(layer, turned) for layer in weight.layers)
        else:
            factors[path] = own(weight, turned)
    return Bank(params, factors, jnp.zeros(slots, bool) if use_dora else None, slots, rank)


def _split(adapters: Mapping, slots: int) -> list[dict]:
    """Return the members of stacked adapters, which must be as many as the slots."""
    check_adapters(adapters, "put takes slots, stacked adapters and a config, in this order")
    if (members := count_members(adapters)) != slots:
        raise UserError(
            f"{counted(slots, 'slot')} and {counted(members, 'stacked adapter')}; give one slot "
            "for each"
        )
    return unstack(jax.tree.map(gather_to_host, dict(adapters)))


def _base(leaves: Mapping[Path, Any], path: Path, tied: Path | None) -> Any:
    """Return the weight of a path; of a tied head, the embedding (vocab, d)."""
    if path == HEAD and tied is not None:
        leaf = leaves[tied]
        return leaf.head if isinstance(leaf, Untied) else leaf
    leaf = leaves[path]
    return leaf.embed if isinstance(leaf, Untied) else leaf


def _zeros(weight: Any, turned: bool, size: tuple[int, int], has_gain: bool) -> Factors:
    """Return empty factors (slots, rank) for a weight; `turned`: it is stored as (out, in)."""
    if isinstance(weight, Transposed):
        weight, turned = weight.value, True
    lead = tuple(range(len(weight.shape) - 2))
    rows, columns = (len(lead) + 1, len(lead)) if turned else (len(lead), len(lead) + 1)

    def zeros(rank: int, side: int) -> jax.Array:
        shape = (*(weight.shape[axis] for axis in lead), size[0], rank, weight.shape[side])
        return zeros_split_like(weight, shape, (*lead, None, None, side))

    gain = jnp.exp(zeros(1, columns)) if has_gain else None
    return Factors(zeros(size[1], rows), zeros(size[1], columns), gain)


def _bound(weight: Any, factors: Any, choice: Sequence[jax.Array], is_stacked: bool) -> Any:
    """Return a weight with its slots, and with the slots of every row, for every layer."""
    if isinstance(weight, Layered):
        pairs = zip(weight.layers, factors, strict=True)
        return Layered(tuple(_bound(*pair, choice, False) for pair in pairs))
    layers = factors.a.shape[:1] if is_stacked else ()
    own = (jnp.broadcast_to(x, (*layers, *x.shape)) for x in choice)
    return LoraBank(weight, factors.a, factors.b, factors.gain, *own)


def _places(bank: Bank) -> dict[Path, Place]:
    """Return the sizes of a slot by weight."""

    def place(factors: Any) -> Place:
        first = factors[0] if isinstance(factors, tuple) else factors
        *lead, _, rank, size_in = first.a.shape
        layers = (len(factors),) if isinstance(factors, tuple) else ()
        return Place((*layers, *lead), rank, rank // bank.rank, (size_in, first.b.shape[-1]))

    return {path: place(factors) for path, factors in bank.factors.items()}


def _in_form(update: Update, factors: Any) -> Any:
    """Return an update in the form of the slots: one for each of separate layers."""
    if not isinstance(factors, tuple):
        return update
    return tuple(jax.tree.map(lambda x, i=i: x[i], update) for i in range(len(factors)))


def _bases(bank: Bank) -> dict[Path, Any]:
    """Return the weights that gains are computed from, in the form of the slots."""
    leaves, tied = flatten(bank.params), tied_embedding(bank.params)
    found = {path: _base(leaves, path, tied) for path in bank.factors}
    return {path: x.layers if isinstance(x, Layered) else x for path, x in found.items()}


@functools.partial(jax.jit, donate_argnums=0, static_argnames="turned")
def _write(
    kept: Any, new: Any, bases: Any, slot: jax.Array, has_gain: jax.Array, turned: Path | None
) -> Any:
    """Return the factors of all weights and `scaled`, with `new` in a slot. The base of the path
    `turned` is stored as (out, in).
    """

    def put(own: jax.Array, update: Any) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(own, update, slot, own.ndim - 3)

    def write(own: Factors, update: Any, base: Any, is_turned: bool) -> Factors:
        gain = own.gain
        if gain is not None:
            compute = functools.partial(_gain, is_turned=is_turned)
            ones = functools.partial(jnp.ones_like, update.magnitude)
            value = jax.lax.cond(has_gain, compute, lambda *_: ones(), base, update)
            gain = put(gain, value[..., None, :])
        return Factors(put(own.a, update.a), put(own.b, update.b), gain)

    factors, scaled = kept
    written = {}
    for path, own in factors.items():
        base = bases.get(path)
        if isinstance(own, tuple):
            of_layers = base or (None,) * len(own)
            layers = zip(own, new[path], of_layers, strict=True)
            written[path] = tuple(
                write(one, update, weight, False) for one, update, weight in layers
            )
        else:
            written[path] = write(own, new[path], base, path == turned)
    return written, None if scaled is None else scaled.at[slot].set(has_gain)


def _gain(base: Any, update: Any, is_turned: bool) -> jax.Array:
    """Return magnitude / |W + a b| per column; 1 without a magnitude, or for a column of zeros."""
    size = _norms(base, update.a, update.b, is_turned)
    sound = (size > 0) & update.scaled
    return jnp.where(sound, update.magnitude / jnp.where(sound, size, 1), 1)


def _norms(base: Any, a: jax.Array, b: jax.Array, is_turned: bool) -> jax.Array:
    """Return |W + a b| per column of every matrix, one matrix at a time."""
    if a.ndim > 2:
        return jax.lax.map(lambda own: _norms(own[0], own[1], own[2], is_turned), (base, a, b))
    wide = widen(base)
    return dora.norms_of_matrix(wide.T if is_turned else wide, a.T, b)
