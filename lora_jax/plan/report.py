"""A plan as text and as JSON."""

import dataclasses
from typing import Any

from lora_jax import tree
from lora_jax.errors import counted
from lora_jax.plan.analytic import Estimate, Worked
from lora_jax.plan.chips import GIB, Topology
from lora_jax.plan.compiled import Compiled, Shortfall
from lora_jax.plan.program import Program, stored_dtype
from lora_jax.plan.roofline import Roofline, Step
from lora_jax.plan.search import Candidate


def worked_text(found: Worked) -> str:
    """Return the memory of a model with so many parameters as text, in GB of 1e9 bytes."""
    rows = (
        (found.weights, "weights in 16 bits, as a frozen base"),
        (found.four_bits, "in 4 bits"),
        (found.nf4, "in NF4 with its constants, double quantisation (4.127 bits)"),
        (found.full, "full fine-tuning: weights, gradients and Adam, 12 bytes each"),
        (found.full_masters, "full fine-tuning with float32 masters, 16 bytes each"),
    )
    lines = [f"{found.parameters:,.0f} parameters, in GB of 1e9 bytes:"]
    return "\n".join([*lines, *(f"{number / 1e9:10,.1f}  {what}" for number, what in rows)])


def head_text(program: Program, topology: Topology | None) -> str:
    """Return two lines on the planned model, devices and batch."""
    config, mesh = program.config, program.mesh.shape
    where = topology.name if topology else counted(program.mesh.size, "device")
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    stored = config.base_dtype or f"{stored_dtype(config, program.model)}, as config.json says"
    micro = config.train.micro_batch_size
    batch = f"{config.train.batch_size} rows of {config.data.max_length:,} tokens a step"
    batch += f", {micro} at once" if micro else ""
    return (
        f"{config.model}: {tree.count(program.model.params):,} parameters ({stored}) on {where}: "
        f"{axes}\n{batch}, activations in {config.train.compute_dtype}, remat {config.train.remat}"
    )


def estimate_text(found: Estimate, full: Estimate, hbm: int | None) -> str:
    """Return the table of the estimate from shapes, in GiB on each device."""
    rows = [
        ("base", found.base),
        ("adapters", found.adapters),
        ("optimizer", found.optimizer),
        ("batch", found.batch),
        ("gradients, and the old optimizer state", found.gradients),
        ("activations kept for the backward pass", found.kept),
        ("activations of one layer's backward pass", found.layer),
        ("logits of a chunk, with temporaries of the loss", found.logits),
    ]
    rows += [("copies of the base", found.weights)] if found.weights else []
    lines = ["", "from shapes alone, GiB on each device:"]
    lines += [f"  {_gib(number)}  {name}" for name, number in rows]
    lines += [f"  {_gib(found.total)}  total (with the larger of layer and logits)"]
    lines += [f"  {_gib(full.total)}  total if every weight were trained (method=full)"]
    if hbm is not None:
        lines += [f"  {_gib(hbm)}  available"]
    return "\n".join(lines)


def compiled_text(found: Compiled | Shortfall, hbm: int | None) -> str:
    """Return the table of the compiler's figures, in GiB on each device."""
    if isinstance(found, Shortfall):
        return (
            f"\ndoes not fit: {_gib(found.needed).strip()} GiB needed on each device, "
            f"{_gib(found.available).strip()} GiB there; {found.missing:,} bytes too many\n"
            f"  {found.message}"
        )
    rows = [
        ("arguments", found.arguments),
        ("outputs", found.outputs),
        ("outputs that reuse arguments", -found.aliased),
        ("temporaries", found.temporaries),
        ("code", found.code),
    ]
    lines = ["", f"compiled in {found.seconds:.0f} s, GiB on each device:"]
    lines += [f"  {_gib(number)}  {name}" for name, number in rows]
    if found.unread:
        lines += [f"  {_gib(found.unread)}  base weights that trained ones replace"]
    lines += [f"  {_gib(found.total)}  total"]
    if found.peak is not None:
        lines += [f"  {_gib(found.needed)}  needed: the most in use at once"]
    if found.host:
        lines += [f"  {_gib(found.host)}  on the host"]
    if hbm is not None:
        lines += [f"  {_gib(hbm - found.needed)}  left of {_gib(hbm).strip()}"]
    if found.collectives:
        lines += ["", "sent by each device in a step:"]
        lines += [
            f"  {one.bytes / 1e9:8.3f} GB  {one.kind}, {one.count:,} times, the largest "
            f"{one.largest / 1e6:,.1f} MB"
            for one in found.collectives
        ]
    return "\n".join(lines)


def roofline_text(step: Step, found: Roofline) -> str:
    """Return the lines on operations and the least time of a step."""
    return (
        f"\n{step.model_flops / 1e12:,.1f} TFLOP a step, {step.flops / 1e12:,.1f} with "
        f"recomputation\nfrom shapes, each device sends {step.gathered / 1e9:,.3f} GB of weights "
        f"and {step.reduced / 1e9:,.3f} GB of activations and gradients\nat "
        f"the chip's peaks: compute {found.compute:.3f} s, memory "
        f"{found.memory:.3f} s, network {found.network:.3f} s\n"
        f"a step takes {found.seconds:.3f} s at least ({found.bound}): "
        f"{step.tokens / found.seconds:,.0f} tokens/s, MFU {found.mfu:.0%} at most"
    )


def remedies_text(changes: list[Candidate], hbm: int) -> str:
    """Return the list of changes that need less memory, from shapes."""
    if not changes:
        return "\nno change of mesh, micro-batch, remat or dtype of the base needs less memory"
    lines = ["", "needs less, GiB on each device, from shapes:"]
    for one in changes:
        fits = "fits" if one.total <= hbm else "does not fit either"
        lines += [f"  {_gib(one.total)}  {' '.join(one.overrides)}  ({fits})"]
    return "\n".join(lines)


def search_text(rows: list[dict[str, Any]], hbm: int | None) -> str:
    """Return the table of the best settings as overrides, the best first."""
    if not rows:
        return "\nno mesh, micro-batch or remat policy fits, from shapes"
    lines = ["", "the best of all meshes, micro-batches and remat policies:"]
    lines += ["   shapes   compiled  s/step", "      GiB        GiB"]
    for row in rows:
        compiled = row.get("compiled", {})
        needed = compiled.get("needed")
        measured = "        -" if needed is None else _gib(needed)
        speed = "      -" if row["seconds"] is None else f"{row['seconds']:7.3f}"
        over = "  DOES NOT FIT" if hbm and needed is not None and needed > hbm else ""
        text = " ".join(row["overrides"]) or "as it is"
        lines += [f"{_gib(row['total'])}  {measured} {speed}  {text}{over}"]
    return "\n".join(lines)


def _gib(number: float) -> str:
    return f"{number / GIB:9.3f}"


def as_json(part: Any) -> Any:
    """Return nested dataclasses as JSON values, with their properties."""
    if dataclasses.is_dataclass(part):
        fields = {f.name: as_json(getattr(part, f.name)) for f in dataclasses.fields(part)}
        worked = [name for name, own in vars(type(part)).items() if isinstance(own, property)]
        return fields | {name: getattr(part, name) for name in worked}
    if isinstance(part, list | tuple):
        return [as_json(one) for one in part]
    return part
