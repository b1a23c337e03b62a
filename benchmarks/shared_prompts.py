"""Steps of the same examples with and without shared prompts; prints a table, and one JSON line
last.

    python benchmarks/shared_prompts.py
    python benchmarks/shared_prompts.py --rounds 3 --rows 2 --length 512

Three tasks over the packaged addresses: as they are, behind a system prompt of 300 tokens, and as
pairs of a right and another answer (DPO, with the reference's log-probabilities given). Steps of
full rows run in turns. A step with shared prompts holds more examples, so the ratio that counts is
that of the seconds per example. The last line of the table compares DPO with the cross-entropy of
the same tokens.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decode
import numpy as np
from tables import print_table

from lora_jax.start import use_huge_pages

SENTENCE = "Answer with the parts of the address as JSON and with nothing else, in their order. "


def make_config(task: str, home: Path, shares: bool, options: argparse.Namespace) -> Any:
    """Return the config of a task."""
    from lora_jax import config as configs
    from lora_jax import demo

    source, objective, prompt = "demo:usaddress", "sft", "Parse address as JSON."
    if task == "long system prompt":
        prompt = SENTENCE * options.repeats
    if task == "pairs":
        objective, source = "dpo", str(home / "pairs.jsonl")
        rows = [json.loads(line) for line in demo.path("usaddress").read_text().splitlines()]
        others = [row["completion"] for row in [*rows[1:], *rows[:1]]]
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other}
            for row, other in zip(rows, others, strict=True)
            if row["completion"] != other
        ]
        Path(source).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return configs.parse(
        {
            "model": options.model,
            "data": {
                "train": source,
                "system_prompt": prompt,
                "max_length": options.length,
                "share_prompts": shares,
            },
            "adapter": {"rank": 16, "alpha": 32},
            "train": {
                "objective": objective,
                "batch_size": options.rows,
                "remat": "dots",
                "schedule": "constant",
            },
        }
    )


class Side:
    """A compiled step over one batch of a task."""

    def __init__(self, task: str, shares: bool, home: Path, options: argparse.Namespace):
        import jax
        from rich.console import Console

        from lora_jax import lora
        from lora_jax.data import sets
        from lora_jax.session import open_session

        quiet = Console(quiet=True)
        session = open_session(make_config(task, home, shares, options))
        encoder = session.make_encoder(quiet)
        train, _ = sets.read_sets(session.config, encoder)
        loader = sets.make_loader(session.config, train, encoder, None, quiet)
        self.config = session.config
        self.examples = len(loader.examples) / loader.rows_per_epoch * options.rows
        self.tokens, self.filled = loader.tokens, loader.efficiency
        batch = loader.batch(0)
        if self.config.train.objective == "dpo":
            batch["reference_log_probs"] = np.zeros_like(batch["loss_weights"])
        self.batch = jax.device_put(batch)
        self.adapters = lora.init(jax.random.key(0), options.loaded.params, self.config.adapter)[1]

    def step(self, config: Any, options: argparse.Namespace) -> Callable[[], float]:
        """Return a function that runs a step and gives its seconds."""
        import jax

        from lora_jax.train.optimizer import make_optimizer
        from lora_jax.train.step import make_train_step

        model = options.loaded
        optimizer = make_optimizer(config.train)
        state = [jax.tree.map(np.copy, self.adapters)]
        state.append(optimizer.init(state[0]))
        run = make_train_step(model, config, optimizer)

        def measure() -> float:
            start = time.perf_counter()
            state[0], state[1], metrics = run(*state, model.params, self.batch, jax.random.key(1))
            float(metrics["loss"])
            return time.perf_counter() - start

        return measure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--repeats", type=int, default=16, help="sentences of the long system prompt (default: 16)"
    )
    options = parser.parse_args()
    import jax.numpy as jnp

    from lora_jax import formats

    began = os.getloadavg()[0]
    options.loaded = formats.load(options.model, dtype=jnp.float32)
    lines, report = [], {}
    with tempfile.TemporaryDirectory() as home:
        for task in ("addresses", "long system prompt", "pairs"):
            sides = {s: Side(task, s, Path(home), options) for s in (False, True)}
            steps = {name: side.step(side.config, options) for name, side in sides.items()}
            if task == "pairs":
                train = dataclasses.replace(sides[True].config.train, objective="sft")
                plain = dataclasses.replace(sides[True].config, train=train)
                steps["sft"] = sides[True].step(plain, options)
            found: dict[Any, list[float]] = {name: [] for name in steps}
            for number in range(options.rounds + 1):
                for name, step in steps.items():
                    seconds = step()
                    if number:  # the first round compiles
                        found[name].append(seconds)
            whole, shared = (statistics.median(found[name]) for name in (False, True))
            each = [x / sides[s].examples for s, x in ((False, whole), (True, shared))]
            lines.append(
                [task, sides[False].tokens, sides[True].tokens, whole, shared, each[1] / each[0]]
            )
            report[task] = {
                "tokens of an epoch": [sides[s].tokens for s in (False, True)],
                "examples of a step": [sides[s].examples for s in (False, True)],
                "filled": [sides[s].filled for s in (False, True)],
                "seconds of a step": [found[s] for s in (False, True)],
                "seconds of an example, shared over whole": each[1] / each[0],
            }
            if task == "pairs":
                ratio = shared / statistics.median(found["sft"])
                report[task]["dpo over sft of the same tokens"] = ratio
            decode.say(f"{task}: done")
    print_table(
        ["task", "tokens, whole", "shared", "step (s), whole", "shared", "seconds per example"],
        lines,
    )
    print(f"DPO over the cross-entropy of the same tokens, a step: {ratio:.3f}")
    settings = {name: x for name, x in vars(options).items() if name != "loaded"}
    about = {"settings": settings, "machine": decode.describe_machine(os.cpu_count() or 1)}
    print(json.dumps({"tasks": report, **about, "load_average": [began, os.getloadavg()[0]]}))


if __name__ == "__main__":
    use_huge_pages()
    main()
