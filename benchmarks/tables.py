"""Tables of results, as they are in the documentation."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    """Print a table in Markdown."""
    table = Table(box=box.MARKDOWN)
    for name in header:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in line))
    Console(width=120).print(table)
