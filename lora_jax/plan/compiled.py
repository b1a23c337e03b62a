"""The train step compiled, for the devices here or for a TPU slice elsewhere; nothing is run.

For a slice, the compiler has a process of its own (`python -m lora_jax.plan.compiled`): libtpu
reads its environment when JAX starts, and may end the process that loads it.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_jax import config as configs
from lora_jax import programs
from lora_jax.config import Config
from lora_jax.errors import UserError
from lora_jax.plan.chips import Topology, parse_topology
from lora_jax.plan.hlo import Collective, collectives


@dataclass(frozen=True)
class Compiled:
    """The compiler's figures: bytes on each device, and data sent between devices."""

    arguments: int
    outputs: int
    aliased: int  # bytes of outputs that reuse the memory of arguments
    temporaries: int
    code: int
    peak: int | None  # most memory in use at once; None if the compiler does not report it
    host: int  # in host memory
    unread: int  # base weights that the step does not read: in memory, but not arguments
    collectives: list[Collective]
    seconds: float  # that the compiler took

    @property
    def total(self) -> int:
        own = self.arguments + self.outputs - self.aliased + self.temporaries + self.code
        return own + self.unread

    @property
    def needed(self) -> int:
        """Memory that a device needs: the peak, if known. `total` is larger, as it counts buffers
        passed from one loop to the next twice.
        """
        return self.total if self.peak is None else self.peak + self.unread


@dataclass(frozen=True)
class Shortfall:
    """A step that the compiler refuses, because it needs more memory than a device has."""

    needed: int  # bytes on each device
    available: int
    message: str  # by the compiler

    @property
    def missing(self) -> int:
        return self.needed - self.available


def compile_here(config: Config, devices: Any = None, quick: bool = False) -> Compiled | Shortfall:
    """Compile the step of `config` for `devices`, by default those of this process.

    Raises:
        UserError: as a run would; a mesh that does not fit the devices.
    """
    import jax

    from lora_jax import sharding
    from lora_jax.plan import program

    config, model = program.open_shapes(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    built = program.build(config, model, mesh)
    unread = program.device_bytes(built.unread)
    lowered = built.lower()
    started = time.monotonic()
    try:
        with _settings(quick):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = read_shortfall(str(error), unread)
        if found is None:
            raise
        return found
    stats = compiled.memory_analysis()
    return Compiled(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        # The CPU backend leaves temporaries out of its peak.
        peak=stats.peak_memory_in_bytes if mesh.devices.flat[0].platform == "tpu" else None,
        host=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
        unread=unread,
        collectives=collectives(compiled.as_text(), mesh.size),
        seconds=time.monotonic() - started,
    )


@contextlib.contextmanager
def _settings(quick: bool) -> Iterator[None]:
    """Set the compiler to optimise less if `quick`; sizes stay close, and the program is slower."""
    import jax

    before = jax.config.values["jax_optimization_level"]
    try:
        if quick:
            jax.config.update("jax_optimization_level", "O0")
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def find_libtpu() -> Path:
    """Return the library of the installed package libtpu.

    Raises:
        UserError: libtpu is not installed, or its version does not fit the installed jax.
    """
    wanted = wanted_libtpu()
    advice = f"pip install 'libtpu{wanted or ''}'"
    spec = importlib.util.find_spec("libtpu")
    library = Path(spec.origin or "").parent / "libtpu.so" if spec is not None else None
    jax_version = importlib.metadata.version("jax")
    if library is None or not library.is_file():
        raise UserError(
            "compiling for a TPU topology needs libtpu, which is not installed; with jax "
            f"{jax_version}: {advice}"
        )
    version = importlib.metadata.version("libtpu")
    if wanted is not None and not _matches(version, wanted):
        raise UserError(
            f"libtpu {version} does not fit jax {jax_version}, which needs libtpu{wanted}: {advice}"
        )
    return library


def wanted_libtpu() -> str | None:
    """Return the libtpu version that the installed jax needs (extra `tpu`), as `==0.0.42.*`."""
    for requirement in importlib.metadata.requires("jax") or ():
        found = re.match(r"libtpu\s*([=<>!~][^;\s]*)", requirement)
        if found is not None:
            return found[1]
    return None


def _matches(version: str, wanted: str) -> bool:
    exact = re.fullmatch(r"==([\d.]+?)(\.\*)?", wanted)
    if exact is None:
        return True  # a range: jax itself refuses a version that it cannot use
    prefix = exact[1].split(".")
    parts = version.split(".")
    return parts[: len(prefix)] == prefix if exact[2] else version == exact[1]


def compile_for(
    config: Config, target: Topology | int, quick: bool = False
) -> Compiled | Shortfall:
    """Compile the step of `config` in another process for a TPU slice, or a number of CPU devices,
    which need not exist here.

    Raises:
        UserError: libtpu is missing or does not fit this jax; as a run would.
        RuntimeError: the compiler failed for another reason.
    """
    if isinstance(target, Topology):
        where, environment = target.name, _for_tpu(find_libtpu())
    else:
        where, environment = (
            target,
            {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={target}",
            },
        )
    job = {"config": configs.dump(config), "target": where, "quick": quick}
    child = subprocess.run(
        [sys.executable, "-m", "lora_jax.plan.compiled"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    lines = child.stdout.splitlines()
    result = json.loads(lines[-1]) if child.returncode == 0 and lines else {}
    match result:
        case {"compiled": found}:
            sent = [Collective(**one) for one in found.pop("collectives")]
            return Compiled(**found, collectives=sent)
        case {"shortfall": found}:
            return Shortfall(**found)
        case {"mistake": message}:
            raise UserError(message)
    tail = "\n".join(child.stderr.splitlines()[-30:])
    raise RuntimeError(f"the compiler for {where} ended with status {child.returncode}:\n{tail}")


def _for_tpu(library: Path) -> dict[str, str]:
    """Return environment variables that let libtpu compile on a machine without a TPU."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_LIBRARY_PATH": str(library),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # ignored: the topology names the chip
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is opened, so there is nothing to lock
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }


def read_shortfall(message: str, unread: int) -> Shortfall | None:
    """Read the sizes in a compiler's out-of-memory message; None for another message.

    The compiler's figure includes arguments, even where the message says temporaries; `unread`
    bytes are added to it.
    """
    size = r"([\d.]+[KMGT]?)"
    found = re.search(rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)", message)
    found = found or re.search(rf"Used {size} of {size} hbm", message)
    if found is None:
        return None
    line = next((line for line in message.splitlines() if found[0] in line), message)
    needed = _read_bytes(found[1]) + unread
    return Shortfall(needed, _read_bytes(found[2]), line.strip())


def _read_bytes(text: str) -> int:
    """Return a size such as `15.75G` in bytes."""
    power = " KMGT".find(text[-1])
    return round(float(text[:-1]) * 1024**power) if power > 0 else round(float(text))


def _child() -> None:
    """Read a job from stdin, and write the result to stdout as the last line, in JSON."""
    job = json.load(sys.stdin)
    config = configs.parse(yaml.safe_load(job["config"]))
    programs.keep()
    try:
        result = _run_job(config, job["target"], job["quick"])
    except UserError as error:
        result = {"mistake": str(error)}
    print(json.dumps(result), flush=True)


def _run_job(config: Config, target: str | int, quick: bool) -> dict[str, Any]:
    import jax
    from jax.experimental import topologies

    if isinstance(target, int):
        devices: Any = jax.devices()
    else:
        topology = parse_topology(target)
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **topology.options
        ).devices
    found = compile_here(config, devices, quick)
    kind = "compiled" if isinstance(found, Compiled) else "shortfall"
    return {kind: dataclasses.asdict(found)}


if __name__ == "__main__":
    _child()
