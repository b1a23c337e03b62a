"""Answers to held-out prompts as lines of a .jsonl file, each with its own metrics.

    {"step": 0, "where": "test.jsonl:3", "prompt": "two", "references": ["zwei"],
     "answer": "2", "exact_match": 0.0}

`step` 0 is the base; `lora-jax eval` writes `adapter` in place of `step`. `thought` holds the
reasoning before the answer, `probabilities` those of a classifier's labels.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.report import journal
from lora_jax.report.scores import METRICS, Answer


def to_line(answer: Answer) -> dict[str, Any]:
    """Return the fields of an answer that have a value."""
    line = {
        "where": answer.where,
        "prompt": answer.prompt,
        "references": list(answer.references),
        "answer": answer.answer,
        "thought": answer.thought,
        "probabilities": answer.probabilities and dict(answer.probabilities),
    }
    needed = ("prompt", "references", "answer")
    return {name: value for name, value in line.items() if value or name in needed}


def to_lines(
    about: Mapping[str, Any], answers: Iterable[Answer], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a line per answer: the fields of `about`, the answer, and its own metrics by name."""
    return [
        {**about, **to_line(answer), **{name: METRICS[name]([answer]) for name in names}}
        for answer in answers
    ]


def put(file: Path, step: int, answers: Sequence[Answer], names: Sequence[str]) -> None:
    """Write the answers of a step in the order of steps, replacing earlier ones of that step."""
    if not answers:
        return
    others = [line for line in journal.read_lines(file) if line["step"] != step]
    lines = [*others, *to_lines({"step": step}, answers, names)]
    lines.sort(key=lambda line: line["step"])
    journal.write_whole(file, journal.to_text(lines))
