"""Communication of a compiled program between devices, read from its HLO text.

The body of a loop counts once per iteration; their number is in `known_trip_count` (CPU, GPU) or in
the condition of the loop (TPU). Bytes are those that a device sends in a ring of n devices: for a
gather or scatter of x bytes (n - 1) / n x, and twice that for an all-reduce.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:\{"?n"?:"?(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


@dataclass(frozen=True)
class Collective:
    """All operations of one kind in a step."""

    kind: str
    count: int
    bytes: int  # sent by a device
    largest: int  # bytes of the largest result of one operation, on a device


def collectives(text: str, devices: int) -> list[Collective]:
    """Return the collectives of a compiled module; those in loops count once per iteration."""
    bodies, entry = _computations(text)
    times: dict[str, int] = defaultdict(int)
    times[entry] = 1
    for name in _outer_first(bodies, entry):
        for line in bodies[name]:
            for called, repeats in _calls(line, bodies):
                times[called] += times[name] * repeats
    count, sent, largest = defaultdict(int), defaultdict(int), defaultdict(int)
    for name, lines in bodies.items():
        for line in lines:
            found = _collective(line, name, devices)
            if found is None or not times[name]:
                continue
            kind, size, moved = found
            count[kind] += times[name]
            sent[kind] += round(moved) * times[name]
            largest[kind] = max(largest[kind], size)
    return [
        Collective(kind, count[kind], sent[kind], largest[kind]) for kind in KINDS if count[kind]
    ]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            lines = bodies.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
        elif line.startswith("  "):
            lines.append(line)
    return bodies, entry


def _calls(line: str, bodies: dict[str, list[str]]) -> list[tuple[str, int]]:
    """Return the computations that an instruction calls, each with its number of runs."""
    operation = _OPERATION.match(line)
    if operation is None:
        return []
    repeats = 1
    if operation[3] == "while":
        condition = _CONDITION.search(line)
        repeats = _trips(line, bodies.get(condition[1], []) if condition else [])
    names = _CALLED.findall(line)
    if (branches := _BRANCHES.search(line)) is not None:
        names += [name.strip().lstrip("%") for name in branches[1].split(",")]
    return [(name, repeats) for name in names if name in bodies]


def _trips(line: str, condition: list[str]) -> int:
    if (known := _TRIPS.search(line)) is not None:
        return int(known[1])
    bounds = [int(found[1]) for part in condition if (found := _CONSTANT.search(part))]
    return max(bounds, default=1)


def _outer_first(bodies: dict[str, list[str]], entry: str) -> list[str]:
    """Return the computations in topological order: each after all its callers."""
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in done:
            for line in bodies[name]:
                for called, _ in _calls(line, bodies):
                    visit(called)
            done[name] = None

    visit(entry)
    return list(reversed(done))


def _collective(line: str, computation: str, devices: int) -> tuple[str, int, float] | None:
    """Return kind, bytes of the result and bytes sent of a collective; None for other lines."""
    operation = _OPERATION.match(line)
    if operation is None:
        return None
    kind = operation[3].removesuffix("-start")
    if kind not in KINDS:
        return None
    parts = [_bytes(*shape) for shape in _SHAPE.findall(operation[2])]
    # The start of an asynchronous operation returns its operand with its result.
    size = max(parts, default=0) if operation[3].endswith("-start") else sum(parts)
    group = _group_size(line, devices)
    share = (group - 1) / group
    match kind:
        # On TPUs a reduce-scatter is an all-reduce with a slice of its result, in one fusion.
        case "all-reduce" if computation.startswith("all-reduce-scatter"):
            return "reduce-scatter", size // group, size * share
        case "all-reduce":
            return kind, size, 2 * size * share
        case "reduce-scatter":
            return kind, size, size * (group - 1)
        case "collective-permute":
            return kind, size, float(size)
    return kind, size, size * share


def _bytes(kind: str, sides: str) -> int:
    digits = re.search(r"\d+", kind)
    bits = _BITS.get(kind) or (int(digits[0]) if digits else 0)
    return math.prod(int(side) for side in sides.split(",") if side) * bits // 8


def _group_size(line: str, devices: int) -> int:
    if (mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)) is not None:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    if (grid := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line)) is not None:
        return int(grid[2])
    if (listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line)) is not None:
        return len(listed[1].split(","))
    return devices
