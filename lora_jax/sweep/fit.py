"""Number of members that train at once."""

import dataclasses
from typing import Any

from lora_jax.errors import UserError, counted
from lora_jax.plan.members import Members, find_members
from lora_jax.plan.program import build, stored
from lora_jax.sweep.groups import Group

_UNKNOWN = 8  # members where the memory of a device is not known
_SHARE = 0.9  # of the memory, for what the estimate does not know


def choose_count(group: Group, mesh: Any, members: int | None, waiting: int) -> int:
    """Return the places of a group: `members` or as many as fit, at most one for each trial.

    Raises:
        UserError: `members` do not fit, or not even one.
    """
    hbm = memory_of(mesh)
    if hbm is None:
        return min(waiting, members or _UNKNOWN)
    room = int(_SHARE * hbm)
    most = find_group(group, mesh, 1, room).largest or 0
    wanted = min(waiting, members or max(1, most))
    if wanted > most:
        raise UserError(describe_shortfall(group, find_group(group, mesh, wanted, room), hbm))
    return wanted


def describe_shortfall(group: Group, found: Members, hbm: int) -> str:
    """Return the message for a group that does not fit: its bytes, and what to change."""
    change = "lower train.micro_batch_size, data.max_length or the largest adapter.rank"
    if found.largest:
        change = f"take --members {found.largest}, or {change}"
    return (
        f"program {group.number} ({group.describe()}): {counted(found.count, 'member')} of "
        f"{found.each:,} bytes each over a base of {found.shared:,} need {found.total:,} bytes on "
        f"each device, which has {hbm:,}; {change}"
    )


def memory_of(mesh: Any) -> int | None:
    """Return the bytes that each device has for a program, if known."""
    stats = mesh.devices.flat[0].memory_stats()
    return (stats or {}).get("bytes_limit")


def find_group(group: Group, mesh: Any, members: int, hbm: int | None) -> Members:
    """Return the memory of the program of a group, as `lora-jax plan --members` estimates it. The
    adapters are those of its largest ranks.
    """
    config = group.config
    adapter = dataclasses.replace(
        config.adapter, rank=max(t.rank for t in group.joint.targets) if group.joint.targets else 1
    )
    if not config.adapter.trains_lora:
        adapter = config.adapter
    settings = dataclasses.replace(config, adapter=dataclasses.replace(adapter, rank_pattern={}))
    shapes = stored(settings, group.members[0].session.model)
    program = build(settings, shapes, mesh)
    return find_members(program, mesh.devices.flat[0].platform, members, hbm)
