"""One run on several hosts: they connect, agree and end together. One process needs none of this.

    with joined(config.hosts):          # jax.distributed, before any device is used
        record = from_main(read)        # one host reads, all get the result
        stop = agree(signal_here)       # all hosts act alike

The same command runs on every host. JAX_COORDINATOR_ADDRESS (host:port of process 0),
JAX_NUM_PROCESSES and JAX_PROCESS_ID identify the hosts. `jax.distributed.initialize` finds unset
ones from Slurm, Open MPI or the TPU pod. A process is called a host here, even if one machine has
several. Only host 0, the main one, logs and writes.

A host that fails reports the reason through the coordinator, and the others end with its status. If
a host is lost, JAX ends the others after `lost_after` seconds.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lora_jax import programs
from lora_jax.config import HostsConfig
from lora_jax.errors import UserError

T = TypeVar("T")
_GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LONG = 7 * 24 * 3600 * 1000  # milliseconds; the loss of a host ends the wait earlier
_POLL = 1.0  # seconds between checks for the failure of another host
_GRACE = 5.0  # seconds for this host to end by itself, often for the same reason
_PARTING = 10  # seconds to wait for the others at the end of a run that failed
_numbers = itertools.count()  # of names that are used once; the same on every host
_failed = False  # a run on several hosts has ended here with an error


@contextlib.contextmanager
def joined(settings: HostsConfig) -> Iterator[None]:
    """Connect the processes that the environment names until the block ends: `jax.devices()` are
    those of all. An error that leaves the block on one host ends the others; otherwise all leave it
    together. With one process, do nothing.

    Raises:
        UserError: the environment is incomplete or contradictory; not all hosts connected in time.
    """
    global _failed
    if not jax.distributed.is_initialized():
        if (given := find_cluster(os.environ)) is None:
            yield
            return
        try:
            _meet(given, settings)
        except UserError:
            _failed = True
            raise
    if jax.process_count() == 1:
        yield
        return
    programs.stop()  # hosts with different cached programs would wait for one another
    number, over = next(_numbers), threading.Event()
    place = f"lora_jax/{number}"
    watcher = threading.Thread(target=_watch, args=(place, over), daemon=True)
    watcher.start()
    try:
        yield
        _client().wait_at_barrier(f"{place}/end", _LONG)
    except BaseException as error:
        _failed = True
        over.set()
        _tell(place, error)
        _part(place)
        raise
    finally:
        over.set()
        watcher.join(2 * _POLL)


def find_cluster(environment: Any) -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize` from `environment`, without those that
    JAX finds itself; None for a single process.

    Raises:
        UserError: variables are missing or contradictory.
    """
    given = {name: environment[name] for name in _GIVEN if environment.get(name)}
    numbers: dict[str, int] = {}
    for name in _GIVEN[1:]:
        if name in given:
            if not given[name].isdecimal():
                raise UserError(f"{name}={given[name]!r} must be a whole number")
            numbers[name] = int(given[name])
    count = numbers.get("JAX_NUM_PROCESSES")
    size = _cluster_size(environment) if count is None else count
    missing = [name for name in _GIVEN if name not in given]
    if size is None and given:
        raise UserError(
            f"{', '.join(given)} without {', '.join(missing)}: several processes need all three "
            "(host:port of process 0, their number, and the number of this one from 0)"
        )
    if size in (None, 1):
        return None
    if count is not None and missing and _cluster_size(environment) is None:
        raise UserError(
            f"JAX_NUM_PROCESSES={count} without {', '.join(missing)}: several processes need all "
            "three (host:port of process 0, their number, and the number of this one from 0)"
        )
    if not 0 <= numbers.get("JAX_PROCESS_ID", 0) < size:
        raise UserError(
            f"JAX_PROCESS_ID={numbers['JAX_PROCESS_ID']} must be from 0 to {size - 1}: there are "
            f"{size} processes"
        )
    address = given.get("JAX_COORDINATOR_ADDRESS")
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address!r} must be host:port")
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": numbers.get("JAX_PROCESS_ID"),
        # With all three, neither Slurm nor Open MPI is asked which devices are this process's.
        "cluster_detection_method": None if missing else "deactivate",
    }


def _cluster_size(environment: Any) -> int | None:
    """Return the number of processes that the launcher has started, as far as JAX knows; None
    without a launcher. A Cloud TPU machine that does not name its neighbours counts as 2, and JAX
    then queries them.
    """
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= set(environment):
        return int(environment.get("SLURM_NTASKS", 1))
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return int(environment.get("OMPI_COMM_WORLD_SIZE", 1))
    platforms = environment.get("JAX_PLATFORMS") or "tpu"
    if environment.get("TPU_ML_PLATFORM") == "JAX" and "tpu" in platforms:  # set by `import jax`
        for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
            if name in environment:
                slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
                return slices * len(environment[name].split(","))
        return 2
    return None


def _meet(given: dict[str, Any], settings: HostsConfig) -> None:
    """Wait for all processes. JAX ends the process when the time is over, so another thread does
    the waiting, and this one raises an error instead.
    """
    problem: list[Exception] = []
    # Python handles SIGTERM (`train.interrupt`); JAX's own handler would take its place.
    jax.config.update("jax_enable_preemption_service", False)

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                **given,
                initialization_timeout=settings.start_timeout + 600,
                heartbeat_timeout_seconds=settings.lost_after,
                shutdown_timeout_seconds=settings.lost_after,
            )
        except Exception as error:  # of many kinds
            problem.append(error)

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(settings.start_timeout)
    if thread.is_alive():
        raise UserError(_nobody_came(given, settings.start_timeout))
    if problem:
        reason = str(problem[0]).splitlines()[0]
        raise UserError(f"the processes of this run cannot meet: {reason}") from problem[0]
    if _tasks_here(os.environ) == 1 and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # Under Slurm and Open MPI, JAX gives each process one GPU; a single process has them all.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")


def _nobody_came(given: dict[str, Any], seconds: float) -> str:
    from jax._src.distributed import global_state  # what JAX found itself

    address = given["coordinator_address"] or global_state.coordinator_address
    if address is None:
        return f"no coordinator was found within {seconds} s (hosts.start_timeout)"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError as error:
        return (
            f"the coordinator {address} cannot be reached: {error.strerror or error} (tried for "
            f"{seconds} s, hosts.start_timeout). Process 0 must run there, and the port be open"
        )
    count = given["num_processes"] or global_state.num_processes
    return (
        f"the coordinator {address} is there, but not all {count} processes came within {seconds} "
        "s (hosts.start_timeout). The same command must run on every host, each with its own "
        "JAX_PROCESS_ID"
    )


def _tasks_here(environment: Any) -> int | None:
    """Return the launcher's number of processes on this machine, if set."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE")  # 8(x2), or 8,4 where nodes differ
    if text is not None and text.partition("(")[0].isdecimal():
        return int(text.partition("(")[0])
    local = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    return None if local is None else int(local)


def is_main() -> bool:
    """Return True for the process that logs and writes."""
    return jax.process_index() == 0


@functools.cache
def note(text: str) -> None:
    """Log `note: text` on the main host, once in a process; the standard library shows it on
    stderr.
    """
    if not jax.distributed.is_initialized() or is_main():
        logging.getLogger("lora_jax").warning("note: %s", text)


def agree(number: int) -> int:
    """Return the largest `number` of all hosts, which must all call this together."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def from_main(make: Callable[[], T]) -> T:
    """Return the result of `make` on the main host to every host; the others do not call it.

    The result must be JSON. Facts about files are read this way, so that all hosts see the same
    state.
    """
    if jax.process_count() == 1:
        return make()
    key = f"lora_jax/{next(_numbers)}"
    if is_main():
        text = json.dumps(make())
        _client().key_value_set(key, text)
    else:
        text = _client().blocking_key_value_get(key, _LONG)
    return json.loads(text)


def leave(status: int) -> None:
    """End this process with `status` if a run on several hosts has failed in it; otherwise do
    nothing. At a normal exit JAX would wait for the other hosts, which are gone.
    """
    if _failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def failed() -> bool:
    """Return True if a run on several hosts has ended here with an error."""
    return _failed


def _client() -> Any:
    """Return JAX's client of the coordinator; only Orbax has a public name for it."""
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


def _tell(place: str, error: BaseException) -> None:
    """Send the error of this host to the others; of several that fail, the first one counts."""
    failure = {
        "host": jax.process_index(),
        "status": getattr(error, "status", 2 if isinstance(error, UserError) else 1),
        "message": str(error) or type(error).__name__,
    }
    with contextlib.suppress(Exception):  # sent already, or the coordinator is gone
        _client().key_value_set(f"{place}/failed", json.dumps(failure))


def _part(place: str) -> None:
    """Wait for the others for a while: if the coordinator ends first, JAX ends them."""
    with contextlib.suppress(Exception):  # one of them is gone
        _client().wait_at_barrier(f"{place}/parting", _PARTING * 1000)
    if is_main():
        time.sleep(1)


def _watch(place: str, over: threading.Event) -> None:
    """End this process when another host has failed. The main thread may wait for that host inside
    a compiled program, where no exception reaches it.
    """
    while not over.wait(_POLL):
        try:
            failure = json.loads(_client().key_value_try_get(f"{place}/failed"))
        except Exception:  # none has; or the coordinator is gone, and JAX ends this process
            continue
        if over.wait(_GRACE):
            return
        text = f"host {failure['host']} ended the run: {failure['message']}"
        print(text, file=sys.stderr, flush=True)
        _part(place)
        sys.stdout.flush()
        os._exit(failure["status"])
