"""Two processes compete for one directory, and are killed at random moments: nothing is lost."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lora_jax.train import checkpoint, lock

from .test_resume import SETTINGS, command, last_step, trace
from .tiny import SUMS, write_model, write_rows

OPTIONS = (
    *("train.steps=200", "train.save_every=3", "train.eval_every=40", "eval.samples=0"),
    *("eval.generate=false", "resume=auto"),
)


class Server:
    """Runs as forks of one process that has imported everything (`launcher.py`)."""

    def __init__(self, directory, stack):
        self.log = directory / "messages.txt"
        environment = {
            "JAX_PLATFORMS": "cpu",
            # Of its own: a process that is killed can leave half an entry.
            "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "LAUNCHER_LOG": str(self.log),
        }
        self._process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("launcher.py"))],
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
        stack.callback(self._process.stdin.close)

    def start(self, arguments):
        """Start a run; returns its process id."""
        self.log.write_text("")
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def status(self):
        """Wait for the run, which must have ended well, by a kill, or for want of the directory."""
        status, messages = int(self._process.stdout.readline()), self.log.read_text()
        assert status in (0, 2, -signal.SIGKILL), messages
        assert (status == 2) == (" is in use by process " in messages), messages
        assert "Traceback" not in messages
        return status


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_two_that_compete_for_a_directory_and_are_killed_lose_nothing(tmp_path, kills):
    model = write_model(tmp_path / "model")
    rows = str(write_rows(tmp_path / "rows.jsonl", SUMS))
    data = {"train": rows, "eval": rows, "max_length": 96}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"model": str(model), "data": data, **SETTINGS}))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rng = random.Random(kills)
    reached, statuses, waits = [0], [], 0
    with contextlib.ExitStack() as stack:
        rivals = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            rivals.append(Server(tmp_path / name, stack))
        rivals[0].start(command(config, whole, *OPTIONS))
        assert rivals[0].status() == 0
        while len(statuses) < kills:
            rng.shuffle(rivals)
            pids, before = [], changed(killed)
            for rival in rivals:
                pids.append(rival.start(command(config, killed, *OPTIONS)))
                time.sleep(rng.choice((0, 0, rng.uniform(0, 2))))
            wait_for_steps(killed, reached[-1], before, rng)
            # Whichever holds the directory; the other one may have ended, or takes over.
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                time.sleep(rng.choice((0, rng.uniform(0, 1))))
            ended = [rival.status() for rival in rivals]
            waits += ended.count(2)
            statuses += [status for status in ended if status == -signal.SIGKILL]
            steps = checkpoint.list_steps(killed / "checkpoints")
            reached.append(steps[-1] if steps else 0)
        rivals[0].start(command(config, killed, *OPTIONS))
        assert rivals[0].status() == 0
    print(f"{len(statuses)} kills, {waits} refusals, steps reached: {reached}")
    assert reached == sorted(reached), "a run was lost"
    assert waits, "the two never met"
    assert reached[-1] > 0, "the kills all came before the first checkpoint"
    for output in (whole, killed):
        (output / "samples.jsonl").touch()  # none are asked for
        assert not list(output.rglob(lock.NAME))
    assert trace(killed) == trace(whole)


def changed(output):
    """When the log was last written to, or cut back."""
    log = output / "metrics.jsonl"
    return log.stat().st_ctime_ns if log.exists() else 0


def wait_for_steps(output, kept, before, rng):
    """Let the run save a few more checkpoints, or one time in four, wait for a moment only."""
    deadline = time.monotonic() + (rng.uniform(0, 3) if rng.random() < 0.25 else 60)
    while time.monotonic() < deadline and not (output / "summary.json").exists():
        # The log is cut back to the checkpoint first, and then grows beyond it.
        if changed(output) != before and last_step(output / "metrics.jsonl") > kept + 7:
            time.sleep(rng.expovariate(1 / 0.15))
            return
        time.sleep(0.005)
