"""Does it fit? A train step measured before there is a machine to run it on.

plan(config, topology="v5p:2x2x4")   # shapes, then the compiler; no weights, no data, no TPU

From shapes: program, analytic, roofline, search. From the compiler: compiled, hlo. Chips and their
slices: chips.
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
from lora_jax.plan.program import Program, build, open_shapes
from lora_jax.plan.roofline import count, find_bounds
from lora_jax.plan.search import Candidate, find_best, remedies
from lora_jax.train import warn
from lora_jax.train.setup import head_notes

_SHOWN = 10  # candidates of a search
_COMPILED = 3  # of these, for a topology


def plan_parameters(parameters: float, as_json: bool = False) -> None:
    """Print the worked figures of a model of so many parameters.

    Raises:
        UserError: a number that is not above 0.
    """
    if not 0 < parameters < float("inf"):
        raise UserError(f"--parameters {parameters} must be a number above 0")
    found = worked(parameters)
    print(json.dumps(report.as_json(found)) if as_json else report.worked_text(found))


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of a planned run: a TPU slice, or so many devices like those here."""

    topology: Topology | None
    devices: int
    here: bool  # they are the devices of this process

    @property
    def platform(self) -> str:
        return "tpu" if self.topology else jax.default_backend() if self.here else "cpu"

    @property
    def hbm(self) -> int | None:
        """Bytes that a device has for a program, where that is known."""
        if self.topology is not None:
            return self.topology.chip.hbm
        stats = jax.local_devices()[0].memory_stats() if self.here else None
        return (stats or {}).get("bytes_limit")

    def compile(self, config: Config, quick: bool) -> Compiled | Shortfall:
        if not self.here:
            return compile_for(config, self.topology or self.devices, quick)
        programs.keep()
        return compile_here(config, quick=quick)


def find_target(topology: str | None, devices: int | None) -> Target:
    """The machine that is planned for.

    Raises:
        UserError: an unknown topology; both or an impossible number of devices.
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


def plan(
    config: Config,
    topology: str | None = None,
    devices: int | None = None,
    quick: bool = False,
    compiles: bool = True,
    searches: bool = False,
    say: Callable[[str], Any] = print,
    working: Callable[[str], AbstractContextManager] = lambda text: nullcontext(),
) -> dict[str, Any]:
    """Measure the step of `config`; `say` gets the text piece by piece, and `working` is entered
    with the name of what takes a while. Returns all of it, as JSON has it.

    Raises:
        UserError: as a run would; an unknown topology; a mesh that does not fit it; libtpu missing.
    """
    target = find_target(topology, devices)
    settled, model = open_shapes(config)
    mesh = sharding.abstract_mesh(config.mesh, target.devices)
    program = build(settled, model, mesh)
    found = estimate(program, target.platform)
    full = full_fine_tuning(settled, model, mesh, target.platform)
    hbm = target.hbm
    notes = [*find_notes(program), *model.notes, *warn.of_config(config)]
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
    if compiles and not searches:
        with working(f"compiling for {target.topology.name if target.topology else 'here'}"):
            compiled = target.compile(config, quick)
        result["compiled"] = report.as_json(compiled)
        say(report.compiled_text(compiled, hbm))
    result |= _speed(program, target, found, compiled, say)
    needed = found.total if compiled is None else compiled.needed
    result["fits"] = None if hbm is None else needed <= hbm
    if result["fits"] is False:
        changes = remedies(settled, model, target.devices, target.platform, hbm or 0)
        result["remedies"] = report.as_json(changes)
        say(report.remedies_text(changes, hbm or 0))
    if searches:
        best = _search(config, settled, model, target, quick, compiles, working)
        result["search"] = best
        say(report.search_text(best, hbm))
    return result


def _speed(
    program: Program,
    target: Target,
    found: Any,
    compiled: Compiled | Shortfall | None,
    say: Callable[[str], Any],
) -> dict[str, Any]:
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
    quick: bool,
    compiles: bool,
    working: Callable[[str], AbstractContextManager],
) -> list[dict[str, Any]]:
    """The best settings, those of a topology with what the compiler says of the first few."""
    chip = target.topology.chip if target.topology else None
    found = find_best(settled, model, target.devices, target.platform, chip, target.hbm)[:_SHOWN]
    rows = [report.as_json(one) for one in found]
    if target.topology is not None and compiles:
        for row, one in list(zip(rows, found, strict=True))[:_COMPILED]:
            with working(f"compiling {' '.join(one.overrides) or 'what is given'}"):
                compiled = target.compile(_override(config, one), quick)
            row["compiled"] = report.as_json(compiled)
    return rows


def _override(config: Config, one: Candidate) -> Config:
    return configs.parse(dataclasses.asdict(config), one.overrides)


def find_notes(program: Program) -> Iterator[str]:
    """Find what the mesh cannot do for this model, though it is no mistake."""
    tensor = program.mesh.shape["tensor"]
    yield from head_notes(program.model, tensor)
    for path, leaf in tree.flatten(program.model.params).items():
        if path[-1] == "embedding" and tensor > 1 and leaf.shape[0] % tensor:
            yield (
                f"{tree.dotted(path)} {leaf.shape}: mesh.tensor={tensor} does not divide "
                f"{leaf.shape[0]}, so every device of that axis holds all of its rows"
            )
