"""Report page of `lora-jax plan --json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.report.page import charts
from lora_jax.report.page.parts import (
    Cell,
    Chart,
    Code,
    Facts,
    Note,
    Page,
    Part,
    Section,
    Table,
    cell,
    counted_text,
    is_number,
    number,
)

GIB = 1 << 30
_UNIT = "GiB on each device"
_ESTIMATE = {
    "base": "base",
    "weights": "copies of the base",
    "adapters": "adapters",
    "optimizer": "optimizer",
    "batch": "batch",
    "gradients": "gradients, old optimizer state",
    "kept": "activations kept",
    "layer": "backward pass of a layer",
    "logits": "logits of a chunk",
}
_COMPILED = {
    "arguments": "arguments",
    "outputs": "outputs",
    "aliased": "outputs that reuse arguments",
    "temporaries": "temporaries",
    "code": "code",
    "unread": "base weights that trained ones replace",
    "total": "total",
    "needed": "needed",
    "host": "on the host",
}


def make(file: Path, plan: Mapping[str, Any]) -> Page:
    """Return the page of a plan."""
    sections = [
        Section("Does it fit", _fits(plan)),
        Section("Memory from shapes", _estimate(plan)),
        Section("Memory from the compiler", _compiled(plan)),
        Section("Speed", _speed(plan)),
        Section("Members of a sweep", _members(plan)),
        Section("Other settings", _others(plan)),
    ]
    devices = plan.get("devices")
    where = plan.get("topology") or f"{number(devices)} device{'s' * (devices != 1)}"
    lead = f"{plan.get('model', '')} · {where} · {file.name}"
    return Page("Plan", lead, [one for one in sections if one.parts])


def _gib(value: Any) -> str | None:
    return f"{value / GIB:,.3f} GiB" if is_number(value) else None


def _fits(plan: Mapping[str, Any]) -> list[Part]:
    fits = plan.get("fits")
    parts: list[Part] = []
    if fits is None:
        parts.append(Note("The memory of the devices is not known."))
    elif fits:
        parts.append(Note("It fits."))
    else:
        parts.append(Note("It does not fit.", "error"))
    compiled, estimate = plan.get("compiled") or {}, plan.get("estimate") or {}
    mesh = ", ".join(f"{axis} {size}" for axis, size in (plan.get("mesh") or {}).items())
    facts = {
        "memory of a device": _gib(plan.get("hbm")),
        "needed by the compiler": _gib(compiled.get("needed")),
        "needed by the estimate": _gib(estimate.get("total")),
        "if all weights were trained": _gib((plan.get("full_fine_tuning") or {}).get("total")),
        "mesh": mesh,
    }
    parts += [Facts(facts), *(Note(str(text)) for text in plan.get("notes") or ())]
    return parts


def _estimate(plan: Mapping[str, Any]) -> list[Part]:
    found, hbm = plan["estimate"], plan.get("hbm")
    rows = [
        {"name": label, "value": found[name] / GIB}
        for name, label in _ESTIMATE.items()
        if is_number(found.get(name)) and found[name]
    ]
    total = found.get("total")
    if is_number(total):
        rows.append({"name": "total", "value": total / GIB})
    limit = hbm / GIB if is_number(hbm) else None
    caption = "The total has the larger of the backward pass of a layer and the logits."
    if limit is not None:
        caption += f" Dashed: the memory of a device, {limit:,.1f} GiB."
    return [Chart(charts.bars(rows, _UNIT, limit, "memory of a device"), caption)]


def _compiled(plan: Mapping[str, Any]) -> list[Part]:
    found = plan.get("compiled")
    if not found:
        return []
    parts: list[Part] = []
    if "message" in found:
        parts.append(Note("The compiler refuses the step.", "error"))
        parts.append(Code(str(found["message"])))
    rows = [
        [Cell(label), cell(found[name] / GIB)]
        for name, label in _COMPILED.items()
        if is_number(found.get(name))
    ]
    parts.append(Table(["", "GiB"], rows, frozenset((1,)), sorts=False))
    sent = [
        [
            Cell(str(one["kind"]), str(one["kind"])),
            cell(one["count"]),
            cell(one["bytes"] / 1e9),
            cell(one["largest"] / 1e6),
        ]
        for one in found.get("collectives") or ()
    ]
    if sent:
        columns = ["sent in a step", "times", "GB", "largest, MB"]
        parts.append(Table(columns, sent, frozenset((1, 2, 3))))
    return parts


def _speed(plan: Mapping[str, Any]) -> list[Part]:
    step, bounds = plan.get("step") or {}, plan.get("roofline") or {}
    if not step:
        return []
    tera = {name: step.get(name, 0) / 1e12 for name in ("model_flops", "flops")}
    facts: dict[str, Any] = {
        "tokens of a step": counted_text(step.get("tokens")),
        "operations": f"{number(tera['model_flops'])} TFLOP, "
        f"{number(tera['flops'])} with recomputation",
    }
    if not bounds:
        return [Facts(facts)]
    seconds = bounds["seconds"]
    facts |= {
        "a step takes at least": f"{seconds:.3f} s ({bounds['bound']})",
        "tokens per second, at most": counted_text(step["tokens"] / seconds) if seconds else None,
        "MFU, at most": f"{bounds['mfu']:.0%}",
    }
    rows = [{"name": name, "value": bounds[name]} for name in ("compute", "memory", "network")]
    caption = "Least time of a step at the peaks of the chip; the longest bar is the bound."
    return [Facts(facts), Chart(charts.bars(rows, "seconds"), caption)]


def _members(plan: Mapping[str, Any]) -> list[Part]:
    found = plan.get("members")
    if not found:
        return []
    facts = {
        "members": number(found.get("count")),
        "shared by all": _gib(found.get("shared")),
        "each": _gib(found.get("each")),
        "all": _gib(found.get("total")),
        "most members that fit": counted_text(found.get("largest")),
    }
    return [Facts(facts)]


def _others(plan: Mapping[str, Any]) -> list[Part]:
    parts: list[Part] = []
    for name, caption in (
        ("remedies", "Changes that need less memory, from shapes."),
        ("search", "The best of all meshes, micro-batches and remat policies."),
    ):
        rows = [
            [
                Cell(" ".join(one["overrides"]) or "as it is", " ".join(one["overrides"])),
                cell(one["total"] / GIB),
                _needed(one),
                cell(one.get("seconds")),
            ]
            for one in plan.get(name) or ()
        ]
        if rows:
            columns = ["overrides", "GiB, shapes", "GiB, compiled", "seconds of a step"]
            parts.append(Table(columns, rows, frozenset((1, 2, 3)), caption))
    return parts


def _needed(one: Mapping[str, Any]) -> Cell:
    needed = (one.get("compiled") or {}).get("needed")
    return cell(needed / GIB if is_number(needed) else None)
