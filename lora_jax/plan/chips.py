"""TPU chips, and the names of slices of them.

Peaks are from Google Cloud's documentation (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x;
bfloat16, per chip). `hbm` is the limit that the compiler of libtpu 0.0.42 reports for a program
that is too large on one device: a little less than the documented size.
"""

import math
from dataclasses import dataclass

from lora_jax.errors import UserError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Peaks of one device, as JAX counts devices."""

    name: str
    flops: float  # of bfloat16, per second
    hbm: int  # bytes that a program may use
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second out of the device, over all its links
    axes: int  # of its torus
    devices: int = 1  # per chip
    options: tuple[tuple[str, str], ...] = ()  # for `get_topology_desc`


CHIPS = {
    chip.name: chip
    for chip in (
        # Both cores of a chip are one device, as on cloud machines.
        Chip(
            "v4", 275e12, int(30.75 * GIB), 1228e9, 300e9, 3, 1, (("chip_config_name", "megacore"),)
        ),
        Chip("v5e", 197e12, int(15.75 * GIB), 819e9, 200e9, 2),
        Chip("v5p", 459e12, int(95.74 * GIB), 2765e9, 600e9, 3),
        Chip("v6e", 918e12, int(31.25 * GIB), 1638e9, 400e9, 2),
        Chip("tpu7x", 2307e12 / 2, int(94.75 * GIB), 7380e9 / 2, 600e9 / 2, 3, 2),
    )
}
_ALIASES = {"7x": "tpu7x", "v7x": "tpu7x"}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


@dataclass(frozen=True)
class Topology:
    """A slice: a kind of chip, and the number of chips along each axis."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.chip.devices

    @property
    def options(self) -> dict:
        """Arguments of `get_topology_desc` in addition to the name."""
        alone = {} if math.prod(self.shape) > 1 else {"chips_per_host_bounds": (1, 1, 1)}
        return dict(self.chip.options) | alone


def parse_topology(name: str) -> Topology:
    """Return a name such as `v5p:2x2x4` as a `Topology`.

    Raises:
        UserError: an unknown chip or shape; the error lists those that exist.

    Example:
        >>> parse_topology("v5p:2x2x4").devices
        16
    """
    kind, _, size = name.strip().lower().partition(":")
    chip = CHIPS.get(_ALIASES.get(kind, kind))
    known = [f"{one.name}:{shape}" for one in CHIPS.values() for shape in _shapes(one)]
    if chip is None or size not in _shapes(chip) and not _is_large(chip, size):
        listed = "\n".join(
            f"  {one.name}: {', '.join(_shapes(one))}"
            + (", and multiples of 4 along every axis" if one.axes == 3 else "")
            for one in CHIPS.values()
        )
        near = nearest(name.lower(), known)
        raise UserError(
            f"topology {name!r} is unknown; there are:\n{listed}\n{near.strip()}".rstrip()
        )
    return Topology(chip, tuple(map(int, size.split("x"))))


def _shapes(chip: Chip) -> tuple[str, ...]:
    return _FLAT if chip.axes == 2 else _DEEP


def _is_large(chip: Chip, size: str) -> bool:
    sides = size.split("x")
    return (
        chip.axes == 3
        and len(sides) == 3
        and all(side.isdecimal() and int(side) and int(side) % 4 == 0 for side in sides)
    )
