"""Memory and speed of the train step of K members over one base, as a sweep runs it.

    each   = adapters + optimizer + gradients + batch + activations
    total  = base + K * each

The members share `train.loss_chunk`: their logits together take the memory of one run's.
"""

import bisect
import dataclasses
from dataclasses import dataclass

from lora_jax.config import TrainConfig
from lora_jax.plan.analytic import Estimate, estimate, layer_weights, sizes
from lora_jax.plan.chips import GIB, Chip
from lora_jax.plan.program import Program
from lora_jax.plan.roofline import Roofline, count, find_bounds


@dataclass(frozen=True)
class Members:
    """Bytes of K members on each device.

    shared: the base, with copies of it in another dtype
    arguments: adapters, optimizer and batch of one member
    temporaries: gradients and activations of one member
    largest: most members that fit; None if the memory of the devices is not known
    """

    count: int
    shared: int
    arguments: int
    temporaries: int
    largest: int | None
    roofline: Roofline | None

    @property
    def each(self) -> int:
        """Bytes of one member."""
        return self.arguments + self.temporaries

    @property
    def total(self) -> int:
        """Bytes of the program of all members."""
        return self.shared + self.count * self.each

    @property
    def fits(self) -> bool | None:
        """True if all members fit; None if the memory is not known."""
        return None if self.largest is None else self.count <= self.largest


def shared_chunk(train: TrainConfig, count: int) -> TrainConfig:
    """Return the settings of one of `count` members, which share the chunks of the loss."""
    return dataclasses.replace(train, loss_chunk=max(1, train.loss_chunk // count))


def find_members(
    program: Program, platform: str, count: int, hbm: int | None, chip: Chip | None = None
) -> Members:
    """Return the memory of `count` members of `program` on a platform, as `analytic.estimate`, and
    with a chip the least time of their step.
    """
    found = _estimate(program, platform, count)
    largest = None if hbm is None else _find_largest(program, platform, hbm)
    bounds = None if chip is None else _bounds(program, chip, found, count)
    return Members(count, *_parts(found), largest, bounds)


def _estimate(program: Program, platform: str, count: int) -> Estimate:
    train = shared_chunk(program.config.train, count)
    config = dataclasses.replace(program.config, train=train)
    return estimate(dataclasses.replace(program, config=config), platform)


def _parts(found: Estimate) -> tuple[int, int, int]:
    """Return the bytes of the base, and arguments and temporaries of one member."""
    return (
        found.base + found.weights,
        found.adapters + found.optimizer + found.batch,
        found.gradients + found.kept + max(found.layer, found.logits),
    )


def _find_largest(program: Program, platform: str, hbm: int) -> int:
    """Return the most members that fit in `hbm` bytes."""

    def total(count: int) -> int:
        shared, *each = _parts(_estimate(program, platform, count))
        return shared + count * sum(each)

    _, arguments, _ = _parts(_estimate(program, platform, 1))
    limit = range(1, 2 + hbm // max(1, arguments))
    return bisect.bisect_right(limit, hbm, key=total)


def _bounds(program: Program, chip: Chip, found: Estimate, members: int) -> Roofline:
    """Return the bounds of the step of all members: weights are read and gathered once."""
    one, step = find_bounds(program, chip, found), count(program)
    passes = 3 if program.config.train.remat == "full" else 2
    s, train = sizes(program), program.config.train
    pieces = train.batch_size // (train.micro_batch_size or train.batch_size)
    weights = pieces * passes * s.layers * layer_weights(program) * s.number
    compute = members * one.compute
    memory = members * one.memory - (members - 1) * weights / chip.hbm_bandwidth
    network = (step.gathered + members * step.reduced) / chip.ici_bandwidth
    seconds = max(compute, memory, network)
    mfu = members * step.model_flops / program.mesh.size / chip.flops / seconds
    return Roofline(compute, memory, network, mfu)


def members_text(found: Members, hbm: int | None) -> str:
    """Return the table of the members, in GiB on each device."""
    rows = [
        (found.shared, "base, which the members share"),
        (found.arguments, "each member: adapters, optimizer and batch"),
        (found.temporaries, "each member: gradients and activations"),
        (found.total, f"total of {found.count} members"),
    ]
    lines = ["", f"a sweep of {found.count} members, GiB on each device:"]
    lines += [f"  {number / GIB:9.3f}  {name}" for number, name in rows]
    if hbm is not None:
        lines += [f"  {hbm / GIB:9.3f}  available: {found.largest} members fit"]
    if found.roofline is not None:
        own = found.roofline
        lines += [f"  a step of all takes {own.seconds:.3f} s at least ({own.bound})"]
    return "\n".join(lines)
