"""Training here and in PEFT (torch): the same tokens, rank, alpha, targets, AdamW and schedule on
the same cores; prints a table, and one JSON line last.

    python benchmarks/vs_peft.py
    python benchmarks/vs_peft.py --rounds 1 --parts step task

    step    full rows of random tokens, all supervised; the time of a step
    task    the packaged addresses at their real lengths: PEFT pads a batch of examples to its
            longest, and our rows hold as many examples per step, packed. Supervised tokens per
            second, peak resident memory, the time to the first step, and the whole job: load, train
            on every example once, write the adapter
    long    the same behind a system prompt of 300 tokens, which our rows compute once
            (data.share_prompts=true)
    nf4     `step` over a base in NF4, which bitsandbytes quantises for PEFT
    dora    `step` with DoRA

Ratios are ours over PEFT's, medians over rounds. Every round runs all parts in turns, each side in
a process of its own that has all cores, on a machine that should do nothing else. Both sides begin
with the same rows of tokens; nothing is compiled before. The losses of the first step must agree to
1e-3 in `step` and `dora`. The first two steps of a process do not count towards times of steps.
PEFT keeps all activations; ours are recomputed as `--remat` says. Both sides get huge pages from
glibc, as `train.py` does.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import decode
import numpy as np
import sides
from rich.console import Console
from tables import print_table

from lora_jax.start import use_huge_pages

PARTS = ("step", "task", "long", "nf4", "dora")
SENTENCE = "Answer with the parts of the address as JSON and with nothing else, in their order. "
WARM = 2  # steps that compile, or warm allocators up
CLOSE = 1e-3  # nats between the losses of the first step
# Name -> (part, figure).
RATIOS = {
    "step_ratio": ("step", "step"),
    "packed_tokens_ratio": ("task", "tokens_per_second"),
    "long_prompt_tokens_ratio": ("long", "tokens_per_second"),
    "rss_ratio": ("task", "peak_rss"),
    "job_ratio": ("task", "job_seconds"),
    "first_step_ratio": ("task", "first_step"),
    "nf4_step_ratio": ("nf4", "step"),
    "dora_step_ratio": ("dora", "step"),
}
UNITS = {  # of a figure -> (text, divisor)
    "step": ("a step (s)", 1.0),
    "tokens_per_second": ("supervised tokens/s", 1.0),
    "peak_rss": ("peak memory (GB)", 1e9),
    "job_seconds": ("the whole job (s)", 1.0),
    "first_step": ("to the first step (s)", 1.0),
}


class Disagreement(Exception):
    """Two sides that did not compute the same."""


def full_rows(options: argparse.Namespace, home: Path) -> Path:
    """Write rows of random tokens that are all supervised, for every step."""
    content = json.loads((options.directory / "config.json").read_text(encoding="utf-8"))
    shape = options.rows * options.steps, options.length
    tokens = np.random.default_rng(0).integers(0, content["vocab_size"], shape).tolist()
    return sides.write_rows(home / "full.jsonl", ((row, row) for row in tokens))


def read_examples(options: argparse.Namespace, prompt: str, count: int) -> list[Any]:
    """Return some examples of the task behind a system prompt, as a run encodes them."""
    from lora_jax import config as configs
    from lora_jax.data import sets
    from lora_jax.session import open_session

    content = json.loads((options.directory / "config.json").read_text(encoding="utf-8"))
    longest = content["max_position_embeddings"]
    data = {"train": options.data, "system_prompt": prompt, "max_length": longest}
    session = open_session(
        configs.parse({"model": options.model, "data": {**data, "too_long": "error"}})
    )
    train, _ = sets.read_sets(session.config, session.make_encoder(Console(quiet=True)))
    (found,) = train.sets.values()
    chosen = np.random.default_rng(0).permutation(len(found.examples))[:count]
    return [found.examples[i] for i in chosen]


def make_prompt(options: argparse.Namespace) -> str:
    """Return a system prompt of `--prompt-tokens` tokens."""
    from lora_jax import formats

    tokenizer = formats.load_tokenizer(options.directory)
    wanted = options.prompt_tokens
    tokens = tokenizer(SENTENCE * wanted, add_special_tokens=False).input_ids
    return tokenizer.decode(tokens[:wanted]).strip()


def fit_rows(examples: Sequence[Any], rows: int, wanted: int, shares: bool) -> tuple[int, int]:
    """Return the length of packed rows of which `rows` hold `wanted` examples on average, and the
    number of steps that take every example once.
    """
    from lora_jax.data import Loader

    before: tuple[float, int, int] | None = None
    longest = max(len(example.tokens) for example in examples)
    for length in itertools.count(-(-longest // 16) * 16, 16):
        loader = Loader(examples, rows, length, share_prompts=shares)
        steps = -(-loader.rows_per_epoch // rows)
        found = len(examples) / loader.rows_per_epoch * rows, length, steps
        if found[0] >= wanted or loader.rows_per_epoch <= rows:
            both = (before or found, found)
            return min(both, key=lambda one: abs(one[0] - wanted))[1:]
        before = found
    raise AssertionError("lengths do not end")


def task_jobs(part: str, options: argparse.Namespace, home: Path) -> dict[str, sides.Job]:
    """Return the jobs of `task` or `long`, by side."""
    long = part == "long"
    count, rows = (
        (options.long_examples, options.long_rows)
        if long
        else (options.examples, options.task_rows)
    )
    prompt = make_prompt(options) if long else options.system_prompt
    examples = read_examples(options, prompt, count)
    file = sides.write_rows(
        home / f"{part}.jsonl",
        (
            (example.tokens, np.where(example.loss_weights > 0, example.tokens, -100))
            for example in examples
        ),
    )
    length, steps = fit_rows(examples, rows, options.batch, shares=long)
    base = dataclasses.replace(make_job(options, file), shuffle=True)
    packed = {"batch": rows, "length": length, "steps": steps, "packing": True}
    ours = dataclasses.replace(base, **packed, share_prompts=True if long else "auto")
    theirs = -(-len(examples) // options.batch)
    peft = dataclasses.replace(base, batch=options.batch, steps=theirs)
    jobs = {"ours": ours, "peft": peft}
    if long:
        return jobs
    written = {side: str(home / f"{side}-adapter") for side in jobs}
    return {side: dataclasses.replace(job, adapter=written[side]) for side, job in jobs.items()}


def make_job(options: argparse.Namespace, rows: Path) -> sides.Job:
    """Return the job of `step` over some rows."""
    return sides.Job(
        model=str(options.directory),
        rows=str(rows),
        steps=options.steps,
        batch=options.rows,
        length=options.length,
        rank=options.rank,
        alpha=2 * options.rank,
        remat=options.remat,
    )


def make_jobs(options: argparse.Namespace, home: Path) -> dict[str, dict[str, sides.Job]]:
    """Return the jobs of all parts, by part and side. Those of the first part measure products of
    matrices, too.
    """
    full, jobs = None, {}
    for part in options.parts:
        if part in ("task", "long"):
            jobs[part] = task_jobs(part, options, home)
            continue
        full = full or make_job(options, full_rows(options, home))
        method = "lora" if part == "step" else part
        jobs[part] = dict.fromkeys(sides.SIDES, dataclasses.replace(full, method=method))
    tokens, first = options.rows * options.length, options.parts[0]
    jobs[first] = {  # once in a round
        side: dataclasses.replace(job, product_tokens=tokens) for side, job in jobs[first].items()
    }
    return jobs


def check_same(part: str, runs: dict[str, dict[str, Any]]) -> None:
    """Raise if the two sides did not compute the same in `step` or `dora`.

    Raises:
        Disagreement: other numbers of supervised tokens, or other losses of the first step.
    """
    if part not in ("step", "dora"):
        return
    ours, peft = runs["ours"], runs["peft"]
    if ours["supervised"] != peft["supervised"]:
        raise Disagreement(f"supervised tokens: {ours['supervised']}, PEFT {peft['supervised']}")
    losses = ours["losses"][0], peft["losses"][0]
    if not abs(losses[0] - losses[1]) <= CLOSE:
        raise Disagreement(f"losses of the first step of {part}: {losses[0]}, PEFT {losses[1]}")


def figures(run: dict[str, Any]) -> dict[str, float]:
    """Return the figures of one run of a side."""
    seconds, supervised = (run[name][WARM:] for name in ("step_seconds", "supervised"))
    return {
        "step": statistics.median(seconds),
        "tokens_per_second": sum(supervised) / sum(seconds),
        **{name: run[name] for name in ("peak_rss", "job_seconds", "first_step")},
    }


def measure(jobs: dict[str, dict[str, sides.Job]], rounds: int) -> dict[str, dict[str, list]]:
    """Return the reports of all runs, by part and side.

    Raises:
        Disagreement: as `check_same`.
        SideFailed: a side that ended with an error.
    """
    found = {part: {side: [] for side in sides.SIDES} for part in jobs}
    for number in range(rounds):
        for part, both in jobs.items():
            runs = {}
            for side, job in both.items():
                if job.adapter is not None:
                    job = dataclasses.replace(job, adapter=f"{job.adapter}-{number}")
                runs[side] = sides.start(side, job, sides.ON_CPU)
                found[part][side].append(runs[side])
            check_same(part, runs)
            times = {side: round(figures(run)["step"], 3) for side, run in runs.items()}
            decode.say(f"round {number + 1}, {part}: seconds of a step {times}")
    return found


def summarize(found: dict[str, dict[str, list]]) -> tuple[list[list[Any]], dict[str, float]]:
    """Return the lines of the table, and the ratios."""
    lines, ratios = [], {}
    for name, (part, figure) in RATIOS.items():
        if part not in found:
            continue
        each = {side: [figures(run)[figure] for run in runs] for side, runs in found[part].items()}
        pairs = zip(each["ours"], each["peft"], strict=True)
        ratios[name] = statistics.median(ours / peft for ours, peft in pairs)
        text, divisor = UNITS[figure]
        both = [statistics.median(values) / divisor for values in each.values()]
        lines.append([f"{part}: {text}", *both, ratios[name]])
    return lines, ratios


def parse_options() -> argparse.Namespace:
    """Return the options of the command line.

    Raises:
        SystemExit: options that leave no step to measure.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=3)
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--model", default="demo:smollm2-135m-instruct")
    add("--rank", type=int, default=16, help="alpha is twice the rank")
    add("--remat", default="dots", help="of our side (default: dots)")
    add("--rows", type=int, default=4, help="of `step`, `nf4` and `dora`")
    add("--length", type=int, default=256, help="tokens of their rows")
    add("--steps", type=int, default=6, help="of a process, in these parts")
    add("--data", default="demo:usaddress", help="rows of `task` and `long`")
    add("--system-prompt", default="Parse address as JSON.", help="of `task`")
    add("--prompt-tokens", type=int, default=300, help="of the system prompt of `long`")
    add("--batch", type=int, default=8, help="examples of a step of `task` and `long`")
    add("--examples", type=int, default=256, help="of `task`")
    add("--long-examples", type=int, default=96, help="of `long`")
    add("--task-rows", type=int, default=2, help="packed rows of a step of `task`")
    add("--long-rows", type=int, default=1, help="packed rows of a step of `long`")
    options = parser.parse_args()
    if options.steps <= WARM or options.rounds < 1:
        parser.error(f"a process needs more than {WARM} steps, and a run a round")
    return options


def main() -> None:
    options = parse_options()
    from lora_jax import formats
    from lora_jax.errors import UserError

    began = os.getloadavg()[0]
    try:
        options.directory = formats.resolve(options.model)
        with tempfile.TemporaryDirectory(prefix="vs_peft-") as home:
            jobs = make_jobs(options, Path(home))
            for part, both in jobs.items():
                if (steps := min(job.steps for job in both.values())) <= WARM:
                    sys.exit(f"error: {part} has {steps} steps, of which {WARM} do not count")
            found = measure(jobs, options.rounds)
    except (Disagreement, UserError, sides.SideFailed) as error:
        sys.exit(f"error: {error}")
    lines, ratios = summarize(found)
    print_table(["", "ours", "PEFT", "ratio"], lines)
    runs = next(iter(found.values()))
    rates = {side: statistics.median(run["gflops"] for run in runs[side]) for side in sides.SIDES}
    machine = decode.describe_machine(sides.threads())
    machine["gflops"] = {"xla": rates["ours"], "torch": rates["peft"]}
    settings = {name: x for name, x in vars(options).items() if name != "directory"}
    sizes = {
        part: {side: dataclasses.asdict(job) for side, job in both.items()}
        for part, both in jobs.items()
    }
    print(
        json.dumps(
            {
                **ratios,
                "raw": found,
                "jobs": sizes,
                "machine": machine,
                "settings": settings,
                "load_average": [began, os.getloadavg()[0]],
            }
        )
    )


if __name__ == "__main__":
    use_huge_pages()  # as train.py does; both sides get it
    main()
