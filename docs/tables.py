"""Print the tables of README.md and of the pages that come from runs, and write them there.

python docs/tables.py                          print them, from the stored summaries
python docs/tables.py --write                  put them into the pages
python docs/tables.py --write runs/quickstart  store the summary of a finished run first

A summary is stored as images/NAME.json, where NAME is that of the run's directory. docs/pictures.py
draws its losses.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
STORED = DOCS / "images"
# Parts of summary.json that are stored, next to the command and the loss of every step.
KEPT = ("steps", "trainable_parameters", "total_parameters", "adapter_bytes", "checkpoint_bytes")
KEPT += ("supervised_tokens", "task", "regression")

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Lines of a page, from the line that begins with `start` to one that begins with `end`."""

    page: str
    start: str
    end: str
    lines: Callable[[Summary], list[str]]
    run: str = "quickstart"


def console_lines(run: Summary) -> list[str]:
    """The table that a run prints, without its frame, and the line on its size."""
    rows = [
        ("held-out task: loss (nats per token)", *both(run["task"], "loss")),
        ("held-out task: exact match", *both(run["task"], "exact_match")),
        ("regression set: loss (nats per token)", *both(run["regression"], "loss")),
    ]
    width = max(len(label) for label, *_ in rows)
    size = f"trained {run['trainable_parameters']:,} parameters"
    if total := run.get("total_parameters"):
        share = 100 * run["trainable_parameters"] / total
        size = f"trained {run['trainable_parameters']:,} of {total:,} parameters ({share:.4f} %)"
    size += f", adapter {run['adapter_bytes'] / 1e6:.2f} MB"
    if stored := run.get("checkpoint_bytes"):
        size += f", checkpoint {stored / 1e6:.2f} MB"
    return [
        f"┃ {'':{width}} ┃ before ┃  after ┃",
        *(f"│ {label:{width}} │ {before:.4f} │ {after:.4f} │" for label, before, after in rows),
        size,
    ]


def picture_line(run: Summary) -> list[str]:
    """The picture of the losses, with its description."""
    before, after = both(run["task"], "loss")
    first, last = both(run["regression"], "loss")
    return [
        f"![Losses of the quickstart: held-out loss from {before:.2f} to {after:.2f} in "
        f"{run['steps']} steps, loss on general text from {first:.2f} to {last:.2f}]"
        "(docs/images/quickstart.svg)"
    ]


def measured_lines(run: Summary) -> list[str]:
    """The table of docs/measured.md."""
    sides = zip(
        ("base model", "`configs/quickstart.yaml`"),
        both(run["task"], "loss"),
        both(run["task"], "exact_match"),
        both(run["regression"], "loss"),
        strict=True,
    )
    return [
        "| | held-out loss | exact match | regression loss |",
        "|---|---|---|---|",
        *(
            f"| {name} | {loss:.4f} | {exact:.2f} | {general:.4f} |"
            for name, loss, exact, general in sides
        ),
    ]


def both(metrics: Mapping[str, float], name: str) -> tuple[float, float]:
    """A metric before and after the run."""
    return metrics[f"{name}_before"], metrics[f"{name}_after"]


TABLES = (
    Table("README.md", "![Losses of the quickstart:", "", picture_line),
    Table("README.md", "┃ ", "```", console_lines),
    Table("docs/measured.md", "| | held-out loss | exact match |", "", measured_lines),
)


def load(name: str) -> Summary:
    return json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))


def store(run: Path) -> None:
    """Store the summary of a finished run, with the training loss of every step."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    metrics = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, metrics) if "loss" in line]
    content = {"command": f"python train.py --config configs/{run.name}.yaml"}
    content |= {key: summary[key] for key in KEPT if key in summary}
    text = json.dumps(content, indent=1).removesuffix("\n}")
    text += f',\n "loss": {[round(loss, 4) for loss in losses]}\n}}\n'
    (STORED / f"{run.name}.json").write_text(text, encoding="utf-8")


def replaced(text: str, table: Table) -> str:
    """The text of a page with a table made anew."""
    lines = text.split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith(table.start)), None)
    if start is None:
        raise SystemExit(f"{table.page} has no line that begins with {table.start!r}")
    end = start
    while not (lines[end] == "" if table.end == "" else lines[end].startswith(table.end)):
        end += 1
    return "\n".join([*lines[:start], *table.lines(load(table.run)), *lines[end:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="directories of finished runs to store")
    parser.add_argument("--write", action="store_true", help="put the tables into the pages")
    options = parser.parse_args()
    for run in options.runs:
        store(run)
    for table in TABLES:
        if options.write:
            page = ROOT / table.page
            page.write_text(replaced(page.read_text(encoding="utf-8"), table), encoding="utf-8")
        else:
            print(f"{table.page}:", *table.lines(load(table.run)), "", sep="\n")


if __name__ == "__main__":
    main()
