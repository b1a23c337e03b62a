"""The command as a process: its arguments, streams and signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COMMAND = [sys.executable, "-m", "lora_jax"]


def start(*arguments, env=None, command=COMMAND, **options):
    """The command, with its output in pipes."""
    return subprocess.Popen(
        [*command, *arguments],
        env=os.environ | {"PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu"} | (env or {}),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
    )


def finish(*arguments, **options):
    """The status of the command, and what it printed."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, (out or b"").decode(), (err or b"").decode()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", b"\xff/x", "--prompt", "a"],
        ["generate", "--model", "x", "--prompt", b"caf\xe9"],
        ["generate", "--model", "x", "--prompt", "a", "--adapter", b"\xc3"],
        ["train", "--config", "x", b"output_dir=\xe9"],
        ["export", "--run", b"\x80", "--format", "hf", "--output", "y"],
    ],
    ids=lambda value: value[0],
)
def test_an_argument_that_is_not_utf8(arguments):
    status, out, err = finish(*arguments)
    assert (status, out) == (2, "") and "Traceback" not in err
    assert err.splitlines()[-1].startswith("lora-jax") or "error: the argument '" in err
    assert "is not utf-8 text" in err.splitlines()[-1]


def test_names_are_printed_in_every_encoding():
    for env in ({"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": ""}):
        status, _, err = finish("generate", "--model", "é/日", "--prompt", "a/b", env=env)
        assert status == 2 and err.startswith("error: model=") and "Traceback" not in err


def test_what_stdout_cannot_encode_is_escaped(tmp_path):
    script = (
        "from lora_jax import start, cli; cli.main = lambda: print('é日') or 0; start.run('main')"
    )
    command = [sys.executable, "-c", script]
    status, out, _ = finish(command=command, env={"PYTHONIOENCODING": "ascii"})
    assert (status, out) == (0, "\\xe9\\u65e5\n")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_streams_that_are_closed(closed, tmp_path):
    """No file that is opened may take their place."""
    script = (
        "import os; from lora_jax import start, cli\n"
        f"def main():\n    file = os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_RDWR)\n"
        "    print('a'); return 7 if file > 2 else 8\n"
        "cli.main = main; start.run('main')"
    )
    shut = " ".join(f"{descriptor}>&-" for descriptor in closed)
    shell = ["bash", "-c", f'exec "$0" -c "$1" {shut}', sys.executable, script]
    status, _, err = finish(command=shell)
    assert status == 7 and "Traceback" not in err and (tmp_path / "file").read_text() == ""


def test_a_reader_that_has_gone_ends_the_command_quietly():
    for unbuffered in ("", "1"):
        read, write = os.pipe()
        os.close(read)
        status, _, err = finish("--help", stdout=write, env={"PYTHONUNBUFFERED": unbuffered})
        os.close(write)
        assert status in (0, 141, 120) and "Traceback" not in err
    script = (
        "import sys; from lora_jax import start, cli\n"
        "import argparse, os\n"
        "def show(options):\n    for _ in range(10**6): print('x' * 100)\n"
        "options = argparse.Namespace(function=show, verbose=False)\n"
        "cli.main = lambda: cli._run(options); start.run('main')"
    )
    head = ["bash", "-c", '"$0" -c "$1" | head -n 1; exit ${PIPESTATUS[0]}', sys.executable, script]
    status, out, err = finish(command=head)
    assert (status, out.strip(), err) == (141, "x" * 100, "")


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.4, 1.0, 1.6])
def test_two_hundred_interrupts(delay, tmp_path):
    """While it starts, imports and works; within the second in which they count as one."""
    process = start(
        "generate", "--model", "x", "--prompt", "a", command=[sys.executable, "-c", _SLOW]
    )
    assert process.stdout is not None
    process.stdout.readline()  # the handler is there
    time.sleep(delay)
    end = time.monotonic() + 0.8
    for _ in range(200):
        if time.monotonic() < end:
            process.send_signal(signal.SIGINT)
            time.sleep(0.001)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"interrupted\n")


_SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests ignore it
from lora_jax import start
held = start._open_streams
def opened():
    held()
    print("ready", flush=True)
start._open_streams = opened
from importlib.abc import MetaPathFinder
class Slow(MetaPathFinder):
    def find_spec(self, *names):
        time.sleep(0.002)
sys.meta_path.insert(0, Slow())
def answer(*a, **b):
    time.sleep(60)
import types
sys.modules["lora_jax.generate.answer"] = types.SimpleNamespace(answer=answer)
start.run("main")
"""


@pytest.mark.parametrize("module", ["numpy", "numpy._core.getlimits"])
def test_an_interrupt_inside_an_import(module):
    """Extensions that import numpy print what ends its import, and raise another error."""
    script = f"AT = {module!r}\n{_INSIDE_AN_IMPORT}"
    status, out, err = finish(
        "generate", "--model", "x", "--prompt", "a", command=[sys.executable, "-c", script]
    )
    assert (status, out, err) == (130, "", "interrupted\n")


_INSIDE_AN_IMPORT = """
import signal, sys
from importlib.abc import MetaPathFinder
class Press(MetaPathFinder):
    def find_spec(self, name, *rest):
        if name == AT:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests ignore it
from lora_jax import start
sys.meta_path.insert(0, Press())
start.run("main")
"""
