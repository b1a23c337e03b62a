"""Advice as text, as JSON, and as the space of a sweep."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.audit import rules
from lora_jax.audit.advise import Advice, Line
from lora_jax.audit.facts import describe_facts
from lora_jax.errors import UserError, nearest

FIRST_CHECKS = ("rate", "rank")
_WIDTH = 100
_LONGEST = 24  # characters of a value in the table


def advice_text(advice: Advice) -> str:
    """Return a table of your values next to the advised ones, and a paragraph for each."""
    header = ("setting", "yours", "advice", "range", "")
    rows = [
        header,
        *(
            (line.setting, _short(line.yours), _short(line.advice), line.range, line.verdict)
            for line in advice.lines
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    parts = [*describe_facts(advice.facts, advice.config), "", *table]
    parts += [
        f"{name}={value}: the same rows in the advised batch" for name, value in advice.held.items()
    ]
    for line in advice.lines:
        parts += ["", f"{line.setting}: {_short(line.advice)}", *_paragraph(line)]
    named = [name for name in rules.SOURCES if any(name in line.sources for line in advice.lines)]
    parts += ["", *(f"{name}: {rules.SOURCES[name]}" for name in named)]
    return "\n".join([*parts, "", *_endings(advice)])


def _paragraph(line: Line) -> list[str]:
    check = "nothing to sweep: the form of the rows decides"
    if line.axis:
        axes = "; ".join(f"{key}: {_yaml(value)}" for key, value in line.axis.items())
        check = f"--check {line.name}: {axes}"
    source = ", ".join(line.sources) or "the data"
    told = {"why": f"{line.reason}.", "source": source, "check": check}
    return [
        text
        for label, content in told.items()
        for text in textwrap.wrap(
            content,
            _WIDTH,
            initial_indent=f"  {label:<8}",
            subsequent_indent=" " * 10,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def _endings(advice: Advice) -> list[str]:
    """Return the lines below all paragraphs."""
    text = (
        "These are starting points. --space FILE writes a space for `lora-jax sweep` that checks "
        f"rate and rank on your task, or with --check another of {', '.join(advice.checks)}."
    )
    lines = textwrap.wrap(text, _WIDTH, break_on_hyphens=False)
    if advice.config.adapter.path is not None:
        lines.insert(0, "The adapter of adapter.path keeps its rank, alpha and targets.")
    return lines


def _short(value: Any) -> str:
    text = _yaml(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 2]}.."


def _yaml(value: Any) -> str:
    """Return a value as a space file has it, rates in short form."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return rules.numeral(value) if 0 < value < 0.01 else f"{value:g}"
    if isinstance(value, str) and not value.replace("-", "").replace("_", "").isalnum():
        return "'" + value.replace("'", "''") + "'"
    return str(value)


def as_json(advice: Advice, space: str) -> dict[str, Any]:
    """Return the advice as values for JSON, with the text of a space."""
    facts = {
        field.name: getattr(advice.facts, field.name)
        for field in dataclasses.fields(advice.facts)
        if field.name != "groups"
    }
    groups = {f"per_rank_{name}": count for name, (count, _) in advice.facts.groups.items()}
    lines = [dataclasses.asdict(line) | {"verdict": line.verdict} for line in advice.lines]
    return {
        "facts": facts | groups,
        "advice": lines,
        "also": dict(advice.held),
        "sources": rules.SOURCES,
        "space": space,
    }


def space_text(advice: Advice, checks: Sequence[str] = ()) -> str:
    """Return a space file of some checks, of rate and rank by default. Other settings in which the
    config differs from the advice have the advised value; the other checks are comments.

    Raises:
        UserError: a check that this config does not have; two checks of one setting.
    """
    chosen = [*dict.fromkeys(checks)] or [name for name in FIRST_CHECKS if name in advice.checks]
    axes = _join(advice, chosen)
    swept = _settings(axes)
    fixed = {
        line.setting: line.advice
        for line in advice.lines
        if line.setting not in swept and line.verdict != "same"
    }
    fixed |= {name: value for name, value in advice.held.items() if name not in swept}
    lines = [
        f"# Checks {' and '.join(chosen)} of advice for {advice.config.model}:",
        "#   lora-jax sweep --config CONFIG --space THIS_FILE",
        "sampler: grid",
        "# halving: {first_step: 25, factor: 2}   # saves half of the time, and favours high rates",
        "space:",
        *_axis_lines(axes),
        "  # seed: [0, 1, 2]   # a difference below that between seeds means nothing",
    ]
    if fixed:
        lines += ["  # as advised; the config has other values"]
        lines += _axis_lines({name: [value] for name, value in fixed.items()})
    for name, axis in advice.checks.items():
        if name not in chosen:
            lines += [f"  # --check {name}"]
            lines += [f"  # {line.removeprefix('  ')}" for line in _axis_lines(axis)]
    return "\n".join(lines) + "\n"


def _join(advice: Advice, names: Sequence[str]) -> dict[str, Any]:
    """Return the axes of some checks."""
    for name in names:
        if name not in advice.checks:
            raise UserError(
                f"--check {name}: this config leaves nothing to check there; it has: "
                f"{', '.join(advice.checks)}.{nearest(name, advice.checks)}"
            )
    axes: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for name in names:
        for setting in _settings(advice.checks[name]):
            if setting in owners:
                raise UserError(
                    f"--check {owners[setting]} and --check {name} both vary {setting}: write two "
                    "spaces, and sweep one after the other"
                )
            owners[setting] = name
        axes |= advice.checks[name]
    return axes


def _settings(axes: Mapping[str, Any]) -> list[str]:
    """Return the settings that axes vary."""
    return [
        setting
        for name, values in axes.items()
        for setting in (values[0] if isinstance(values[0], Mapping) else [name])
    ]


def _axis_lines(axes: Mapping[str, Any]) -> list[str]:
    """Return axes as lines of a space file."""
    lines = []
    for name, values in axes.items():
        if isinstance(values[0], Mapping):
            lines += [f"  {name}:", *(f"    - {_yaml(one)}" for one in values)]
        else:
            lines.append(f"  {name}: {_yaml(values)}")
    return lines
