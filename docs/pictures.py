"""Make the pictures of README.md and of the pages: `python docs/pictures.py`.

images/trees.svg        the parameter tree before bind, bound, and merged
images/quickstart.svg   the losses of the quickstart's run, from images/quickstart.json
images/methods.svg      the table of docs/methods.md: what each method learns, and what it damages
"""

import json
import re
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
BASE, ADAPTER, MERGED, TEXT, LINE = "#dbe4ee", "#ffd8a8", "#c3e6cb", "#1f2933", "#52606d"
STYLE = {
    "svg.hashsalt": "lora_jax",  # the same file from run to run
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def save(figure: Figure, name: str) -> None:
    figure.savefig(IMAGES / name, metadata={"Date": None}, facecolor="white")


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y - 0.17), width, 0.34, boxstyle="round,pad=0.02,rounding_size=0.07",
            facecolor=color, edgecolor=LINE, linewidth=0.8,
        )
    )  # fmt: skip
    axes.text(x + width / 2, y - 0.01, text, ha="center", va="center", size=8.5, color=TEXT)


def tree(axes: Axes, x: float, title: str, leaves: list[tuple[str, str, str]]) -> None:
    """One tree: its name, and each leaf with its path and its value."""
    axes.text(x, 3.62, title, size=11.5, weight="bold", color=TEXT)
    axes.plot([x + 0.06, x + 0.06], [3.42, 3.05 - 0.78 * (len(leaves) - 1)], color=LINE, lw=0.8)
    for index, (path, text, color) in enumerate(leaves):
        y = 3.05 - 0.78 * index
        axes.plot([x + 0.06, x + 0.2], [y, y], color=LINE, lw=0.8)
        axes.text(x + 0.22, y + 0.24, path, size=7.5, color=LINE, family="DejaVu Sans Mono")
        box(axes, x + 0.24, y, 2.02, text, color)


def arrow(axes: Axes, start: tuple, end: tuple, text: str, at: tuple, bend: float = 0.0) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=TEXT, lw=1.1,
            connectionstyle=f"arc3,rad={bend}",
        )
    )  # fmt: skip
    axes.text(*at, text, ha="center", size=9.5, family="DejaVu Sans Mono", color=TEXT)


def draw_trees() -> None:
    figure = Figure(figsize=(11.4, 3.7))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 11.4), ylim=(0.25, 3.95))
    axes.axis("off")
    paths = ("embed_tokens", "layers/q_proj", "layers/up_proj", "norm")
    tree(
        axes, 0.1, "params (frozen)",
        [(path, "W" if "proj" in path else "array", BASE) for path in paths],
    )  # fmt: skip
    tree(
        axes, 3.02, "adapters (they train)",
        [(path, "lora_a,  lora_b", ADAPTER) for path in paths[1:3]],
    )  # fmt: skip
    bound = [
        (p, "LoraWeight(W, a, b)", ADAPTER) if "proj" in p else (p, "array", BASE) for p in paths
    ]
    tree(axes, 6.0, "bound", bound)
    merged = [(p, "W + a @ b", MERGED) if "proj" in p else (p, "array", BASE) for p in paths]
    tree(axes, 8.98, "merged", merged)
    arrow(axes, (5.38, 2.27), (5.98, 2.27), "bind", (5.68, 2.37))
    arrow(axes, (8.36, 2.27), (8.96, 2.27), "merge", (8.66, 2.37))
    arrow(axes, (2.42, 3.05), (3.02, 3.05), "init", (2.72, 3.15))
    axes.text(
        3.1, 1.55,
        "y = x @ W + (x @ a) @ b\n\nThe model reads bound and knows\nno LoRA. params alone is the\n"
        "base model; merged is plain again.",
        size=8.8, color=TEXT, va="top",
    )  # fmt: skip
    save(figure, "trees.svg")


def draw_quickstart() -> None:
    found = json.loads((IMAGES / "quickstart.json").read_text(encoding="utf-8"))
    steps, losses = range(1, found["steps"] + 1), found["loss"]
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9aa5b1", lw=1, label="training, each step", zorder=1)
    for name, label, color in (
        ("regression", "general text, before and after: must not rise", "#2f855a"),
        ("task", "held-out addresses, before and after", "#c05621"),
    ):
        ends = [found[name][f"loss_{when}"] for when in ("before", "after")]
        axes.plot((0, found["steps"]), ends, "o", color=color, label=label)
        for step, value, align in ((0, ends[0], "left"), (found["steps"], ends[1], "right")):
            axes.annotate(
                f"{value:.2f}", (step, value), (0, 8), textcoords="offset points",
                ha=align, color=color, weight="bold",
            )  # fmt: skip
    axes.set(
        xlabel="step (one row of 512 tokens each)", ylabel="loss (nats per token)",
        ylim=(0, 2.85), xlim=(-2, found["steps"] + 2),
        title=f"The quickstart on 2 CPU cores: {found['steps']} steps, an adapter of "
        f"{found['adapter_bytes'] / 1e6:.1f} MB",
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="center right")
    save(figure, "quickstart.svg")


def measured() -> dict[str, tuple[float, float]]:
    """Held-out loss and regression loss by method, from the table of docs/methods.md."""
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+?)\*? \| (\d\.\d+) \| \d\.\d+ \| (\d\.\d+) \|", text, re.M)
    return {name: (float(task), float(general)) for name, task, general in rows}


def draw_methods() -> None:
    found = dict(reversed(measured().items()))
    figure = Figure(figsize=(8.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = range(len(found))
    for axes, column, color, title, base in (
        (left, 0, "#c05621", "held-out loss of the task\n(lower: learnt better)", None),
        (
            right,
            1,
            "#2f855a",
            "loss on general text, from the base model's 2.35 on\n(higher: forgot more)",
            2.35,
        ),
    ):
        values = [pair[column] for pair in found.values()]
        start = base or 0.0
        axes.hlines(rows, start, values, color=color, lw=1.2, alpha=0.5)
        axes.plot(values, rows, "o", color=color, ms=5)
        for row, value in enumerate(values):
            text = f"{value:.3f}" if base is None else f"{value:.2f}"
            axes.annotate(
                text, (value, row), (7, 0), textcoords="offset points", va="center", size=8.5
            )
        axes.set_title(title, size=10)
        axes.set_xlim(start, max(values) + 0.18 * (max(values) - start))
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(axis="y", length=0)
    left.set_yticks(rows, list(found))
    save(figure, "methods.svg")


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        draw_trees()
        draw_quickstart()
        draw_methods()
