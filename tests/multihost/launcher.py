"""Runs of `lora-jax train` on several hosts: processes of this machine, without the seconds of
imports of each.

Reads a JSON object per line: `hosts`, their number; `arguments` of the command; `logs`, a directory;
`environment`, a mapping; `harm`, [host, step, signal] or [host, "read"]. Forks the hosts, which
write host-N.txt and, at their end, host-N.json there, and answers with their statuses and seconds.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import orbax.checkpoint  # noqa: F401 - what a run imports, before the fork
from transformers import AutoTokenizer, LlamaConfig  # noqa: F401

from lora_jax import data
from lora_jax.cli import train_main
from lora_jax.config import UserError
from lora_jax.formats import safetensors
from lora_jax.train import loop, trainer

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
    opened, row = safetensors.open_tensors, data.Loader.row

    @contextlib.contextmanager
    def open_tensors(file):
        with opened(file) as handle:
            yield File(handle)

    def counted(self, number):
        COUNTS["rows"] += 1
        return row(self, number)

    safetensors.open_tensors, data.Loader.row = open_tensors, counted


def harm(host, what, number=None):
    """Send this process a signal after a step, or let it find damaged data."""
    if what == "read":

        def damaged(*_):
            raise UserError("rows.jsonl is damaged on this host")

        loop.sets.read_sets = damaged
        return
    take_step = trainer._Trainer.take_step

    def then_signal(self):
        line = take_step(self)
        if self.state.step == what:
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
    import jax

    for name, value in job.get("jax", {}).items():
        jax.config.update(name, value)
    count()
    if job.get("harm") and job["harm"][0] == host:
        harm(*job["harm"])
    status = train_main(job["arguments"])
    (logs / f"host-{host}.json").write_text(json.dumps(COUNTS))
    sys.exit(status)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def main():
    for line in sys.stdin:
        job, port, started = json.loads(line), free_port(), time.monotonic()
        pids = {}
        for host in range(job["hosts"]):
            pid = os.fork()
            if pid == 0:
                run(host, job, port)
            pids[pid] = host
        statuses, seconds = {}, {}
        while pids:
            pid, status = os.wait()
            host = pids.pop(pid)
            statuses[host] = os.waitstatus_to_exitcode(status)
            seconds[host] = time.monotonic() - started
        hosts = range(job["hosts"])
        answer = [[statuses[i] for i in hosts], [round(seconds[i], 1) for i in hosts]]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
