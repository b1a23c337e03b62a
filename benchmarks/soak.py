"""Load on the server for some minutes; prints a table, and one JSON line last.

    python benchmarks/soak.py --minutes 10

A `lora-jax serve` on loopback with more adapters than it holds on the device and in host memory.
Clients ask for the base, adapters and weighted sums, whole and streamed, with and without a
grammar; some hang up within an answer. Meanwhile adapters are unloaded, loaded and replaced. At the
end nothing may run or wait, no program may have been compiled, and no request may have failed
otherwise than by a full queue or an adapter that was unloaded.
"""

import argparse
import collections
import json
import os
import random
import re
import tempfile
import threading
import time
from pathlib import Path

import decode
import httpx
from serve import Server, write_adapters
from tables import print_table

FORMS = ("plain", "stream", "hang up", "grammar", "sum", "log-probabilities")


def body_of(draw: random.Random, form: str, options: argparse.Namespace) -> dict:
    """Return a request of some form."""
    names = [f"adapter-{draw.randrange(options.registered[0])}" for _ in range(2)]
    body = {
        "model": draw.choice([names[0], names[0], names[0], options.base]),
        "prompt": [draw.randrange(1000, 40000) for _ in range(draw.randrange(1, options.prompt))],
        "max_tokens": draw.randrange(1, options.new),
        "temperature": draw.choice([0, 1]),
    }
    if form == "grammar":
        body["structured_outputs"] = {"regex": "[a-z]{1,8}( [0-9]{1,3})?"}
    if form == "sum":
        body["model"] = f"{names[0]}*0.5+{names[1]}*0.5"
    if form == "log-probabilities":
        body |= {"logprobs": 5, "echo": True}
    return body | {"stream": form in ("stream", "hang up")}


def client(url: str, seed: int, end: float, options: argparse.Namespace, counts: dict) -> None:
    """Make one request after the other until the end."""
    draw = random.Random(seed)
    with httpx.Client(base_url=url, timeout=120) as session:
        while time.monotonic() < end:
            form = draw.choice(FORMS)
            body = body_of(draw, form, options)
            try:
                with session.stream("POST", "/v1/completions", json=body) as response:
                    text = b""
                    for part in response.iter_raw():
                        text += part
                        if form == "hang up" and draw.random() < 0.7:
                            break
                status = response.status_code
                # Not in an answer: "error" may be a token of it.
                if status == 200 and (b'data: {"error"' in text or text.startswith(b'{"error"')):
                    status = "error in a stream"
            except httpx.TransportError as error:
                status = type(error).__name__
            counts[form, status] += 1


def operator(url: str, end: float, options: argparse.Namespace, counts: dict) -> None:
    """Unload, load and replace adapters until the end."""
    draw, headers = random.Random(0), {"authorization": "Bearer admin"}
    with httpx.Client(base_url=url, timeout=120, headers=headers) as session:
        while time.monotonic() < end:
            name = f"adapter-{draw.randrange(options.registered[0])}"
            action = draw.choice(["load", "unload"])
            body = {"lora_name": name}
            if action == "load":
                source = f"adapter-{draw.randrange(options.registered[0])}"
                body |= {"lora_path": source, "load_inplace": True}
            status = session.post(f"/v1/{action}_lora_adapter", json=body).status_code
            counts[action, status] += 1
            time.sleep(0.2)


def memory(process: int) -> float:
    """Return the resident memory of a process in MB."""
    text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1e3


def metrics(url: str) -> dict[str, float]:
    """Return the metrics without labels."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    pairs = [line.split(" ") for line in lines if not line.startswith("#") and "{" not in line]
    return {name: float(value) for name, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--registered", type=int, nargs=1, default=[48])
    parser.add_argument("--rows", type=int, default=8, help="of the engine (default: 8)")
    parser.add_argument("--prompt", type=int, default=64, help="most tokens (default: 64)")
    parser.add_argument("--new", type=int, default=24, help="most tokens (default: 24)")
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    counts: dict = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        write_adapters(Path(directory), options)
        limits = ["--max-cpu-loras", "24", "--admin-key", "admin"]
        server = Server(Path(directory) / str(options.registered[0]), options, limits)
        try:
            server.wait()
            options.base = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
            before, sizes = metrics(server.url), [memory(server.process.pid)]
            end = time.monotonic() + 60 * options.minutes
            arguments = [
                (server.url, seed, end, options, counts) for seed in range(options.clients)
            ]
            threads = [threading.Thread(target=client, args=one) for one in arguments]
            threads += [threading.Thread(target=operator, args=(server.url, end, options, counts))]
            [thread.start() for thread in threads]
            while time.monotonic() < end:
                time.sleep(min(60, max(0, end - time.monotonic())))
                sizes.append(memory(server.process.pid))
                decode.say(f"{sum(counts.values())} requests, {sizes[-1]:.0f} MB")
            [thread.join() for thread in threads]
            time.sleep(5)
            after = metrics(server.url)
        finally:
            server.stop()
    lines = [[form, status, count] for (form, status), count in sorted(counts.items(), key=str)]
    print_table(["request", "status", "number"], lines)
    allowed = {200, 404, 429}
    wrong = [line for line in lines if line[1] not in allowed]
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "compiled_programs_total")
    left = {name: [before.get(name), after.get(name)] for name in names}
    result = {"requests": sum(counts.values()), "wrong": wrong, "before and after": left}
    result |= {"memory_mb": sizes, "exit_status": server.process.returncode}
    print(json.dumps(result | {"machine": decode.describe_machine(os.cpu_count() or 1)}))


if __name__ == "__main__":
    main()
