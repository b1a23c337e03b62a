"""LoRA, QLoRA (NF4) and DoRA on one GPU, here and in PEFT (torch), over a random llama of the shape
of Llama 3; prints a table, and one JSON line last.

    python benchmarks/gpu.py --size 1b
    python benchmarks/gpu.py --size 8b --rows 4 --length 2048 --methods lora nf4
    python benchmarks/gpu.py --tiny           # everything at tiny size, on the CPU

Full rows of random tokens, all supervised, in bfloat16 with float32 adapters of rank 16 on all
linears. Ours recomputes the layers (train.remat=full); PEFT has gradient checkpointing, sdpa and
autocast. LoRA runs with each of `--attention` here. Weights are written to a temporary directory
and read by both. Every case is a process of its own, in turns. A step is the median of those after
the first two. The peak of memory is what the allocator of each framework reports; with `--tiny` it
is that of the process.

MFU is the operations of the model, without recomputation, over those that the card could do at its
peak in bfloat16 without sparsity. Those of attention are of full squares, and those of DoRA's norms
are left out. A side that fails, as for lack of memory, is listed with its error.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import decode
import numpy as np
import random_llama
import sides
from tables import print_table

WARM = 2  # steps that compile, or warm allocators up
# Words of a card's name -> its peak in bfloat16, dense, with sums in float32 (NVIDIA's data
# sheets). The first row whose words are all in the name counts.
PEAKS = {
    ("B200",): 2250e12,
    ("H200", "NVL"): 835e12,
    ("H200",): 989e12,
    ("H100", "NVL"): 835e12,
    ("H100", "PCIe"): 756e12,
    ("H100",): 989e12,
    ("A100",): 312e12,
    ("L40S",): 362e12,
    ("L4",): 121e12,
    ("A10",): 125e12,
    ("4090",): 165e12,
}


class Case(NamedTuple):
    """A side, a method, and the attention of our side."""

    side: str
    method: str
    attention: str


def find_card() -> str | None:
    """Return the name of the first GPU, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def find_peak(card: str) -> float | None:
    """Return the peak of a card in operations per second, if it is known."""
    words = set(card.replace("-", " ").split())
    return next((peak for key, peak in PEAKS.items() if words.issuperset(key)), None)


def make_cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases in their order."""
    cases = []
    for method in options.methods:
        kernels = options.attention if method == "lora" else ["auto"]
        cases += [Case("ours", method, kernel) for kernel in kernels]
        cases.append(Case("peft", method, "sdpa"))
    return [case for case in cases if case.side in options.sides]


def make_job(options: argparse.Namespace, home: Path) -> sides.Job:
    """Write a model and its rows, and return the job of our LoRA over them."""
    fields = random_llama.SIZES[options.size]
    model = random_llama.write(home, fields)
    random_llama.write_tokenizer(model)
    shape = options.rows * options.steps, options.length
    tokens = np.random.default_rng(0).integers(0, fields["vocab_size"], shape).tolist()
    return sides.Job(
        model=str(model),
        rows=str(sides.write_rows(home / "rows.jsonl", ((row, row) for row in tokens))),
        steps=options.steps,
        batch=options.rows,
        length=options.length,
        rank=options.rank,
        alpha=2 * options.rank,
        device="cpu" if options.tiny else "gpu",
        dtype="bfloat16",
        remat=options.remat,
        checkpointing=True,
    )


def run(case: Case, job: sides.Job, options: argparse.Namespace) -> dict[str, Any]:
    """Return the report of a case, or its error."""
    attention = {"attention": case.attention} if case.side == "ours" else {}
    job = dataclasses.replace(job, method=case.method, **attention)
    try:
        return sides.start(case.side, job, sides.ON_CPU if options.tiny else {})
    except sides.SideFailed as error:
        return {"error": str(error)}


def summarize(
    case: Case, runs: Sequence[dict[str, Any]], job: sides.Job, speed: dict[str, Any]
) -> dict[str, Any]:
    """Return the figures of a case. `speed` has the operations of a step (`flops`) and the peak of
    the card (`peak`), or None where they are unknown.
    """
    found: dict[str, Any] = case._asdict()
    if errors := [one["error"] for one in runs if "error" in one]:
        return found | {"error": errors[0]}
    seconds = statistics.median(statistics.median(one["step_seconds"][WARM:]) for one in runs)
    found |= {"step": seconds, "tokens_per_second": job.batch * job.length / seconds}
    found["peak_bytes"] = max(one.get("device_bytes", one["peak_rss"]) for one in runs)
    if speed["flops"] and speed["peak"]:
        found["mfu"] = speed["flops"] / seconds / speed["peak"]
    return found


def compare(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return ratios of step times: ours over PEFT's by method, with our fastest attention, and
    cudnn over xla.
    """
    ratios = {}
    steps = {Case(one["side"], one["method"], one["attention"]): one.get("step") for one in found}
    for method in dict.fromkeys(case.method for case in steps):
        own = [s for case, s in steps.items() if s and case[:2] == ("ours", method)]
        other = steps.get(Case("peft", method, "sdpa"))
        if own and other:
            ratios[f"{method}_step_ratio"] = min(own) / other
    kernels = [steps.get(Case("ours", "lora", name)) for name in ("cudnn", "xla")]
    if all(kernels):
        ratios["cudnn_over_xla"] = kernels[0] / kernels[1]
    return ratios


def print_report(found: Sequence[dict[str, Any]]) -> None:
    """Print a line for each case."""
    lines = []
    for one in found:
        cells = [one["side"].replace("peft", "PEFT"), one["method"], one["attention"]]
        if "error" in one:
            lines.append([*cells, one["error"][:60], "", "", ""])
            continue
        mfu = f"{one['mfu']:.1%}" if "mfu" in one else ""
        speed = f"{one['tokens_per_second']:,.0f}"
        lines.append([*cells, one["step"], speed, mfu, one["peak_bytes"] / 1e9])
    header = ["", "method", "attention", "step (s)", "tokens/s", "MFU", "peak memory (GB)"]
    print_table(header, lines)


def parse_options() -> argparse.Namespace:
    """Return the options of the command line.

    Raises:
        SystemExit: options that leave no step to measure.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sizes = [size for size in random_llama.SIZES if size != "tiny"]
    add("--size", choices=sizes, default="1b")
    add("--rows", type=int, default=8)
    add("--length", type=int, default=1024)
    add("--steps", type=int, default=10, help="of a process")
    add("--rounds", type=int, default=1)
    add("--rank", type=int, default=16, help="alpha is twice the rank")
    add("--methods", nargs="+", choices=sides.METHODS, default=sides.METHODS)
    add("--attention", nargs="+", choices=("xla", "cudnn"), default=["xla", "cudnn"])
    add("--sides", nargs="+", choices=sides.SIDES, default=sides.SIDES)
    add("--remat", default="full", help="of our side (default: full)")
    add("--tiny", action="store_true", help="tiny sizes on the CPU, without cudnn")
    options = parser.parse_args()
    if options.tiny:
        options.size, options.rows, options.length, options.steps = "tiny", 2, 16, 3
        options.rounds, options.attention = 1, ["xla"]
    if options.steps <= WARM or options.rounds < 1:
        parser.error(f"a process needs more than {WARM} steps, and a run a round")
    return options


def main() -> None:
    options = parse_options()
    card = "CPU" if options.tiny else find_card()
    if card is None:
        sys.exit("error: nvidia-smi finds no GPU here; --tiny runs everything on the CPU")
    peak = find_peak(card)
    runs: dict[Case, list[dict[str, Any]]] = {case: [] for case in make_cases(options)}
    with tempfile.TemporaryDirectory(prefix="gpu-") as home:
        job = make_job(options, Path(home))
        for _ in range(options.rounds):
            for case, found in runs.items():
                found.append(run(case, job, options))
                decode.say(f"{' '.join(case)}: {found[-1].get('error', 'done')}")
    counted = (one.get("model_flops") for found in runs.values() for one in found)
    speed = {"flops": next(filter(None, counted), None), "peak": peak}
    cases = [summarize(case, found, job, speed) for case, found in runs.items()]
    print_report(cases)
    if peak is None:
        print(f"MFU is left out: the peak of {card!r} is not in the table of {Path(__file__).name}")
    elif speed["flops"] is None:
        print("MFU is left out: the operations are counted by our side, which has not run")
    report = {"cases": cases, "ratios": compare(cases), "card": card, "peak_flops": peak}
    report |= {"model_flops": speed["flops"], "job": dataclasses.asdict(job)}
    raw = [{**case._asdict(), "runs": found} for case, found in runs.items()]
    print(json.dumps(report | {"raw": raw, "settings": vars(options)}))


if __name__ == "__main__":
    main()
