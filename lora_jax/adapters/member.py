"""Adapters of sweep members in one tree: joint shapes, padding, and settings as arrays.

joint    = join([of_rank_4, of_rank_16])        # Trainable: all targets, the largest ranks
adapters = pad(own_adapters, joint)             # zeros where a member has no adapter
settings = settings_of(own, joint)              # scales and dropout of this member, as arrays
bound    = bind(params, adapters, joint, key, settings)
own      = cut(adapters, own_trainable)

Columns of zeros in `lora_a` and rows of zeros in `lora_b` add nothing, get no gradient, and stay
zero under AdamW. So a member computes what it would alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import low_rank, vera
from lora_jax.targets import Target, Trainable
from lora_jax.tree import Path, flatten, unflatten


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemberSettings:
    """Settings of an adapter that may differ between members of a program.

    scales: alpha / rank of every layer of a target, broadcastable to its lora_b; 0: not adapted
    keep: 1 - dropout
    numbers: number of each target among those of its member, which draws its dropout
    """

    scales: dict[Path, Any]
    keep: Any
    numbers: dict[Path, Any]

    def factors(self, target: Target, small: Mapping[Path, Any], found: Trainable) -> Any:
        """Return `lora_a`, and `lora_b` with the scale of this member."""
        if found.config.trains_vera:
            return vera.factors(target, small, found)
        a, b = (small[(*target.path, part)] for part in ("lora_a", "lora_b"))
        a = jax.lax.stop_gradient(a) if found.config.freeze_a else a
        return a, b * self.scales[target.path]

    def _taken(self, target: Target, small: Mapping[Path, Any], found: Trainable) -> Any:
        """Return the factors that the init of this member subtracts from the base, negated."""
        a, b = (small[(*target.path, part)] for part in ("init_a", "init_b"))
        a, b = jax.lax.stop_gradient((a, b))
        return a, -b * self.scales[target.path]

    def bind(
        self, leaves: Mapping[Path, Any], small: Mapping[Path, Any], found: Trainable, key: Any
    ) -> dict[Path, Any]:
        """Return the targeted leaves as `LoraWeight`s with the settings of this member. What its
        init subtracts from the base is a `LoraWeight` below them: the base is that of all members.
        """
        first = tuple(t for t in found.targets if (*t.path, "init_a") in small)
        if first:
            changing = dataclasses.replace(found, targets=first)
            leaves = {**leaves, **low_rank.bind(dict(leaves), small, changing, self._taken, None)}
        drops = None if key is None else low_rank.Drops(key, self.keep, self.numbers)
        adapted = {path: scale > 0 for path, scale in self.scales.items()}
        return low_rank.bind(dict(leaves), small, found, self.factors, drops, adapted)


def join(members: Sequence[Trainable]) -> Trainable:
    """Return the trainable tree that has room for each member: every target of any of them, in
    every layer of the largest rank there. All else is that of the first.
    """
    first, targets = members[0], {}
    for target in (target for one in members for target in one.targets):
        other = targets.get(target.path)
        targets[target.path] = target if other is None else _larger(target, other)
    dropout = max(one.config.dropout for one in members)
    config = dataclasses.replace(first.config, dropout=dropout)
    untied = next((one.untied for one in members if one.untied is not None), None)
    return dataclasses.replace(first, config=config, targets=tuple(targets.values()), untied=untied)


def _larger(one: Target, other: Target) -> Target:
    ranks = tuple(map(max, one.ranks, other.ranks))
    leaves = tuple(dict.fromkeys([*one.leaves, *other.leaves]))
    return dataclasses.replace(one, ranks=ranks, leaves=leaves)


def settings_of(own: Trainable, joint: Trainable) -> MemberSettings:
    """Return the settings of a member in the joint program, as arrays of NumPy."""
    mine = {target.path: target for target in own.targets}
    order = {target.path: number for number, target in enumerate(own.targets)}
    scales = {}
    for target in joint.targets:
        given = mine.get(target.path)
        zeros = np.zeros_like(target.scales(False))
        scales[target.path] = zeros if given is None else given.scales(own.config.use_rslora)
    numbers = {t.path: np.uint32(order.get(t.path, 0)) for t in joint.targets}
    return MemberSettings(scales, np.float32(1 - own.config.dropout), numbers)


def pad(adapters: Mapping, joint: Trainable) -> dict:
    """Return a member's adapters in the joint shapes, with zeros elsewhere."""
    given = flatten(adapters)

    def padded(path: Path, shape: tuple[int, ...]) -> Any:
        if path not in given:
            return jnp.zeros(shape, jnp.float32)
        own = given[path]
        return jnp.pad(own, [(0, n - m) for n, m in zip(shape, own.shape, strict=True)])

    return unflatten({leaf.path: padded(leaf.path, leaf.shape) for leaf in joint.leaves})


def cut(adapters: Mapping, own: Trainable) -> dict:
    """Invert `pad`: return the adapters in the shapes of the member alone."""
    given = flatten(adapters)
    return unflatten(
        {leaf.path: given[leaf.path][tuple(map(slice, leaf.shape))] for leaf in own.leaves}
    )
