"""Plots of a run: losses over the steps, norms of the update by module and layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_jax import hosts, tree
from lora_jax.errors import UserError

_NAME = 36  # characters of a module's name
_FEW = 25  # up to this many points, each is a dot and there is no smoothing
_HELD_OUT = {"task": "tab:orange", "regression": "tab:green"}


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """Return the mean of `width` (odd) values around each value. Near the ends the window shrinks
    to the values on both sides, so that a curve keeps its first and last values and is not shifted.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    at = np.arange(len(values))
    half = np.minimum(np.minimum(at, len(values) - 1 - at), width // 2)
    return (sums[at + half + 1] - sums[at - half]) / (2 * half + 1)


def plot_losses(file: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Plot the points (step, loss) of each curve: `train` as logged and, if there are many points,
    its centred mean; held-out sets as measured.
    """
    if not hosts.is_main() or not curves["train"]:  # the logs may be on another machine
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = zip(*curves["train"], strict=True)
    held_out = {name: curves[name] for name in _HELD_OUT if curves.get(name)}
    top = _top(losses, [loss for points in held_out.values() for _, loss in points])
    highest = max(losses)
    label = "training" if highest <= top else f"training (up to {highest:.3g}, not shown)"
    if len(losses) <= _FEW:
        axes.plot(steps, losses, color="tab:blue", marker="o", markersize=3, label=label)
    else:
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label=label)
        width = 2 * max(2, len(losses) // 40) + 1
        means = smooth([min(loss, top) for loss in losses], width)
        label = f"training, mean of {width} around"
        axes.plot(steps, means, color="tab:blue", label=label)
    for name, points in held_out.items():
        color, label = _HELD_OUT[name], f"held-out {name}"
        axes.plot(*zip(*points, strict=True), color=color, marker="o", label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)", title="loss")
    axes.set_ylim(0, top)
    if steps[-1] < 10:
        axes.set_xticks(range(steps[-1] + 1))  # ticks at whole steps only
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, file)


def _top(losses: Sequence[float], held_out: Sequence[float]) -> float:
    """Return the upper end of the axis: above all losses but rare training losses far above the
    rest.
    """
    usual = max([float(np.quantile(losses, 0.97, method="lower")), losses[0], *held_out])
    highest = max(*losses, usual)
    return 1.05 * (highest if highest <= 2 * usual else usual) or 1.0


def plot_tradeoff(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Plot the loss of the task against that of general text, a line per adapter from the base
    through its scales. `rows` are those of `lora-jax eval`.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    base, *others = rows
    if not {"task_loss", "regression_loss"} <= base.keys():
        raise UserError("the plot needs the loss of a task (data.eval) and of data.regression")
    start = (base["regression_loss"], base["task_loss"])
    for name in dict.fromkeys(row["adapter"] for row in others):
        own = [row for row in others if row["adapter"] == name]
        own.sort(key=lambda row: row.get("scale", 1.0))
        points = [start, *((row["regression_loss"], row["task_loss"]) for row in own)]
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=short_names([name])[0])
        for row, point in zip(own, points[1:], strict=True):
            text = f"{row.get('scale', 1.0):g}"
            axes.annotate(text, point, (6, 6), textcoords="offset points", color=line.get_color())
    axes.plot(*start, color="black", marker="s", linestyle="none", label="base")
    axes.set(
        xlabel="loss on general text (nats per token)",
        ylabel="loss of the task (nats per token)",
        title="strength of the update: the number at each point",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, file)


def plot_norms(file: Path, norms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> None:
    """Plot a map of the update's norm relative to the weight's: a row per module, a column per
    layer. A module outside the layers fills its row.

    A few cells far above the others do not stretch the colour scale: they have its last colour, and
    their value is printed in them.
    """
    if not hosts.is_main():
        return
    values = [module["relative"] for module in norms.values()]
    width = max(map(len, values))
    rows = [
        [*row, *[None] * (width - len(row))] if len(row) > 1 else [*row] * width for row in values
    ]
    grid = np.array([[np.nan if x is None else x for x in row] for row in rows], np.float64)
    limit = _limit(grid)
    names = short_names(list(norms))
    figure = Figure(figsize=(9, max(2.8, 1.5 + 0.35 * len(grid))), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")  # cells without an adapter
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=limit)
    _write_values(axes, grid, limit)
    axes.set_yticks(range(len(grid)), names, fontsize="small")
    set_layers(axes, width)
    axes.set(xlabel="layer", title="norm of the update relative to the weight")
    beyond = "max" if np.nanmax(grid, initial=0) > limit else "neither"
    figure.colorbar(image, ax=axes, extend=beyond, label="|update| / |weight|")
    save(figure, file)


def _limit(grid: np.ndarray) -> float:
    """Return the upper end of the colour scale: the largest value, or less if few are far above the
    rest.
    """
    found = grid[np.isfinite(grid)]
    if not found.size or not found.max():
        return 1.0
    usual = float(np.quantile(found, 0.95, method="lower"))
    return 1.25 * usual if 0 < 3 * usual < found.max() else float(found.max())


def _write_values(axes: Axes, grid: np.ndarray, limit: float) -> None:
    for row, column in np.argwhere(grid > 1.5 * limit):
        text = f"{grid[row, column]:.2g}"
        axes.text(column, row, text, ha="center", va="center", fontsize=6, clip_on=True)


def short_names(names: Sequence[str]) -> list[str]:
    """Return module names shortened to their last parts, as long as they differ."""
    parts = [name.split(".") for name in names]
    found = []
    for own in parts:
        count = 2 if own[-2:-1] and own[-2] in tree.FUSED else 1
        while count < len(own) and sum(p[-count:] == own[-count:] for p in parts) > 1:
            count += 1
        text = ".".join(own[-count:])
        found.append(text if len(text) <= _NAME else f"…{text[1 - _NAME :]}")
    return found


def set_layers(axes: Axes, count: int) -> None:
    """Set the ticks at whole layers."""
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_xticks(range(0, count, max(1, -(-count // 16))))


def save(figure: Figure, file: Path) -> None:
    """Write a picture, and create its directory."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
