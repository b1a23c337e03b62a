"""Output of a run: metrics.jsonl, the progress bar, the closing table, summary.json."""

import contextlib
import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from lora_jax import hosts
from lora_jax.train.scores import Answer
from lora_jax.train.sinks import Sink


def make_console(quiet: bool = False) -> Console:
    """Messages go to stderr as they are: brackets and colons in names and answers are no markup."""
    return Console(
        stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=quiet
    )


class Clock:
    """Training time by laps. The first lap, which compiles, and pauses do not count towards the
    speed.
    """

    def __init__(self) -> None:
        self._mark = time.monotonic()
        self._laps, self._seconds, self._tokens = 0, 0.0, 0
        self._first = (0.0, 0)

    def lap(self, tokens: int) -> None:
        """A step over `tokens` tokens has ended."""
        now = time.monotonic()
        self._laps += 1
        if self._laps == 1:
            self._first = (now - self._mark, tokens)
        else:
            self._seconds += now - self._mark
            self._tokens += tokens
        self._mark = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        spent = time.monotonic() - self._mark
        yield
        self._mark = time.monotonic() - spent

    @property
    def tokens_per_second(self) -> float:
        """Compute the speed of all laps but the first, or of the first if there is no other."""
        seconds, tokens = (self._seconds, self._tokens) if self._laps > 1 else self._first
        return tokens / seconds if seconds else 0.0

    def remaining(self, steps: int) -> float:
        """Seconds that `steps` more laps take."""
        return steps * (self._seconds / (self._laps - 1) if self._laps > 1 else self._first[0])


LOGS = ("metrics.jsonl", "norms.jsonl", "samples.jsonl")


def write_whole(file: Path, text: str) -> None:
    """Write a file at once: it holds what it held before, or all of `text`. Of several hosts the
    main one does, here and below.
    """
    if not hosts.is_main():
        return
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def append_line(file: Path, content: Mapping[str, Any]) -> None:
    """One more object in a .jsonl file."""
    if not hosts.is_main():
        return
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(content, ensure_ascii=False) + "\n")


def append_samples(file: Path, step: int, answers: Sequence[Answer]) -> None:
    """The answers of a step to the sample prompts, in place of those that a killed run wrote."""
    cut_back(file, step - 1)
    for answer in answers:
        line = {"step": step, **dataclasses.asdict(answer)}
        if not answer.thought:
            del line["thought"]
        append_line(file, line)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that a run wrote, without a last line that was cut off; none if
    there is no such file.
    """
    found = []
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # the run was killed while it wrote this line
    return found


def cut_back(file: Path, step: int) -> None:
    """Keep the lines of a .jsonl file up to `step`: the later ones are written again."""
    if hosts.is_main() and file.is_file():
        kept = [line for line in read_lines(file) if line["step"] <= step]
        write_whole(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def read_curves(file: Path, held_out: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """Points (step, loss) of metrics.jsonl by curve: `train`, and those of the held-out sets that
    have any.
    """
    lines = read_lines(file)
    curves = {"train": [(line["step"], line["loss"]) for line in lines]}
    for name in held_out:
        key = f"{name}_loss"
        if points := [(line["step"], line[key]) for line in lines if key in line]:
            curves[name] = points
    return curves


class Journal:
    """metrics.jsonl, one object per line written at once, and the progress bar (plain lines without
    a terminal).
    """

    def __init__(self, file: Path, steps: int, console: Console, sinks: Sequence[Sink] = ()):
        self._file = (file if hosts.is_main() else Path(os.devnull)).open("a", encoding="utf-8")
        self._sinks = sinks
        self._console, self._steps = console, steps
        self._next_line = 0.0
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=steps)

    def __enter__(self) -> "Journal":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
        self._file.close()

    def write(self, content: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and the same numbers to the sinks."""
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in content.items() if name != "step"}
        for send in self._sinks:
            send(content["step"], numbers)

    def show(self, step: int, loss: float, rate: float, clock: Clock) -> None:
        """Move the bar; without a terminal, print a line every ten seconds and at the end."""
        left = format_seconds(clock.remaining(self._steps - step))
        text = (
            f"loss {loss:.4f}  rate {rate:.2e}  {clock.tokens_per_second:,.0f} tokens/s  ETA {left}"
        )
        self._bar.update(self._task, completed=step, description=text)
        now = time.monotonic()
        if not self._console.is_terminal and (now >= self._next_line or step == self._steps):
            self._next_line = now + 10
            self._console.print(f"step {step}/{self._steps}  {text}")


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory() -> dict[str, int]:
    """`device_bytes`, the peak of an accelerator's memory so far; nothing where it is not known."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {} if peak is None else {"device_bytes": peak}


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """The closing table: before and after, then size, speed and memory."""
    table = Table(title="before and after")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    labels = {"task": "held-out task", "regression": "regression set"}
    for name, label in labels.items():
        for key in [key.removesuffix("_after") for key in summary[name] or () if "_after" in key]:
            unit = "loss (nats per token)" if key == "loss" else key.replace("_", " ")
            values = (summary[name][f"{key}_before"], summary[name][f"{key}_after"])
            table.add_row(f"{label}: {unit}", *(f"{value:.4f}" for value in values))
    if table.row_count:
        console.print(table)
    console.print(
        f"{summary['steps']} steps, {summary['supervised_tokens']:,} supervised tokens, "
        f"{summary['tokens_per_second']:,.0f} tokens/s, {format_seconds(summary['seconds'])} in "
        "all, "
        f"peak memory {summary['peak_rss_bytes'] / 1e9:.2f} GB\n"
        f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters "
        "trained, "
        f"adapter {summary['adapter_bytes'] / 1e6:.2f} MB, checkpoint "
        f"{summary['checkpoint_bytes'] / 1e6:.2f} MB"
    )


def print_samples(console: Console, samples: Sequence[Answer]) -> None:
    """A few prompts with what was expected and what came."""
    for sample in samples:
        table = Table(show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        table.add_row("prompt", sample.prompt)
        table.add_row("expected", "\n".join(sample.references))
        if sample.thought:
            table.add_row("thought", sample.thought)
        table.add_row("answer", sample.answer)
        console.print(table)


def write_summary(file: Path, summary: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps(summary, indent=2) + "\n")
