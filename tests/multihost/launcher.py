"""Runs of `lora-jax train` on several hosts: processes of this machine, without the seconds of
imports of each.

Reads a JSON object per line: `hosts`, their number; `arguments` of the command; `logs`, a
directory; perhaps `own`, further arguments of a host by its number; `absent`, hosts that do not
start; `harm`: [host, step or "data", signal] or [host, "data"]. Forks the hosts, which write
host-N.txt and, at their end, host-N.json into the logs, and answers with their statuses. Hosts that
outlive the first that failed by a minute are ended, and have the status "hung".
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import orbax.checkpoint  # noqa: F401 - what a run imports, before the fork
from transformers import AutoTokenizer, LlamaConfig  # noqa: F401

from lora_jax import data
from lora_jax.cli import train_main
from lora_jax.errors import UserError
from lora_jax.formats import tensors
from lora_jax.train import loop, setup, trainer

COUNTS = {"weights": 0, "rows": 0}


class Slice:
    """A tensor's slice that counts the bytes that are read through it."""

    def __init__(self, inner):
        self.inner = inner

    def __getitem__(self, index):
        found = self.inner[index]
        COUNTS["weights"] += found.nbytes
        return found

    def __getattr__(self, name):
        return getattr(self.inner, name)


class File:
    """An open safetensors file that gives such slices."""

    def __init__(self, inner):
        self.inner = inner

    def get_slice(self, name):
        return Slice(self.inner.get_slice(name))

    def __getattr__(self, name):
        return getattr(self.inner, name)


def count():
    """Count bytes of weights and rows of training data that this process reads."""
    opened, row = tensors.open_tensors, data.Loader.row

    @contextlib.contextmanager
    def open_tensors(file):
        with opened(file) as handle:
            yield File(handle)

    def counted(self, number):
        COUNTS["rows"] += 1
        return row(self, number)

    tensors.open_tensors, data.Loader.row = open_tensors, counted


def harm(_, what, number=None):
    """Send this process a signal after a step, or where it reads data, or let it find damaged
    data.
    """
    if what == "data":

        def damaged(*_):
            if number is not None:
                os.kill(os.getpid(), getattr(signal, number))
            raise UserError("rows.jsonl is damaged on this host")

        loop.sets.read_sets = damaged
        return
    take_step = trainer._Trainer.take_step

    def then_signal(self):
        line = take_step(self)
        if self.state.step == what:
            self.kept.wait()  # how much is saved depends on the step alone
            os.kill(os.getpid(), getattr(signal, number))
            time.sleep(0.05)
        return line

    trainer._Trainer.take_step = then_signal


def run(host, job, port):
    """One host, in its own process."""
    logs = Path(job["logs"])
    log = os.open(logs / f"host-{host}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["hosts"] > 1:
        os.environ |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(job["hosts"]),
            "JAX_PROCESS_ID": str(host),
        }
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(logs.parent / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    setup._SHARED = 2.0
    count()
    if job.get("harm", [None])[0] == host:
        harm(*job["harm"])
    status = train_main([*job["arguments"], *job.get("own", {}).get(str(host), ())])
    (logs / f"host-{host}.json").write_text(json.dumps(COUNTS))
    sys.exit(status)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def collect(pids):
    """The statuses of the processes, hosts by process id, in the order of the hosts."""
    statuses, until, failed = {}, time.monotonic() + 900, False
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            host = pids.pop(pid)
            statuses[host] = os.waitstatus_to_exitcode(status)
            if statuses[host] and not failed:
                until, failed = time.monotonic() + 60, True
        elif time.monotonic() > until:
            for pid, host in pids.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[host] = "hung"
            pids = {}
        else:
            time.sleep(0.05)
    return [statuses[host] for host in sorted(statuses)]


def main():
    for line in sys.stdin:
        job, port = json.loads(line), free_port()
        pids = {}
        for host in range(job["hosts"]):
            if host not in job.get("absent", ()):
                pid = os.fork()
                if pid == 0:
                    run(host, job, port)
                pids[pid] = host
        print(json.dumps(collect(pids)), flush=True)


if __name__ == "__main__":
    main()
