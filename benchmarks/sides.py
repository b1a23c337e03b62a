"""Jobs of a comparison with PEFT, and the processes that do them.

    run = start("ours", job, environment)      # ours_side.py in a process of its own
    run = start("peft", job, environment)      # peft_side.py in another one
    run["step_seconds"], run["peak_rss"]

A side is a process of its own, so that its memory and its time to the first step are what a user
has who runs it alone. It gets a `Job` as its argument, and prints the report of its `Watch` as the
last line. Rows are tokens in a file that both sides read: {"input_ids": [..], "labels": [..]}, a
label of -100 being none. Neither jax nor torch is imported here.
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIDES = ("ours", "peft")
METHODS = ("lora", "nf4", "dora")
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
# Every process compiles its programs, as at a first start.
_EVERYWHERE = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
}
_PRODUCT_SECONDS = 0.3  # for which a product of matrices is repeated


class SideFailed(RuntimeError):
    """A side that ended with an error; the text is the last line that it printed."""


@dataclass(frozen=True)
class Job:
    """A job for a side, which takes the fields that concern it.

    rows: file of token rows
    method: one of METHODS
    device: cpu or gpu
    steps, batch: optimizer steps, and rows of each; examples are rows for PEFT
    length: tokens of our rows
    packing, share_prompts, remat, attention: of our side, as the settings of these names
    checkpointing: gradient checkpointing of PEFT
    adapter: directory to write the adapter to
    product_tokens: rows of the products of matrices that are measured after the job; 0: none
    began: time.time() at which the process was started
    """

    model: str
    rows: str
    steps: int
    batch: int
    length: int
    method: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    learning_rate: float = 1e-3
    device: str = "cpu"
    dtype: str = "float32"
    shuffle: bool = False
    packing: bool = False
    share_prompts: bool | str = "auto"
    remat: str = "dots"
    attention: str = "auto"
    checkpointing: bool = False
    adapter: str | None = None
    product_tokens: int = 0
    began: float = 0.0


@dataclass
class Watch:
    """Times, losses and counts of the steps of a job."""

    began: float
    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    first_step: float = 0.0

    def add(self, seconds: float, loss: float, supervised: int, examples: int) -> None:
        """Add a finished step."""
        self.step_seconds.append(seconds)
        self.losses.append(loss)
        self.supervised.append(supervised)
        self.examples.append(examples)
        self.first_step = self.first_step or time.time() - self.began

    def report(self) -> dict[str, Any]:
        """Return everything as JSON; call it when the job is done."""
        done = {"job_seconds": time.time() - self.began, "peak_rss": peak_rss()}
        return dataclasses.asdict(self) | done


def read_job() -> Job:
    """Return the job of this process."""
    return Job(**json.loads(sys.argv[1]))


def start(side: str, job: Job, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a side to its end, and return what it reports.

    Raises:
        SideFailed: the process ended with an error, which has been printed.
    """
    script = Path(__file__).with_name(f"{side}_side.py")
    job = dataclasses.replace(job, began=time.time())
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(dataclasses.asdict(job))],
        env=os.environ | _EVERYWHERE | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SideFailed((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def peak_rss() -> int:
    """Return the peak resident memory of this program in bytes. On Linux `ru_maxrss` may be that of
    the process which started it.
    """
    if (status := Path("/proc/self/status")).exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def threads() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_rows(file: Path, rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Path:
    """Write tokens and labels as rows of a file."""
    with file.open("w", encoding="utf-8") as out:
        for tokens, labels in rows:
            row = {"input_ids": [int(x) for x in tokens], "labels": [int(x) for x in labels]}
            out.write(json.dumps(row) + "\n")
    return file


def products(model: str, tokens: int) -> list[tuple[int, int, int]]:
    """Return (m, k, n) of the products of a layer over `tokens` tokens: (m, k) times (k, n)."""
    c = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    d, f, heads = (c[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = c.get("head_dim") or d // heads
    queries, keys = head * heads, head * c.get("num_key_value_heads", heads)
    widths = [(d, queries), (d, keys), (queries, d), (d, f), (f, d)]
    return [(tokens, k, n) for k, n in widths]


def gflops(shapes: Sequence[tuple[int, int, int]], prepare: Callable[..., Callable]) -> float:
    """Return 1e9 operations per second over products of all shapes, each at its median time.
    `prepare(m, k, n)` returns a function that computes one and waits for it.
    """
    seconds = 0.0
    for shape in shapes:
        multiply = prepare(*shape)
        multiply()
        times, until = [], time.perf_counter() + _PRODUCT_SECONDS
        while time.perf_counter() < until:
            begin = time.perf_counter()
            multiply()
            times.append(time.perf_counter() - begin)
        seconds += statistics.median(times)
    return sum(2 * m * k * n for m, k, n in shapes) / seconds / 1e9
