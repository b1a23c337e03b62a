"""Curves of a log, thinned so that a page of a long run stays small."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax.report.page.parts import is_number

MOST = 300  # points of a curve
Point = dict[str, Any]


def points(lines: Iterable[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return the finite values (step, value) of a field of metrics.jsonl."""
    return [
        (line["step"], line[name])
        for line in lines
        if is_number(line.get("step")) and is_number(line.get(name))
    ]


def thin(curve: Sequence[tuple[int, float]], most: int = MOST) -> list[Point]:
    """Return at most `most` points of a curve. Where it has more, a point is the mean of its
    neighbours, at their last step, with the `low`est and `high`est of them.
    """
    if len(curve) <= most:
        return [{"step": step, "value": value} for step, value in curve]
    found = []
    for i in range(most):
        part = curve[i * len(curve) // most : (i + 1) * len(curve) // most]
        values = [value for _, value in part]
        mean, low, high = sum(values) / len(values), min(values), max(values)
        found.append({"step": part[-1][0], "value": mean, "low": low, "high": high})
    return found


def named(name: str, curve: Sequence[tuple[int, float]], most: int = MOST) -> list[Point]:
    """Return the points of a thinned curve with its name as `series`."""
    return [{"series": name, **point} for point in thin(curve, most)]
