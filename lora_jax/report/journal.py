"""Files of a run that grow with its steps, and summary.json."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax import hosts
from lora_jax.cache import write_atomic
from lora_jax.report.progress import Display, Phase, format_seconds
from lora_jax.report.scores import Answer
from lora_jax.report.trackers import Tracker
from lora_jax.report.usage import Clock

LOGS = ("metrics.jsonl", "norms.jsonl", "samples.jsonl", "predictions.jsonl")


EVERY = 10.0  # seconds between the lines of training


def write_whole(file: Path, text: str) -> None:
    """Write a text file atomically. Only the main host writes, here and below."""
    if hosts.is_main():
        write_atomic(file, text.encode(), partial=f".{file.name}")


def to_text(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return one JSON object per line."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def append_line(file: Path, content: Mapping[str, Any]) -> None:
    """Append an object to a .jsonl file."""
    if not hosts.is_main():
        return
    with file.open("a", encoding="utf-8") as handle:
        handle.write(to_text([content]))


def append_samples(file: Path, step: int, answers: Sequence[Answer]) -> None:
    """Write the sample answers of a step; they replace those of a killed run."""
    cut_back(file, step - 1)
    for answer in answers:
        line = {"step": step, "prompt": answer.prompt, "references": answer.references}
        thought = {"thought": answer.thought} if answer.thought else {}
        append_line(file, {**line, "answer": answer.answer, **thought})


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file, without an incomplete last line; none if the file is
    missing.
    """
    found = []
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # the run was killed while it wrote this line
    return found


def cut_back(file: Path, step: int) -> None:
    """Remove the lines of a .jsonl file after `step`, which will be written again."""
    if hosts.is_main() and file.is_file():
        kept = [line for line in read_lines(file) if line["step"] <= step]
        write_whole(file, to_text(kept))


def read_curves(file: Path, held_out: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """Return the points (step, loss) of metrics.jsonl by curve: `train`, and each held-out set with
    points.
    """
    lines = read_lines(file)
    curves = {"train": [(line["step"], line["loss"]) for line in lines]}
    for name in held_out:
        key = f"{name}_loss"
        if points := [(line["step"], line[key]) for line in lines if key in line]:
            curves[name] = points
    return curves


class Journal:
    """metrics.jsonl, one object per line written at once, and the progress of the steps after
    `first`.

    remaining: takes the number of steps done, and returns the seconds until the end of the run, and
        True if they are complete
    """

    def __init__(
        self,
        file: Path,
        steps: int,
        display: Display,
        trackers: Sequence[Tracker],
        first: int,
        remaining: Callable[[int], tuple[float, bool]],
    ) -> None:
        self._file = (file if hosts.is_main() else Path(os.devnull)).open("a", encoding="utf-8")
        self._trackers, self._display, self._remaining = trackers, display, remaining
        self._steps, self._first = steps, first
        self._text, self._end, self._known = "running the first step", 0.0, True
        self._stack = contextlib.ExitStack()
        self._phase: Phase | None = None

    def __enter__(self) -> "Journal":
        shown = self._display.phase(
            "step", self._steps, done=self._first, status=self._status, every=EVERY
        )
        self._phase = self._stack.enter_context(shown)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        self._file.close()

    def write(self, content: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl, and send its metrics to the trackers."""
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()
        send(self._trackers, content["step"], content)

    def show(self, step: int, loss: float, rate: float, clock: Clock) -> None:
        """Show a finished step."""
        assert self._phase is not None
        self._text = f"loss {loss:.4f}  lr {rate:.2e}  {clock.tokens_per_second:,.0f} tokens/s"
        left, self._known = self._remaining(step)
        self._end = time.monotonic() + left
        self._phase.advance(step - self._phase.done)
        if step == self._steps or not self._phase.said:
            self._phase.next_line = 0.0
        self._display.say_line(self._phase)

    def _status(self) -> str:
        left = self._end - time.monotonic()
        if left < 1:  # an evaluation takes longer than earlier ones: the estimate is unknown
            return self._text
        more = "" if self._known else " and evaluations"
        return f"{self._text}  ETA {format_seconds(left)}{more}"


def send(trackers: Sequence[Tracker], step: int, content: Mapping[str, Any]) -> None:
    """Send the metrics of a step to all trackers."""
    numbers = {name: value for name, value in content.items() if name != "step"}
    for one in trackers if numbers else ():
        one(step, numbers)


def write_summary(file: Path, summary: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps(summary, indent=2) + "\n")
