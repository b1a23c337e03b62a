"""Report page of `lora-jax eval`, from its `--output` and, with answers, its `--predictions`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.config import LOSSES
from lora_jax.errors import UserError, counted
from lora_jax.report import plots
from lora_jax.report.journal import read_lines
from lora_jax.report.page import charts
from lora_jax.report.page.parts import (
    Cell,
    Chart,
    Page,
    Part,
    Samples,
    Section,
    Table,
    cell,
    is_number,
)
from lora_jax.report.page.run import side_by_side

Rows = Sequence[Mapping[str, Any]]
_LOSS, _REGRESSION = "task_loss", "regression_loss"
_TASK_TITLE = "loss of the task (nats per token)"
_REGRESSION_TITLE = "loss on general text (nats per token)"


def make(file: Path, rows: Rows, predictions: Path | None) -> Page:
    """Return the page of the rows in `file`, with the answers in the file `predictions`.

    Raises:
        UserError: a file of predictions without answers.
    """
    sections = [
        Section("Scores", [_table(rows)]),
        Section("Task and forgetting", _tradeoff(rows)),
        Section("Answers", [] if predictions is None else _answers(rows, predictions)),
    ]
    lead = counted(len(rows), "row") + f" of {file.name}"
    return Page("Comparison", lead, [one for one in sections if one.parts])


def _name(row: Mapping[str, Any]) -> str:
    scale = row.get("scale")
    shown = f" at {scale:g}" if is_number(scale) and row["adapter"] != "base" else ""
    return f"{row['adapter']}{shown}"


def _table(rows: Rows) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row if name != "adapter"))
    best = {}
    for name in names:
        known = [row[name] for row in rows if is_number(row.get(name))]
        if known and name != "scale" and len(known) > 1:
            best[name] = min(known) if name in LOSSES or name.endswith("_loss") else max(known)
    cells = [
        [
            Cell(str(row["adapter"]), str(row["adapter"])),
            *(
                cell(row.get(n), 5, row.get(n) is not None and row.get(n) == best.get(n))
                for n in names
            ),
        ]
        for row in rows
    ]
    columns = ["adapter", *(name.replace("_", " ") for name in names)]
    caption = "The best of each column is marked. Losses are nats per token."
    return Table(columns, cells, frozenset(range(1, len(columns))), caption)


def _tradeoff(rows: Rows) -> list[Part]:
    known = [row for row in rows if is_number(row.get(_LOSS)) and is_number(row.get(_REGRESSION))]
    if len(known) < 2:
        return []
    adapters = list(dict.fromkeys(str(row["adapter"]) for row in known if row["adapter"] != "base"))
    short = dict(zip(adapters, plots.short_names(adapters), strict=True)) | {"base": "base"}
    scaled = any("scale" in row for row in known)
    points = []
    for row in known:
        names = [str(row["adapter"])]
        if names == ["base"] and scaled:  # a line from the base through all strengths
            names = adapters or ["base"]
        for name in names:
            points.append(
                {
                    "x": row[_REGRESSION],
                    "y": row[_LOSS],
                    "name": short[name],
                    "scale": row.get("scale", 1.0),
                    "label": f"{row['scale']:g}" if scaled else short[name],
                }
            )
    caption = "Lower is better on both axes: the task to the bottom, general text to the left."
    if scaled:
        caption += " The number is the strength of the update, 0 the base."
    return [Chart(charts.strengths(points, _REGRESSION_TITLE, _TASK_TITLE), caption)]


def _answers(rows: Rows, predictions: Path) -> list[Part]:
    lines = read_lines(predictions)
    if not all(isinstance(line, dict) and {"adapter", "prompt"} <= line.keys() for line in lines):
        raise UserError(f"{predictions} has no answers of `lora-jax eval --predictions`")
    if not lines:
        raise UserError(f"{predictions} does not exist, or has no answers")
    wanted = [
        ((row["adapter"], row["scale"]) if "scale" in row else row["adapter"], _name(row))
        for row in rows
    ]
    samples = side_by_side(lines, "adapter", wanted)
    return [Samples(samples, f"{len(samples)} prompts, evenly spaced over the held-out data.")]
