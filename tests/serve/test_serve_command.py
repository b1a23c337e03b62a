"""`lora-jax serve` as a process: its lines, its end, and its mistakes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lora_jax import cli

from ..train.tiny import write_model
from .live import until, write_adapter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from lora_jax import formats

    home = tmp_path_factory.mktemp("files")
    source = write_model(home / "tiny")
    write_adapter(formats.load(source), home / "root" / "a1", 1)
    return source, home / "root"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(files, port, *more):
    arguments = ["serve", "--model", files[0], "--adapter-root", files[1], "--port", port]
    arguments += ["--max-num-seqs", 2, "--max-model-len", 2000, "--max-loras", 2, *more]
    return subprocess.Popen(
        [sys.executable, "-m", "lora_jax", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )


def get(port, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def test_it_opens_answers_drains_and_ends(files):
    """The port is open while programs are compiled; requests that run at SIGTERM are answered."""
    port = free_port()
    process = start(files, port)
    try:
        until(lambda: get(port, "/health")[0])
        status, body = get(port, "/v1/models")
        assert status in (200, 503)
        until(lambda: get(port, "/health")[0] == 200, seconds=240)
        assert [model["id"] for model in json.loads(get(port, "/v1/models")[1])["data"]] == [
            "tiny",
            "a1",
        ]
        body = {"model": "a1", "prompt": "hello", "max_tokens": 600, "ignore_eos": True}
        found = {}

        def ask(stream):
            found[stream] = get(port, "/v1/completions", {**body, "stream": stream})

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        for thread in threads:
            thread.start()
        until(lambda: "num_requests_running 2" in get(port, "/metrics")[1])
        process.send_signal(signal.SIGTERM)
        until(lambda: get(port, "/health")[0] != 200)
        for thread in threads:
            thread.join(120)
        assert found[False][0] == found[True][0] == 200
        assert json.loads(found[False][1])["usage"]["completion_tokens"] == 600
        assert found[True][1].rstrip().endswith("data: [DONE]")
        assert '"finish_reason":"length"' in found[True][1]
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    lines = err.splitlines()
    for words in ("listening on", "loading", "compiling", "no request compiles", "ready: http"):
        assert any(words in line for line in lines), err
    assert "Traceback" not in err and "draining" in err and "POST /v1/completions 200" in err


def test_a_signal_while_it_compiles_ends_it(files):
    port = free_port()
    process = start(files, port)
    try:
        until(lambda: get(port, "/health")[0] == 503)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in err, err


def test_a_port_that_is_taken(files):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start(files, taken.getsockname()[1])
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.startswith("error: --port"), err  # nothing was loaded
    assert "cannot be opened" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nothing"}, "model='nothing' does not exist"),
        ({"--adapter-root": "nothing"}, "there is no such directory"),
        ({"--served-model-name": "a1"}, "an adapter with the name of the base, a1"),
        ({"--max-lora-rank": "0"}, "must be at least 1"),
        ({"--timeout": "0"}, "must be above 0"),
        ({"--port": "x"}, "is no whole number"),
    ],
)
def test_mistakes(files, capsys, change, message):
    given = {"--model": str(files[0]), "--adapter-root": str(files[1])} | change
    try:
        status = cli.main(["serve", *(text for pair in given.items() for text in pair)])
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err


def test_the_extra_is_named(files, capsys, monkeypatch):
    monkeypatch.setattr(cli.serve, "NEEDED", ("starlette", "absent_package"))
    assert cli.main(["serve", "--model", str(files[0])]) == 2
    err = capsys.readouterr().err
    assert "absent_package" in err and "pip install 'lora_jax[serve]'" in err
