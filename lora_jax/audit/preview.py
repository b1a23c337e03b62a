"""Report of an inspection, as text and as a plot."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from lora_jax.config import Config
from lora_jax.errors import UserError, counted
from lora_jax.report import plots
from lora_jax.train.warn import Measured

_BAR = 40  # characters of the longest bar of a histogram
_NAME = 90  # characters of a set's name in a plot
_PAIRS = 3  # printed examples of an overlap
# Control characters in the data must neither hide nor steer the terminal.
_VISIBLE = {i: chr(0x2400 + i) for i in range(32)} | {127: "\u2421", ord("\n"): "↵\n"}

Pair = tuple[str, str]  # places of two examples


@dataclass(frozen=True)
class Shown:
    """An example as consecutive pieces of text, each with one loss weight."""

    where: str
    tokens: int
    supervised: int  # tokens
    pieces: list[tuple[str, float]]  # (text, loss weight)


@dataclass(frozen=True)
class Overlap:
    """Held-out examples that are in the training data too, each with its first place there."""

    identical: list[Pair]
    same_prompt: list[Pair]  # with another answer


@dataclass(frozen=True)
class Packing:
    """Packing of the examples of one source into the rows of the run."""

    share: float  # of the rows of the run
    rows_per_epoch: int
    row_length: int  # tokens
    efficiency: float  # share of an epoch's tokens that are not padding
    epochs: float  # in the run; for a stream, relative to the part that was read
    supervised_tokens: int  # in the run; a token seen twice counts twice


@dataclass(frozen=True)
class Report:
    """Data that a run would train on. Sets are named by their settings."""

    config: Config
    records: int | None  # read of a stream; None: all the training data were read
    shown: list[Shown]
    sets: dict[str, Measured]  # "data.train SOURCE", data.eval or data.eval_size, data.regression
    repeats: list[Pair]  # training examples that occur earlier in the training data
    overlaps: dict[str, Overlap]  # of the held-out sets
    packing: dict[str, Packing]  # by source
    warnings: list[str]


def print_report(report: Report, console: Console) -> None:
    """Print a report. Without colours, « and » enclose supervised text.

    `console` should have markup and highlighting off.
    """
    if report.records is not None:
        console.print(
            f"data.train is streamed: this report covers its first {report.records:,} "
            "records (data.stream_rows)\n"
        )
    marks = console.color_system is None or console.no_color
    for shown in report.shown:
        console.print(_heading(f"{shown.where}: {shown.tokens} tokens"), end="")
        console.print(f", {shown.supervised} supervised")
        console.print(_colour(shown, marks), end="\n\n")
    for name, one in report.sets.items():
        console.print(_heading(name))
        for label, text in _describe(one, report.config.data.max_length):
            console.print(f"  {label:<10}{text}")
        for start, end, count, bar in _bars(one.histogram()):
            console.print(f"{start:>8}-{end:<7}{bar} {count:,}")
        console.print()
    console.print(_heading("duplicates"))
    _print_pairs(console, "examples repeated in data.train", report.repeats)
    for name, overlap in report.overlaps.items():
        _print_pairs(console, f"{name}: examples in data.train too", overlap.identical)
        _print_pairs(
            console, f"{name}: prompts in data.train with another answer", overlap.same_prompt
        )
    _print_packing(report, console)
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def _heading(text: str) -> Text:
    return Text(text, style="bold")


def _colour(shown: Shown, marks: bool) -> Text:
    text = Text()
    for piece, weight in shown.pieces:
        style = "dim" if weight == 0 else _shade(weight)
        piece = piece.translate(_VISIBLE)
        text.append(f"«{piece}»" if marks and weight else piece, style)
        if weight not in (0, 1):
            text.append(f"×{weight:.3g}", f"{style} italic")
    return text


def _shade(weight: float) -> str:
    """Return a colour from orange for weights near 0 to green for 1; blue for weights above 1."""
    if weight == 1:
        return "green"
    return "blue" if weight > 1 else f"rgb({round(255 * (1 - weight))},160,0)"


def _describe(one: Measured, limit: int) -> Iterator[tuple[str, str]]:
    counts, tokens = one.counts, int(one.lengths.sum())
    if counts is None:
        yield "rows", f"{len(one.lengths):,} held out of data.train"
    else:
        read = counts.examples + counts.bad + counts.dropped
        out = {"bad": counts.bad, "too long": counts.dropped, "left out": one.left_out}
        rest = "".join(f", {count:,} {why}" for why, count in out.items())
        yield "rows", f"{read:,} read: {len(one.lengths):,} examples{rest}"
        yield (
            f"> {limit}",
            f"{counts.truncated + counts.dropped:,} ({counts.truncated:,} cut, {counts.dropped:,} "
            f"dropped; the longest has {counts.longest:,} tokens)",
        )
    yield "tokens", f"{tokens:,}, {int(one.supervised.sum()):,} supervised ({one.share:.1%})"
    yield "lengths", ", ".join(f"{name} {length:,}" for name, length in one.quantiles().items())


def _bars(histogram: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int, str]]:
    most = max(count for _, _, count in histogram)
    for start, end, count in histogram:
        yield start, end, count, "█" * -(-_BAR * count // most)


def _print_pairs(console: Console, what: str, pairs: Sequence[Pair]) -> None:
    console.print(f"  {what}: {len(pairs):,}")
    for where, other in pairs[:_PAIRS]:
        console.print(f"    {where} = {other}")
    if len(pairs) > _PAIRS:
        console.print("    ...")


def _print_packing(report: Report, console: Console) -> None:
    train = report.config.train
    console.print()
    console.print(_heading(f"{train.total_steps:,} steps of {counted(train.batch_size, 'row')}"))
    once = "epochs" if report.records is None else "times as much as was read"
    for name, one in report.packing.items():
        console.print(
            f"  {name}: {one.rows_per_epoch:,} rows of {one.row_length:,} tokens hold "
            f"{'an epoch' if report.records is None else 'what was read'}, "
            f"{one.efficiency:.1%} filled"
        )
        share = f"{one.share:.1%} of the rows, " if len(report.packing) > 1 else ""
        console.print(f"    {share}{one.epochs:.2f} {once}, {one.supervised_tokens:,} supervised")
    total = sum(one.supervised_tokens for one in report.packing.values())
    console.print(f"  {total:,} supervised tokens in all\n")


def plot(report: Report, file: Path) -> None:
    """Plot histograms of lengths and of supervised tokens per example, as shares of each set. If
    few examples are far longer than the rest, the last bin holds them.

    Raises:
        UserError: the file cannot be written, or its extension is unknown.
    """
    figure = Figure(figsize=(10, 4.5 + 0.2 * len(report.sets)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    values = {
        left: {name: one.lengths for name, one in report.sets.items()},
        right: {name: one.supervised for name, one in report.sets.items()},
    }
    tokens = {left: "tokens per example", right: "supervised tokens per example"}
    for axes, by_set in values.items():
        longest = max(int(found.max()) for found in by_set.values())
        usual = max(int(np.quantile(found, 0.99)) for found in by_set.values())
        most = longest if longest <= 3 * usual or not usual else 2 * usual
        width = most // 40 + 1  # an integer, so that all bins hold equally many lengths
        edges = np.arange(0, most + 1 + width, width)
        for i, (name, found) in enumerate(by_set.items()):
            found, count = np.minimum(found, edges[-1] - 1), len(found)
            shares = np.histogram(found, edges)[0] * 100 / count
            axes.stairs(shares, edges, color=f"C{i}", label=f"{_cut(name)} ({count:,})")
            axes.stairs(shares, edges, color=f"C{i}", fill=True, alpha=0.15)
        beyond = "" if most == longest else f" (on the right: {edges[-2]:,} to {longest:,})"
        axes.set_xlabel(tokens[axes] + beyond)
        axes.grid(alpha=0.3)
    limit = report.config.data.max_length
    if limit < 2 * left.get_xlim()[1]:
        left.axvline(limit, color="black", linestyle="--", linewidth=1, label="data.max_length")
        left.legend(handles=left.lines)
    left.set(ylabel="% of the examples of the set", title="lengths")
    right.set(title="supervised tokens")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center")
    try:
        plots.save(figure, file)
    except (OSError, ValueError) as error:  # ValueError: an extension that matplotlib does not know
        raise UserError(f"--plot {file} cannot be written: {error}") from error


def _cut(name: str) -> str:
    """Shorten a name to its setting and the end of its source."""
    return name if len(name) <= _NAME else f"{name[:12]}…{name[13 - _NAME :]}"
