"""A decode step here, in transformers and in PEFT (torch), on the same weights, prompts and cores;
prints a table, and one JSON line last.

    python benchmarks/decode.py
    python benchmarks/decode.py --rounds 9 --batches 1 8

Greedy answers of 32 tokens to prompts of 64, in float32. With T(n) the seconds of one call for n
tokens per row, a step takes (T(32) - T(1)) / 31: reading the prompts and the constant cost of a
call cancel, on both sides. Tokens per second are those of the whole call, 32 * rows / T(32).

No adapters: our engine against `generate` of transformers. One adapter: all rows have it, and PEFT
has only that one active. Eight adapters: all are loaded, row i has adapter i modulo 8, and PEFT
gets `adapter_names`; a batch of one row uses one of the eight. Adapters are random, of rank 16 on
all linears, written by us and read by both. Our merged model is measured against our base.

Each side is a process of its own, and waits while the other computes. Every round makes all calls
of a batch size in turns; results are medians over rounds. Rounds are added, up to three times
`--rounds`, until the median ratios are known to 2 %.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from lora_jax.start import use_huge_pages

CASES = {"base": 0, "merged": 0, "one adapter": 1, "adapters": 8}  # adapters loaded
RIVALS = {"base": "transformers", "merged": "our base", "one adapter": "PEFT", "adapters": "PEFT"}
COLUMNS = ("step (ms)", "tokens/s")
PRECISE = 0.02  # relative error of a median


class Call(NamedTuple):
    """A call and its answers: tokens per row."""

    seconds: float
    cores: float  # that it kept busy, on average
    answers: list[list[int]]


class Times(NamedTuple):
    """One measurement of a side: seconds per step and of the whole call."""

    step: float
    whole: float
    cores: float


def prompts_of(options: argparse.Namespace, rows: int) -> list[list[int]]:
    """Return prompts of random tokens. None is a special token, as these come first."""
    shape = rows, options.prompt
    return np.random.default_rng(rows).integers(1000, 40000, shape).tolist()


class Ours:
    """Engines of this project, one per case, for one batch size."""

    def __init__(self, options: argparse.Namespace, home: Path) -> None:
        import jax.numpy as jnp

        from lora_jax import AdapterConfig, formats
        from lora_jax.generate import for_decoding

        self.options, self.engines = options, {}
        model = formats.load(options.model, dtype=jnp.float32)
        config = AdapterConfig(
            rank=options.rank, alpha=2 * options.rank, target_modules="all-linear"
        )
        for number in range(max(CASES.values())):
            write_adapter(home / str(number), number, model, config)
        # What PEFT reads is what we read.
        self.adapters = [
            formats.read_adapter(home / str(number), model.params, model)
            for number in range(max(CASES.values()))
        ]
        self.merged = for_decoding(merge(model, *self.adapters[0]))
        self.model = for_decoding(model)

    def _engine(self, case: str, rows: int) -> Any:
        """Return an engine with the adapters of a case."""
        from lora_jax import lora
        from lora_jax.generate import Engine

        options, count = self.options, CASES[case]
        model = self.merged if case == "merged" else self.model
        engine = Engine(
            model,
            rows=rows,
            max_length=options.prompt + options.new,
            bank=lora.bank(model.params, slots=count + 1, rank=options.rank) if count else None,
        )
        for number, adapter in enumerate(self.adapters[:count]):
            engine.publish(str(number), *adapter)
        return engine

    def answer(self, case: str, rows: int, new: int) -> list[list[int]]:
        from lora_jax.generate import Request

        if (case, rows) not in self.engines:
            # Those of another batch size are not used again.
            self.engines = {key: one for key, one in self.engines.items() if key[1] == rows}
            self.engines[case, rows] = self._engine(case, rows)
        count = CASES[case]
        requests = [
            Request(prompt, new, adapter=str(row % count) if count else None)
            for row, prompt in enumerate(prompts_of(self.options, rows))
        ]
        return [one.tokens for one in self.engines[case, rows].answer(requests)]


def write_adapter(target: Path, number: int, model: Any, config: Any) -> None:
    """Write the PEFT directory of a random adapter."""
    import jax

    from lora_jax import formats, lora

    _, adapters = lora.init(jax.random.key(number), model.params, config)
    draw = np.random.default_rng(number)
    adapters = jax.tree.map(
        lambda leaf: draw.normal(0, 0.04, leaf.shape).astype(np.float32), adapters
    )
    formats.write_adapter(target, adapters, model.params, config, base_model=str(model.directory))


def merge(model: Any, adapters: Any, config: Any) -> Any:
    """Return the model with an adapter merged into it."""
    from lora_jax import lora

    return model.replace(params=lora.merge(lora.bind(model.params, adapters, config)))


class Theirs:
    """transformers, and PEFT over a second copy of its model."""

    def __init__(self, options: argparse.Namespace, home: Path) -> None:
        import peft
        import torch
        import transformers

        from lora_jax import formats

        torch.set_num_threads(options.cores)
        transformers.utils.logging.disable_progress_bar()
        self.options, source = options, formats.resolve(options.model)

        def load() -> Any:
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            model.generation_config.eos_token_id = None
            return model.eval()

        self.base = load()
        self.adapted = peft.PeftModel.from_pretrained(load(), home / "0", adapter_name="0")
        for number in range(1, max(CASES.values())):
            self.adapted.load_adapter(home / str(number), adapter_name=str(number))
        self.adapted.eval()

    def answer(self, case: str, rows: int, new: int) -> list[list[int]]:
        import torch

        count = CASES[case]
        tokens = torch.tensor(prompts_of(self.options, rows))
        mixed = {"adapter_names": [str(row % count) for row in range(rows)]} if count > 1 else {}
        found = (self.adapted if count else self.base).generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **mixed,
        )
        return found[:, tokens.shape[1] :].tolist()


def serve(connection: Any, side: type, options: argparse.Namespace, home: Path) -> None:
    """Make the calls that arrive over a connection, in a process of one side."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    program = side(options, home)
    connection.send("ready")
    with contextlib.suppress(EOFError):  # the caller has ended
        while True:
            asked = connection.recv()
            began, used = time.perf_counter(), time.process_time()
            answers = program.answer(*asked)
            seconds, used = time.perf_counter() - began, time.process_time() - used
            connection.send(Call(seconds, used / seconds, answers))


class Side:
    """Process of a side. It ends with this one."""

    def __init__(self, side: type, options: argparse.Namespace, home: Path) -> None:
        context = multiprocessing.get_context("spawn")  # nothing of one side in the other
        self.connection, other = context.Pipe()
        self.new = options.new
        self.process = context.Process(target=serve, args=(other, side, options, home), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()

    def call(self, case: str, rows: int, new: int) -> Call:
        self.connection.send((case, rows, new))
        return self.connection.recv()

    def warm_up(self, case: str, rows: int) -> list[list[int]]:
        """Make the calls of `measure` and return the answers."""
        self.call(case, rows, 1)
        return self.call(case, rows, self.new).answers

    def measure(self, case: str, rows: int) -> Times:
        short, long = self.call(case, rows, 1), self.call(case, rows, self.new)
        return Times((long.seconds - short.seconds) / (self.new - 1), long.seconds, long.cores)


def precision(rounds: Sequence[dict[str, Times]]) -> float:
    """Return the largest relative error of a median ratio: half the interquartile range of the
    ratios over the root of their number.
    """
    errors = []
    for case in CASES:
        ratios = ratios_of(rounds, f"ours {case}", rival(case))
        low, middle, high = statistics.quantiles(ratios, n=4)
        errors.append((high - low) / 2 / middle / len(ratios) ** 0.5)
    return max(errors)


def rival(case: str) -> str:
    """Return the measurement that one of ours is divided by."""
    return "ours base" if case == "merged" else f"theirs {case}"


def ratios_of(rounds: Sequence[dict[str, Times]], one: str, other: str) -> list[float]:
    """Return the ratio of steps of each round."""
    return [found[one].step / found[other].step for found in rounds]


def measure(
    ours: Side, theirs: Side, rows: int, options: argparse.Namespace
) -> tuple[list[dict[str, Times]], dict[str, float]]:
    """Return the rounds of a batch size, and the share of equal tokens of each case."""
    sides = [("ours", ours, case) for case in CASES]
    sides += [("theirs", theirs, case) for case in CASES if case != "merged"]
    sides.sort(key=lambda one: list(CASES).index(one[2]))
    answers = {}
    for name, side, case in sides:
        began = time.perf_counter()
        answers[f"{name} {case}"] = side.warm_up(case, rows)
        say(f"batch {rows}, {name} {case}: ready after {time.perf_counter() - began:.0f} s")
    equal = {
        case: float(np.mean(np.equal(answers[f"ours {case}"], answers[f"theirs {case}"])))
        for case in CASES
        if case != "merged"
    }
    rounds: list[dict[str, Times]] = []
    while len(rounds) < options.rounds or (
        precision(rounds) > PRECISE and len(rounds) < 3 * options.rounds
    ):
        rounds.append({f"{name} {case}": side.measure(case, rows) for name, side, case in sides})
        known = f", ratios known to {precision(rounds):.1%}" if len(rounds) > 1 else ""
        say(f"batch {rows}, round {len(rounds)}{known}")
    return rounds, equal


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def summarize(rounds: Sequence[dict[str, Times]]) -> dict[str, dict[str, float]]:
    """Return the medians of each measurement."""
    found = {}
    for name in rounds[0]:
        times = [one[name] for one in rounds]
        found[name] = {
            "step_ms": 1000 * statistics.median(one.step for one in times),
            "whole_seconds": statistics.median(one.whole for one in times),
            "cores": statistics.median(one.cores for one in times),
        }
    return found


def describe_machine(cores: int) -> dict[str, Any]:
    """Return the processor, the number of cores in use, and the widest vectors of the processor."""
    name, flags = platform.processor() or platform.machine(), ""
    if (file := Path("/proc/cpuinfo")).exists():
        text = file.read_text(encoding="utf-8")
        if found := re.search(r"model name\s*: (.*)", text):
            name = found[1]
        if found := re.search(r"(?:flags|Features)\s*: (.*)", text):
            flags = found[1]
    known = ("amx_tile", "avx512f", "avx2", "asimd")
    widest = next((one for one in known if one in flags.split()), "")
    return {"processor": name, "cores": cores, "vectors": widest}


def print_table(report: dict[int, dict[str, dict[str, float]]], ratios: dict, new: int) -> None:
    """Print a line per batch size and case, in Markdown."""
    table = Table(box=box.MARKDOWN)
    for name in ("batch", "ours", *COLUMNS, "compared with", *COLUMNS, "ratio of steps"):
        table.add_column(name, justify="left" if name in ("ours", "compared with") else "right")
    for rows, found in report.items():
        for case in CASES:
            mine, other = found[f"ours {case}"], found[rival(case)]
            cells = [
                (f"{one['step_ms']:.1f}", f"{rows * new / one['whole_seconds']:.0f}")
                for one in (mine, other)
            ]
            ratio = f"{ratios[case][str(rows)]:.2f}"
            table.add_row(
                str(rows),
                case.replace("adapters", "eight adapters"),
                *cells[0],
                RIVALS[case],
                *cells[1],
                ratio,
            )
    Console(width=120).print(table)


def make_report(results: dict[int, list[dict[str, Times]]], options: argparse.Namespace) -> dict:
    """Print the table, and return the part of the JSON line that it shows."""
    report = {rows: summarize(rounds) for rows, rounds in results.items()}

    def compare(one: str, other: str) -> dict[str, float]:
        return {
            str(rows): statistics.median(ratios_of(rounds, one, other))
            for rows, rounds in results.items()
        }

    ratios = {case: compare(f"ours {case}", rival(case)) for case in CASES}
    print_table(report, ratios, options.new)
    ratios["adapters over base"] = compare("ours adapters", "ours base")
    whole = {
        case: {
            str(rows): found[f"ours {case}"]["whole_seconds"] / found[rival(case)]["whole_seconds"]
            for rows, found in report.items()
        }
        for case in CASES
    }
    return {"ratios": ratios, "ratios_of_calls": whole, "measured": report}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5, help="at least (default: 5)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer (default: 32)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--cores", type=int, default=2, help="of this machine in use (default: 2)")
    options = parser.parse_args()
    if options.rounds < 2 or options.new < 2:
        parser.error("--rounds and --new take 2 or more")
    if hasattr(os, "sched_setaffinity"):
        usable = sorted(os.sched_getaffinity(0))
        if len(usable) < options.cores:
            parser.error(f"--cores {options.cores}: there are {len(usable)}")
        os.sched_setaffinity(0, usable[: options.cores])  # of both sides
    load = [os.getloadavg()[0]]
    results, equal = {}, {}
    with tempfile.TemporaryDirectory() as home:
        ours = Side(Ours, options, Path(home))  # writes the adapters
        theirs = Side(Theirs, options, Path(home))
        for rows in options.batches:
            results[rows], equal[rows] = measure(ours, theirs, rows, options)
            make_report({rows: results[rows]}, options)
    line = make_report(results, options)
    line |= {"settings": vars(options), "machine": describe_machine(options.cores)}
    line |= {"rounds": {rows: len(rounds) for rows, rounds in results.items()}}
    line |= {"precision": {rows: precision(rounds) for rows, rounds in results.items()}}
    line |= {"equal_tokens": equal, "load_average": [*load, os.getloadavg()[0]]}
    print(json.dumps(line))


if __name__ == "__main__":
    use_huge_pages()  # as train.py does; both sides get it
    main()
