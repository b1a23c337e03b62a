"""Notes and tables of a run on the console."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_jax.report.progress import format_seconds
from lora_jax.report.scores import Answer, is_right


def make_console(quiet: bool = False) -> Console:
    """Return a console that writes plain text to stderr, without rich's markup and emoji."""
    return Console(
        stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=quiet
    )


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """Print one line per note."""
    for note in notes:
        console.print(f"note: {note}")


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the final table: metrics before and after, then size, speed and memory."""
    table = Table(title="before and after")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    labels = {"task": "held-out task", "regression": "regression set"}
    for name, label in labels.items():
        for key in [key.removesuffix("_after") for key in summary[name] or () if "_after" in key]:
            unit = name_metric(key, summary[name])
            values = (summary[name][f"{key}_before"], summary[name][f"{key}_after"])
            cells = ("-" if value is None else f"{value:.4f}" for value in values)
            table.add_row(f"{label}: {unit}", *cells)
    if table.row_count:
        console.print(table)
    trained, total = summary["trainable_parameters"], summary["total_parameters"]
    seconds, session = (format_seconds(summary[f"{name}seconds"]) for name in ("", "session_"))
    console.print(
        f"{summary['steps']} steps, {summary['supervised_tokens']:,} supervised tokens, "
        f"{summary['tokens_per_second']:,.0f} tokens/s, {seconds} in all"
        + (f" ({session} since it was resumed)" if session != seconds else "")
        + f", peak memory {summary['peak_rss_bytes'] / 1e9:.2f} GB\n"
        f"trained {describe_share(trained, total - trained)}, "
        f"adapter {summary['adapter_bytes'] / 1e6:.2f} MB, checkpoint "
        f"{summary['checkpoint_bytes'] / 1e6:.2f} MB"
    )


def name_metric(key: str, pair: Mapping[str, Any]) -> str:
    """Return the label of a metric of a held-out set, whose summary is `pair`. The loss of answers
    to compare, which have a margin, is not per token.
    """
    if key == "loss" and "margin_after" not in pair:
        return "loss (nats per token)"
    return key.replace("_", " ")


def print_samples(console: Console, samples: Sequence[Answer]) -> None:
    """Print sample prompts with their references and answers, marked right or wrong."""
    for sample in samples:
        table = Table(show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        table.add_row("prompt", sample.prompt)
        table.add_row("expected", "\n".join(sample.references))
        if sample.thought:
            table.add_row("thought", sample.thought)
        mark, style = ("right", "green") if is_right(sample) else ("wrong", "red")
        table.add_row(Text(f"answer: {mark}", style), sample.answer)
        console.print(table)


def share(trained: int, frozen: int) -> float:
    """Return trained parameters over all parameters, trained and frozen, as PEFT computes it."""
    return trained / (trained + frozen)


def describe_share(trained: int, frozen: int) -> str:
    """Return the counts and their `share` as text."""
    total = trained + frozen
    return f"{trained:,} of {total:,} parameters ({100 * share(trained, frozen):.4f} %)"
