"""Fuzzed cases in a child process that is watched.

    problems, counts = run("tests.fuzz.rows", 20_000)                            # in a test
    python -m tests.fuzz.rows --seed 5 --first 120 --count 1                     # one case again

A module of cases has `open_cases(sandbox)`, which returns `make(random, place)`. This makes a case
from a generator of random numbers, may write into the new directory `place`, and returns
`(what, names, function)`: a line that says what it is, texts of which an error must have one (the
names of its files), and the function to be tried. The function must return, or raise one
`UserError`; this within `SECONDS` and `BYTES`, and with every file of the sandbox as before.
"""

import argparse
import faulthandler
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("FUZZ_SEED", "0"))
TIMES = float(os.environ.get("FUZZ_TIMES", "1"))  # so many times the usual number of cases
SECONDS = int(os.environ.get("FUZZ_SECONDS", "30"))
BYTES = 3 << 30
OUTCOMES = ("accepted", "refused")
SHOWN = int(os.environ.get("FUZZ_SHOWN", "5"))  # failures that end a run

Case = tuple[str, Sequence[str], Callable[[], Any]]
Make = Callable[[random.Random, Path], Case]


def run(module: str, count: int, seed: int = SEED) -> tuple[list[str], dict[str, int]]:
    """Try `count` cases of a module, times `TIMES`. Returns a text for each failure, and how many
    cases were accepted and refused. A process that dies is replaced, from the next case on.
    """
    problems: list[str] = []
    counts = dict.fromkeys(OUTCOMES, 0)
    first, end = 0, int(count * TIMES)
    while first < end and len(problems) < SHOWN:
        command = [sys.executable, "-m", module, "--seed", str(seed)]
        child = subprocess.run(
            [*command, "--first", str(first), "--count", str(end - first)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        begun: dict[str, Any] = {"case": end - 1, "what": "the start"}
        for line in child.stdout.splitlines():
            event = json.loads(line)
            if "what" in event:
                begun = event
            elif event["outcome"] in counts:
                counts[event["outcome"]] += 1
            else:
                problems.append(_report(command, begun, event["outcome"]))
        if child.returncode:
            how = f"the process ended with {child.returncode}:\n{child.stderr[-3000:]}"
            problems.append(_report(command, begun, how))
        first = begun["case"] + 1
    return problems, counts


def _report(command: Sequence[str], begun: dict[str, Any], problem: str) -> str:
    again = " ".join([*command[1:], "--first", str(begun["case"]), "--count", "1"])
    return f"case {begun['case']}: {begun['what']}\n  again: python {again}\n{problem}\n"


def main(open_cases: Callable[[Path], Make]) -> None:
    """Try cases as the command line says; events go to stdout, a line of JSON each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    options = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no event

    def tell(**event: Any) -> None:
        print(json.dumps(event), file=out, flush=True)

    with tempfile.TemporaryDirectory() as name:
        sandbox = Path(name)
        home = sandbox / "home"
        home.mkdir()
        os.environ |= {"HOME": str(home), "LORA_JAX_CACHE": str(sandbox / "cache")}
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf")}
        make = open_cases(sandbox)
        os.chdir(home)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        failures = 0
        for number in range(options.first, options.first + options.count):
            place = sandbox / "case"
            place.mkdir()
            case = make(random.Random(f"{options.seed}/{number}"), place)
            tell(case=number, what=case[0])
            before = snapshot(sandbox)
            _peak()
            outcome = _try(case)
            fine = outcome in OUTCOMES
            if fine and (peak := _peak()) > BYTES:
                outcome = f"it took {peak / 2**30:.1f} GiB"
            if fine and (changed := _differences(before, snapshot(sandbox))):
                outcome = f"it changed files: {', '.join(changed[:5])}"
            tell(outcome=outcome)
            shutil.rmtree(place)
            failures += outcome not in OUTCOMES
            if failures == SHOWN:
                break


def _try(case: Case) -> str:
    from lora_jax.errors import UserError

    _, names, function = case
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        function()
    except UserError as error:
        text = str(error)
        if not any(name in text for name in names):
            return f"the error names none of {', '.join(names)}: {text[:2000]!r}"
        if len(text) > 4000:
            return f"the error has {len(text)} characters: {text[:2000]!r}"
        return "refused"
    except BaseException:
        return traceback.format_exc()[-3000:]
    finally:
        faulthandler.cancel_dump_traceback_later()
    return "accepted"


def _peak() -> int:
    """The most memory that this process had since the last call."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def snapshot(sandbox: Path) -> dict[str, tuple]:
    """Kind, size and time of every file below, the cache left out."""
    found = {}
    for directory, _, names in os.walk(sandbox):
        if directory == str(sandbox / "cache"):
            continue
        for name in [".", *names]:
            state = os.lstat(os.path.join(directory, name))
            found[os.path.join(directory, name)] = (state.st_mode, state.st_size, state.st_mtime_ns)
    return {path: state for path, state in found.items() if f"{sandbox}/cache" not in path}


def _differences(before: dict[str, tuple], after: dict[str, tuple]) -> list[str]:
    return sorted(p for p in {*before, *after} if before.get(p) != after.get(p))
