"""Report on how much of an update survives rounding when it is merged.

    intended = W' - W                   in float32; W' is the trained weight, W the one before the
                                        first step
    realised = round(W') - round(W)     in the dtype that is written

Reported for every module and layer: the share of weights that round(W') changes, the cosine between
the two updates and the ratio of their norms. bfloat16 rounds away an update that is far smaller
than its weight: with 0.02 % of the weights' norm, 95 % of the weights do not change.

W is the weight of the files, in the dtype of the base. For a merge into the dequantised base, W is
the dequantised weight; for an init that changes the base, W has the subtracted factors added back.
So quantisation and initial factors do not count as an update and cannot hide a lost one. A stack of
experts is one module.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lora_jax import tree
from lora_jax.config import ExportConfig
from lora_jax.errors import UserError
from lora_jax.report import plots
from lora_jax.sharding import constrain
from lora_jax.targets import HEAD, Trainable
from lora_jax.weights import Untied, materialize, widen

_EXACT = 1e-6  # 1 - cosine of two updates that differ by the rounding of float32 alone


@dataclass(frozen=True)
class Fit:
    """Sums over the weights of a module, or of several."""

    weights: int
    changed: float  # weights
    product: float  # of both updates
    realised: float  # its square
    intended: float  # its square

    @property
    def share_changed(self) -> float:
        return self.changed / self.weights

    @property
    def cosine(self) -> float | None:
        """None if no change was intended, 0 if none was realised."""
        if not self.intended:
            return None
        return self.product / math.sqrt(self.realised * self.intended) if self.realised else 0.0

    @property
    def norm_ratio(self) -> float | None:
        """|realised| / |intended|; None if no change was intended."""
        return math.sqrt(self.realised / self.intended) if self.intended else None

    def numbers(self) -> dict[str, float | None]:
        return {
            "weights": self.weights,
            "share_changed": self.share_changed,
            "cosine": self.cosine,
            "norm_ratio": self.norm_ratio,
        }


@dataclass(frozen=True)
class Report:
    """modules: by Hugging Face path, in the order of the tree
    kl: nats per token of the probe, `merged` and `base`, each KL(live, it); None: not measured
    """

    dtype: str  # of the written weights
    modules: Mapping[str, Fit]
    kl: Mapping[str, float] | None = None
    probe_rows: int = 0

    @property
    def whole(self) -> Fit:
        sums = np.sum([_sums(fit) for fit in self.modules.values()], axis=0)
        return Fit(int(sums[0]), *map(float, sums[1:]))

    def worst(self) -> list[tuple[float, str]]:
        """Cosines with their modules, the lowest first."""
        found = [(fit.cosine, name) for name, fit in self.modules.items()]
        return sorted((cosine, name) for cosine, name in found if cosine is not None)


def _sums(fit: Fit) -> tuple[float, ...]:
    return fit.weights, fit.changed, fit.product, fit.realised, fit.intended


def measure(found: Trainable, bound: Mapping, start: Mapping, merged: Mapping) -> dict[str, Fit]:
    """Compare intended and realised update of every module that trains, layer by layer.

    Args:
        found: the weights that train.
        bound: the tree that was trained, bound; only one matrix of it is materialised at a time.
        start: the tree before the first step, plain, quantised or bound.
        merged: the tree that is written, in its dtype.
    """
    trees = [tree.flatten(one) for one in (bound, start, merged)]
    fits: dict[str, Fit] = {}
    for path, names, chosen, columns in _parts(found):
        leaves = [_leaf(leaves, path, found) for leaves in trees]
        lead = tree.lead_axes(path)
        first, stop = columns or (0, leaves[0].shape[-1])
        sums = np.asarray(_compare(*leaves, lead, first, stop), np.float64)
        stacked = tree.stack_position(path) is not None
        by_layer = sums.reshape(4, len(names) if stacked else 1, -1).sum(axis=-1)
        size = math.prod(leaves[0].shape[:-1]) * (stop - first) // by_layer.shape[1]
        for name, is_chosen, own in zip(names, chosen, by_layer.T, strict=True):
            if is_chosen:
                fits[name] = Fit(size, *map(float, own))
    return fits


def _parts(found: Trainable):
    """Yield, for each weight that trains: path, names of the slices, which of them train, and the
    trained columns (None: all).
    """
    for target in found.targets:
        yield target.weight, target.names, [rank > 0 for rank in target.ranks], target.columns
    for whole in found.whole:
        ending = ".bias" if whole.path[-1] == "bias" else ""
        yield whole.path, [name + ending for name in whole.names], whole.chosen, None
    for rows in found.rows:
        yield rows.path, [tree.dotted(rows.path[:-1])], [True], None


def _leaf(leaves: Mapping[tree.Path, Any], path: tree.Path, found: Trainable) -> Any:
    """Return the weight of a path; for an `Untied` embedding, the one that the path names."""
    leaf = leaves[found.untied if path == HEAD and found.untied else path]
    if not isinstance(leaf, Untied):
        return leaf
    return leaf.head if path == HEAD else leaf.embed


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _compare(
    bound: Any, start: Any, merged: jax.Array, lead: int, first: int, stop: int
) -> jax.Array:
    """Return (4, *lead axes) in float32: for each slice, in columns `first` to `stop`, the number
    of weights that changed, and the sums of realised * intended and of the square of each.
    """

    def of_one(own: tuple[Any, Any, jax.Array]) -> jax.Array:
        bound, start, new = own
        trained, before = (materialize(widen(w))[..., first:stop] for w in (bound, start))
        new = new[..., first:stop]
        old = before.astype(new.dtype)
        intended = trained - before
        realised = new.astype(jnp.float32) - old.astype(jnp.float32)
        pairs = (realised * intended, jnp.square(realised), jnp.square(intended))
        return jnp.stack([x.sum() for x in ((new != old).astype(jnp.float32), *pairs)])

    of_all: Any = of_one
    for _ in range(lead):
        of_all = functools.partial(jax.lax.map, of_all)
    return constrain(jnp.moveaxis(of_all((bound, start, merged)), -1, 0))


def check(report: Report, settings: ExportConfig) -> None:
    """Raise a UserError for a merge that `min_merge_cosine` or `max_merge_kl` refuses."""
    problems, advice = [], []
    if report.dtype != "float32":
        advice.append("write export.dtype=float32")
    least, most = settings.min_merge_cosine, settings.max_merge_kl
    if least is not None:
        below = [(cosine, name) for cosine, name in report.worst() if not cosine >= least]
        lines = [
            f"{name}: {cosine:.6f}, {report.modules[name].share_changed:.1%} of its weights change"
            for cosine, name in below
        ]
        if lines:
            problems.append(
                f"the cosine between the update as {report.dtype} would hold it and the update "
                f"that was trained is below export.min_merge_cosine={least:g} in {len(lines)} of "
                f"{len(report.modules)} modules:\n  {tree.summarize(lines)}"
            )
    if most is not None and report.kl is not None and not report.kl["merged"] <= most:
        problems.append(
            f"KL(live, merged) is {report.kl['merged']:.3g} nats per token, above "
            f"export.max_merge_kl={most:g} (KL(live, base) is {report.kl['base']:.3g}): the merged "
            "model is not the one that was trained"
        )
        if settings.quantized_base == "original":
            advice.append("merge into what it was trained on, export.quantized_base=dequantized")
    if problems:
        advice.append("keep the adapter apart (a PEFT directory loses nothing)")
        raise UserError(
            "\n".join(problems) + f"\nThe merged model is not written. {_sentence(advice)}"
        )


def _sentence(advice: Sequence[str]) -> str:
    text = ", or ".join(advice)
    return text[0].upper() + text[1:]


def summarize(report: Report) -> dict[str, Any]:
    """Return the figures of the whole merge."""
    lowest = report.worst()[:1]
    kl = report.kl or {}
    return {
        "dtype": report.dtype,
        **report.whole.numbers(),
        "lowest_cosine": lowest[0][0] if lowest else None,
        "lowest_cosine_module": lowest[0][1] if lowest else None,
        **{f"kl_live_{name}": kl[name] if np.isfinite(kl[name]) else None for name in kl},
        "probe_rows": report.probe_rows,
    }


def print_report(report: Report, console: Console) -> None:
    """Print a short table."""
    whole, lowest = report.whole, report.worst()[:1]
    table = Table(title=f"merged into {report.dtype}", show_header=False)
    changed = f"{whole.share_changed:.2%} of {whole.weights:,}"
    table.add_row("weights that change", changed)
    if lowest:
        table.add_row("cosine with what was trained", f"{whole.cosine:.4f}")
        table.add_row("the lowest", f"{lowest[0][0]:.4f} in {lowest[0][1]}")
    for name, value in (report.kl or {}).items():
        table.add_row(f"KL(live, {name})", f"{value:.3g} nats per token")
    console.print(table)


def write(report: Report, directory: Path) -> None:
    """Write `merge_report.json` and `merge_report.png`; equal reports give equal bytes."""
    modules = {name: fit.numbers() for name, fit in report.modules.items()}
    content = summarize(report) | {"modules": modules}
    text = json.dumps(content, indent=2) + "\n"
    (directory / "merge_report.json").write_text(text, encoding="utf-8")
    plot(report, directory / "merge_report.png")


def plot(report: Report, file: Path) -> None:
    """Plot 1 - cosine on a log axis, and the share of weights that the merge leaves as they were,
    over the layers: a line per kind of module, and a horizontal line for a module outside the
    layers. If nothing is lost, as in float32, the plot is one sentence.
    """
    worst = max((1 - cosine for cosine, _ in report.worst()), default=0.0)
    if worst <= _EXACT:
        text = (
            f"merged into {report.dtype}: nothing is lost,\n"
            f"1 - cosine is at most {_EXACT:g} in every module"
        )
        figure = Figure(figsize=(6, 1.2))
        figure.text(0.5, 0.5, text, ha="center", va="center")
        return plots.save(figure, file)
    kinds: dict[str, dict[int | None, Fit]] = {}
    for name, fit in report.modules.items():
        layer = tree.layer_index(name)
        kind = name if layer is None else name.partition(f".{layer}.")[2]
        kinds.setdefault(kind, {})[layer] = fit
    figure = Figure(figsize=(10, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    labels = plots.short_names(list(kinds))
    for number, (label, layers) in enumerate(zip(labels, kinds.values(), strict=True)):
        style = {"color": f"C{number % 10}", "label": label}
        cosines = {layer: fit.cosine for layer, fit in layers.items()}
        lost = {layer: max(1 - x, _EXACT) for layer, x in cosines.items() if x is not None}
        kept = {layer: 1 - fit.share_changed for layer, fit in layers.items()}
        for axes, values in ((upper, lost), (lower, kept)):
            if None in values:
                axes.axhline(values[None], linestyle="--", **style)
            elif values:
                axes.plot(list(values), list(values.values()), marker=".", **style)
    upper.set(ylabel="1 - cosine, realised and intended", yscale="log")
    upper.set_title(f"merged into {report.dtype}: what rounding loses")
    lower.set(xlabel="layer", ylabel="share of weights unchanged", ylim=(-0.05, 1.05))
    layers = [layer for own in kinds.values() for layer in own if layer is not None]
    plots.set_layers(lower, 1 + max(layers, default=0))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    handles, labels = lower.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    plots.save(figure, file)
