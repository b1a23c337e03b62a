"""Memory and speed of a train step, planned without the machine that runs it.

plan(config, PlanOptions(topology="v5p:2x2x4"))   # shapes, then the compiler; no weights, no data

From shapes: program, analytic, roofline, search, members. From the compiler: compiled, hlo. Chips
and their slices: chips.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from lora_jax import config as configs
from lora_jax import programs, sharding, tree
from lora_jax.config import Config
from lora_jax.errors import UserError
from lora_jax.models.common import Model
from lora_jax.plan import report
from lora_jax.plan.analytic import estimate, full_fine_tuning, worked
from lora_jax.plan.chips import Topology, parse_topology
from lora_jax.plan.compiled import Compiled, Shortfall, compile_for, compile_here
from lora_jax.plan.members import find_members, members_text
from lora_jax.plan.program import Program, build, open_shapes
from lora_jax.plan.roofline import count, find_bounds
from lora_jax.plan.search import Candidate, find_best, remedies
from lora_jax.train import warn
from lora_jax.train.setup import head_notes

_SHOWN = 10  # candidates of a search
_COMPILED = 3  # of these, for a topology


def plan_parameters(parameters: float, as_json: bool = False) -> None:
    """Print the memory of a model with `parameters` weights, by training method.

    Raises:
        UserError: a number that is not above 0.
    """
    if not 0 < parameters < float("inf"):
        raise UserError(f"--parameters {parameters} must be a number above 0")
    found = worked(parameters)
    print(json.dumps(report.as_json(found)) if as_json else report.worked_text(found))


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of a planned run: a TPU slice, or a number of devices of this process's kind."""

    topology: Topology | None
    devices: int
    here: bool  # the devices of this process

    @property
    def platform(self) -> str:
        return "tpu" if self.topology else jax.default_backend() if self.here else "cpu"

    @property
    def hbm(self) -> int | None:
        """Bytes of memory that a device has for a program, if known."""
        if self.topology is not None:
            return self.topology.chip.hbm
        stats = jax.local_devices()[0].memory_stats() if self.here else None
        return (stats or {}).get("bytes_limit")

    def compile(self, config: Config, quick: bool) -> Compiled | Shortfall:
        """Compile the step of `config` for these devices."""
        if not self.here:
            return compile_for(config, self.topology or self.devices, quick)
        programs.keep()
        return compile_here(config, quick=quick)


def find_target(topology: str | None, devices: int | None) -> Target:
    """Return the devices to plan for; those of this process by default.

    Raises:
        UserError: an unknown topology; a number of devices below 1, or next to a topology.
    """
    if topology is not None and devices is not None:
        raise UserError("--topology says how many devices there are; leave --devices out")
    if topology is not None:
        slice_ = parse_topology(topology)
        return Target(slice_, slice_.devices, here=False)
    if devices is not None and devices < 1:
        raise UserError(f"--devices {devices} must be at least 1")
    here = devices is None
    return Target(None, len(jax.devices()) if devices is None else devices, here)


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Devices to plan for, and steps of a plan."""

    topology: str | None = None  # a TPU slice, such as v5p:2x2x4
    devices: int | None = None  # number of CPU devices; null: those of this process
    compiles: bool = True  # compile the step, besides the estimate from shapes
    quick: bool = False  # let the compiler optimise less
    searches: bool = False  # try meshes, micro-batches and remat policies
    members: int | None = None  # adapters that a sweep trains at once


def plan(
    config: Config,
    options: PlanOptions,
    say: Callable[[str], Any] = print,
    working: Callable[[str], AbstractContextManager] = lambda text: nullcontext(),
) -> dict[str, Any]:
    """Measure the memory and speed of the step of `config`.

    Args:
        config: the config of a run.
        options: devices, and what to measure.
        say: called with each part of the report as text.
        working: context manager for slow parts, called with their name, as for a spinner.

    Returns:
        The whole report as JSON values.

    Raises:
        UserError: as a run would; an unknown topology; a mesh that does not fit it; libtpu missing.
    """
    target = find_target(options.topology, options.devices)
    settled, model = open_shapes(config)
    config, settled, changed = _fitting(config, settled, model, target, options)
    mesh = sharding.abstract_mesh(config.mesh, target.devices)
    program, hbm = build(settled, model, mesh), target.hbm
    found = estimate(program, target.platform)
    full = full_fine_tuning(settled, model, mesh, target.platform)
    notes = [*changed, *find_notes(program), *model.notes, *warn.of_config(config)]
    result: dict[str, Any] = {
        "model": config.model,
        "topology": target.topology.name if target.topology else None,
        "devices": target.devices,
        "mesh": dict(mesh.shape),
        "hbm": hbm,
        "estimate": report.as_json(found),
        "full_fine_tuning": report.as_json(full),
        "notes": notes,
    }
    say(report.head_text(program, target.topology))
    say(report.estimate_text(found, full, hbm))
    for note in notes:
        say(f"note: {note}")
    compiled = None
    if options.compiles and not options.searches:
        with working(f"compiling for {target.topology.name if target.topology else 'here'}"):
            compiled = target.compile(config, options.quick)
        result["compiled"] = report.as_json(compiled)
        say(report.compiled_text(compiled, hbm))
    result |= _speed(program, target, found, compiled, say)
    result |= _members(program, target, options.members, say)
    needed = found.total if compiled is None else compiled.needed
    result["fits"] = None if hbm is None else needed <= hbm
    if result["fits"] is False:
        changes = remedies(settled, model, target.devices, target.platform, hbm or 0)
        result["remedies"] = report.as_json(changes)
        say(report.remedies_text(changes, hbm or 0))
    if options.searches:
        result["search"] = best = _search(config, settled, model, target, options, working)
        say(report.search_text(best, hbm))
    return result


def _fitting(
    config: Config, settled: Config, model: Model, target: Target, options: PlanOptions
) -> tuple[Config, Config, list[str]]:
    """Return the config and the settled config, and no note; in a search, where mesh and batch do
    not fit the devices, those of the best candidate, with a note that says so.
    """
    if not options.searches:
        return config, settled, []
    try:
        build(settled, model, sharding.abstract_mesh(config.mesh, target.devices))
        return config, settled, []
    except UserError as problem:
        best = _find_best(settled, model, target)
        if not best:
            raise
        given = " ".join(best[0].overrides)
        note = f"{problem} The plan is that of the best settings instead: {given}"
        return _override(config, best[0]), _override(settled, best[0]), [note]


def _find_best(settled: Config, model: Model, target: Target) -> list[Candidate]:
    chip = target.topology.chip if target.topology else None
    return find_best(settled, model, target.devices, target.platform, chip, target.hbm)


def _members(
    program: Program, target: Target, members: int | None, say: Callable[[str], Any]
) -> dict[str, Any]:
    """Report the members of a sweep, if there are any; return them as JSON values."""
    if members is None:
        return {}
    chip = target.topology.chip if target.topology else None
    own = find_members(program, target.platform, members, target.hbm, chip)
    say(members_text(own, target.hbm))
    return {"members": report.as_json(own)}


def _speed(
    program: Program,
    target: Target,
    found: Any,
    compiled: Compiled | Shortfall | None,
    say: Callable[[str], Any],
) -> dict[str, Any]:
    """Report operations and, for a topology, the roofline; return both as JSON values."""
    step = count(program)
    if target.topology is None:
        return {"step": report.as_json(step)}
    sent = None
    if isinstance(compiled, Compiled):
        sent = sum(one.bytes for one in compiled.collectives)
    bounds = find_bounds(program, target.topology.chip, found, sent)
    say(report.roofline_text(step, bounds))
    return {"step": report.as_json(step), "roofline": report.as_json(bounds)}


def _search(
    config: Config,
    settled: Config,
    model: Model,
    target: Target,
    options: PlanOptions,
    working: Callable[[str], AbstractContextManager],
) -> list[dict[str, Any]]:
    """Return the best settings; for a topology, the first few compiled."""
    found = _find_best(settled, model, target)[:_SHOWN]
    rows = [report.as_json(one) for one in found]
    if target.topology is not None and options.compiles:
        for row, one in list(zip(rows, found, strict=True))[:_COMPILED]:
            with working(f"compiling {' '.join(one.overrides) or 'the given config'}"):
                compiled = target.compile(_override(config, one), options.quick)
            row["compiled"] = report.as_json(compiled)
    return rows


def _override(config: Config, one: Candidate) -> Config:
    return configs.parse(dataclasses.asdict(config), one.overrides)


def find_notes(program: Program) -> Iterator[str]:
    """Yield notes on weights that the mesh cannot split; the run works all the same."""
    tensor = program.mesh.shape["tensor"]
    yield from head_notes(program.model, tensor)
    for path, leaf in tree.flatten(program.model.params).items():
        if path[-1] == "embedding" and tensor > 1 and leaf.shape[0] % tensor:
            yield (
                f"{tree.dotted(path)} {leaf.shape}: mesh.tensor={tensor} does not divide "
                f"{leaf.shape[0]}, so every device of that axis holds all rows"
            )
