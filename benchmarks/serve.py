"""Throughput and latency of the server, next to the engine without HTTP; prints tables, and one
JSON line last.

    python benchmarks/serve.py
    python benchmarks/serve.py --registered 5 200 --clients 1 8 32 --rounds 5

Servers run as `lora-jax serve` on loopback, one per number of registered adapters; the clients use
five of these adapters in every case, so that what differs is how many the server knows. Adapters
are random, of rank 16 on all linears; those that nobody asks for share the files of the others by
hard links. The engine without HTTP has the same rows, slots and requests, in a process of its own.

A request is a prompt of 64 tokens with a greedy answer of 32, streamed. Every round measures each
server and the engine in turns, with twice as many clients as the server has rows, so that no row
waits for a client; results are medians over rounds. Latencies are those of the server with the most
adapters: seconds to the first token, and between tokens, which arrive in groups when nobody waits.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import decode
import httpx
import numpy as np
from tables import print_table

from lora_jax.start import use_huge_pages

ACTIVE = 5  # adapters that clients use
ENGINE = "engine"  # name of the measurement without HTTP


class Answer(NamedTuple):
    """Times of one streamed answer, in seconds, and its tokens."""

    first: float
    gaps: list[float]
    tokens: list[int]


class Load(NamedTuple):
    """One measurement: requests by a number of clients."""

    seconds: float
    answers: list[Answer]

    def tokens_per_second(self) -> float:
        return sum(len(answer.tokens) for answer in self.answers) / self.seconds


def prompt_of(number: int, options: argparse.Namespace) -> list[int]:
    """Return the prompt of a request: random tokens, none of them special."""
    return np.random.default_rng(number).integers(1000, 40000, options.prompt).tolist()


def adapter_of(number: int) -> str:
    return f"adapter-{number % ACTIVE}"


def write_adapters(home: Path, options: argparse.Namespace) -> None:
    """Write the adapters, and a directory with links to them for each number of registered ones."""
    from lora_jax import AdapterConfig, formats

    model = formats.load(options.model)
    config = AdapterConfig(rank=options.rank, alpha=2 * options.rank, target_modules="all-linear")
    for number in range(ACTIVE):
        decode.write_adapter(home / "files" / adapter_of(number), number, model, config)
    for count in options.registered:
        for number in range(count):
            source = home / "files" / adapter_of(number)
            shutil.copytree(source, home / str(count) / f"adapter-{number}", copy_function=os.link)


class Server:
    """A `lora-jax serve` on a port of loopback."""

    def __init__(self, root: Path, options: argparse.Namespace, more: Sequence[str] = ()) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = f"serve --model {options.model} --adapter-root {root} --port {port}"
        sizes = {"max-loras": 8, "max-lora-rank": options.rank, "max-num-seqs": options.rows}
        sizes["max-model-len"] = options.prompt + options.new
        command += "".join(f" --{name} {value}" for name, value in sizes.items())
        self.log = root.with_suffix(".log").open("wb")
        arguments = [sys.executable, "-m", "lora_jax", *command.split(), *more]
        self.process = subprocess.Popen(arguments, stderr=self.log)

    def wait(self) -> None:
        """Return when the server answers."""
        while True:
            if self.process.poll() is not None:
                sys.exit(Path(self.log.name).read_text(encoding="utf-8"))
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        self.log.close()


async def ask(client: httpx.AsyncClient, number: int, options: argparse.Namespace) -> Answer:
    """Make one request and return its times."""
    body = {
        "model": adapter_of(number),
        "prompt": prompt_of(number, options),
        "max_tokens": options.new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    began, arrivals, tokens = time.perf_counter(), [], []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line[6:])["choices"]
            if found := [token for choice in choices for token in choice.get("token_ids") or []]:
                arrivals += [time.perf_counter() - began] * len(found)
                tokens += found
    gaps = [after - before for before, after in zip(arrivals, arrivals[1:], strict=False)]
    return Answer(arrivals[0], gaps, tokens)


async def load(url: str, clients: int, requests: int, options: argparse.Namespace) -> Load:
    """Make requests by a number of clients, each with one request at a time."""
    numbers = iter(range(requests))
    answers: dict[int, Answer] = {}
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as client:

        async def work() -> None:
            for number in numbers:
                answers[number] = await ask(client, number, options)

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        seconds = time.perf_counter() - began
    return Load(seconds, [answers[number] for number in sorted(answers)])


def bare_engine(connection: Any, home: Path, options: argparse.Namespace) -> None:
    """Answer as many requests as arrive over a connection, and send the seconds and tokens."""
    from lora_jax import formats, lora
    from lora_jax.generate import Engine, Request, for_decoding

    model = formats.load(options.model)
    adapters = [
        formats.read_adapter(home / "files" / adapter_of(number), model.params, model)
        for number in range(ACTIVE)
    ]
    model = for_decoding(model)
    bank = lora.bank(model.params, slots=9, rank=options.rank)
    engine = Engine(
        model, rows=options.rows, max_length=options.prompt + options.new, bank=bank, max_terms=4
    )
    for number, adapter in enumerate(adapters):
        engine.publish(adapter_of(number), *adapter)
    engine.warm_up()
    connection.send("ready")
    while (requests := connection.recv()) is not None:
        made = [
            Request(prompt_of(number, options), options.new, adapter=adapter_of(number))
            for number in range(requests)
        ]
        began = time.perf_counter()
        answers = engine.answer(made)
        connection.send((time.perf_counter() - began, [answer.tokens for answer in answers]))


def measure(
    servers: dict[str, Server], engine: Any, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Return tokens per second of each server and of the engine, by round. Every answer must have
    the same tokens everywhere.
    """
    found: dict[str, list[float]] = {name: [] for name in (*servers, ENGINE)}
    for number in range(options.rounds + 1):
        names = [*found] if number % 2 else [*reversed(found)]
        tokens = {}
        for name in names:
            if name == ENGINE:
                engine.send(options.requests)
                seconds, tokens[name] = engine.recv()
                speed = sum(map(len, tokens[name])) / seconds
            else:
                run = load(servers[name].url, 2 * options.rows, options.requests, options)
                result = asyncio.run(run)
                speed, tokens[name] = result.tokens_per_second(), [x.tokens for x in result.answers]
            if number:  # the first round warms up
                found[name].append(speed)
        if any(answers != tokens[ENGINE] for answers in tokens.values()):
            sys.exit("the answers of the server and of the engine differ")
        decode.say(f"round {number} of {options.rounds}")
    return found


def latencies(url: str, options: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Return seconds to the first token and between tokens, by number of clients."""
    report = {}
    for clients in options.clients:
        result = asyncio.run(load(url, clients, max(3 * clients, 8), options))
        first = [answer.first for answer in result.answers]
        gaps = [gap for answer in result.answers for gap in answer.gaps]
        report[clients] = {
            "tokens/s": result.tokens_per_second(),
            "first (s)": statistics.median(first),
            "first, 95 % (s)": float(np.quantile(first, 0.95)),
            "between, mean (s)": statistics.mean(gaps),
            "between, 95 % (s)": float(np.quantile(gaps, 0.95)),
        }
        decode.say(f"{clients} clients measured")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--registered", type=int, nargs="+", default=[5, 200])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rows", type=int, default=8, help="of the engine (default: 8)")
    parser.add_argument("--requests", type=int, default=40, help="per measurement (default: 40)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer (default: 32)")
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    if min(options.registered) < ACTIVE:
        parser.error(f"--registered takes {ACTIVE} or more")
    began = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        write_adapters(home, options)
        context = multiprocessing.get_context("spawn")
        engine, other = context.Pipe()
        context.Process(target=bare_engine, args=(other, home, options), daemon=True).start()
        engine.recv()
        servers = {}
        try:
            for count in options.registered:
                servers[str(count)] = Server(home / str(count), options)
                servers[str(count)].wait()
                decode.say(f"server with {count} adapters: ready")
            speeds = measure(servers, engine, options)
            report = latencies(servers[str(max(options.registered))].url, options)
        finally:
            for server in servers.values():
                server.stop()
            engine.send(None)
    least, most = (str(pick(options.registered)) for pick in (min, max))

    def ratio(one: str, other: str) -> float:
        pairs = zip(speeds[one], speeds[other], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    ratios = {"most over least registered": ratio(most, least), "over engine": ratio(most, ENGINE)}
    middle = {name: statistics.median(found) for name, found in speeds.items()}
    print_table(["adapters registered", "tokens/s"], [[*pair] for pair in middle.items()])
    print_table(
        ["clients", *report[options.clients[0]]],
        [[clients, *found.values()] for clients, found in report.items()],
    )
    line = {"ratios": ratios, "tokens_per_second": speeds, "latencies": report}
    line |= {"settings": vars(options), "machine": decode.describe_machine(os.cpu_count() or 1)}
    print(json.dumps(line | {"load_average": [began, os.getloadavg()[0]]}))


if __name__ == "__main__":
    use_huge_pages()  # as the command does; both sides get it
    main()
