"""One process at a time holds a directory; one that is dead holds nothing."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from lora_jax.errors import UserError
from lora_jax.train import lock
from lora_jax.train.lock import NAME, hold

PROGRAM = """
import contextlib, sys, time
from pathlib import Path
from lora_jax.errors import UserError
from lora_jax.train.lock import hold
print("ready", flush=True)
sys.stdin.readline()
try:
    with hold(Path(sys.argv[1]), "output_dir"):
        print("held", flush=True)
        sys.stdin.readline()
except UserError as error:
    print("refused", error, flush=True)
"""


@pytest.fixture
def start():
    """`start(directory)`: a process that locks it as soon as it reads a line."""
    with contextlib.ExitStack() as stack:

        def run(directory):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, str(directory)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            assert process.stdout.readline() == "ready\n"
            return process

        yield run


def send(process):
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process):
    send(process)
    return process.stdout.readline()


def refused(directory):
    with pytest.raises(UserError) as caught, hold(directory, "output_dir"):
        pass
    return str(caught.value)


def test_a_second_holder_is_told_who_the_first_is(tmp_path, start):
    first, second = start(tmp_path), start(tmp_path)
    assert answer(first) == "held\n"
    told = answer(second)
    assert told.startswith(f"refused output_dir={str(tmp_path)!r} is in use by process {first.pid}")
    assert f"on host {socket.gethostname()} since 20" in told and "last seen" not in told
    send(first)
    first.wait()
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path, "output_dir"):
        assert [file.name for file in tmp_path.iterdir()] == [NAME]
    assert list(tmp_path.iterdir()) == []


def test_another_run_in_the_same_process_is_refused(tmp_path):
    with hold(tmp_path, "output_dir"):
        assert f"in use by process {os.getpid()}" in refused(tmp_path)
        with pytest.raises(UserError, match="in use"):
            lock.look(tmp_path, "output_dir")
    lock.look(tmp_path, "output_dir")


def test_a_killed_holder_holds_nothing(tmp_path, start):
    first = start(tmp_path)
    assert answer(first) == "held\n"
    first.kill()
    time.sleep(0.05)  # a zombie, whose number is still taken
    with hold(tmp_path, "output_dir"):
        assert [file.name for file in tmp_path.iterdir()] == [NAME]
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_outlives_the_holder_does_not_hold_on(tmp_path):
    child = f"""
import os, sys, time
from pathlib import Path
from lora_jax.train.lock import hold
with hold(Path({str(tmp_path)!r}), "output_dir"):
    if os.fork() == 0:
        print("held", flush=True)  # once the fork has let go of what it inherited
        os.close(1)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", child], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        assert "in use" in refused(tmp_path)
        process.kill()
        process.wait()
        with hold(tmp_path, "output_dir"):
            pass
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_together_one_wins(tmp_path, start, stale):
    rivals = [start(tmp_path) for _ in range(6)]
    if stale:
        dead = start(tmp_path)
        assert answer(dead) == "held\n"
        dead.kill()
        dead.wait()
    for rival in rivals:
        send(rival)
    answers = [rival.stdout.readline() for rival in rivals]
    assert sorted(text.split()[0] for text in answers) == ["held"] + ["refused"] * 5
    winner = rivals[answers.index("held\n")]
    assert all(f"by process {winner.pid} on" in text for text in answers if text != "held\n")
    send(winner)
    winner.wait()
    assert list(tmp_path.iterdir()) == []


def write(directory, age=0.0, name=NAME, **fields):
    """The lock of a process elsewhere, renewed `age` seconds ago."""
    record = {
        **{"token": "0" * 16, "host": "elsewhere", "pid": 7, "since": time.time() - 3600},
        **{"machine": "another", "namespace": "pid:[1]", "started": "5", "locked": True},
    }
    file = directory / name
    file.write_text(json.dumps(record | fields))
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_another_host_is_known_by_its_heartbeat(tmp_path):
    file = write(tmp_path, age=30)
    content = file.read_bytes()
    told = refused(tmp_path)
    assert "by process 7 on host elsewhere since" in told
    assert "It was last seen 30 s ago" in told or "31 s ago" in told
    assert f"or remove {file}" in told
    assert [path.name for path in tmp_path.iterdir()] == [NAME] and file.read_bytes() == content
    write(tmp_path, age=lock.DEAD + 1)
    with hold(tmp_path, "output_dir"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    file.unlink(missing_ok=True)
    write(tmp_path, age=-7200)  # a clock that was wrong
    with hold(tmp_path, "output_dir"):
        pass


def test_without_flock_the_process_decides_by_number_and_start(tmp_path):
    here = {"machine": lock._machine(), "namespace": lock._namespace(), "locked": False}
    own = lock._start_time(os.getpid())
    write(tmp_path, **here, pid=os.getpid(), started=own, age=9999)
    assert f"in use by process {os.getpid()}" in refused(tmp_path)
    write(tmp_path, **here, pid=os.getpid(), started="1")  # the number was given to another one
    with hold(tmp_path, "output_dir"):
        pass
    write(tmp_path, **(here | {"namespace": "pid:[2]"}), pid=os.getpid(), started="1")
    assert "last seen" in refused(tmp_path)  # a container: its numbers are not ours


def test_an_heir_that_died_half_way_is_followed(tmp_path):
    dead = {"age": lock.DEAD + 1}
    write(tmp_path, **dead)
    write(tmp_path, name=f"{NAME}-after-{'0' * 16}", token="1" * 16, **dead)
    write(tmp_path, name=f"{NAME}-{'2' * 16}", token="2" * 16, **dead)
    empty = tmp_path / f"{NAME}-{'4' * 16}"
    empty.write_text("")
    os.utime(empty, (time.time() - lock.DEAD - 1,) * 2)
    write(tmp_path, name=f"{NAME}-after-{'1' * 16}", token="3" * 16, host="third")
    assert "on host third" in refused(tmp_path)
    write(tmp_path, name=f"{NAME}-after-{'1' * 16}", token="3" * 16, **dead)
    with hold(tmp_path, "output_dir"):
        assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_without_hard_links_it_works_too(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    for _ in range(2):
        write(tmp_path, age=lock.DEAD + 1)
        with hold(tmp_path, "output_dir"):
            assert "in use" in refused(tmp_path)
        assert list(tmp_path.iterdir()) == []


NO_LOCKS = {
    "deep": "[" * 4000,
    "infinite process": '{"token": "0000000000000000", "machine": "x", "pid": 1e999, "since": 1}',
    "infinite time": '{"token": "0000000000000000", "machine": "x", "pid": 1, "since": Infinity}',
    "late": '{"token": "0000000000000000", "machine": "x", "pid": 1, "since": 1e15}',
}


@pytest.mark.parametrize(
    "kind", ["empty", "text", "list", "path", "link", "directory", "host", *NO_LOCKS]
)
def test_what_is_no_lock_is_refused_and_kept(tmp_path, kind):
    file, other = tmp_path / NAME, tmp_path / "other"
    other.write_text("mine")
    match kind:
        case "link":
            file.symlink_to(other)
        case "directory":
            file.mkdir()
        case "path":
            write(tmp_path, token="../other")
        case "host":
            write(tmp_path, host="\x1b[31m" + "x" * 3000)
        case _:
            file.write_text({"empty": "", "text": "x", "list": "[]", **NO_LOCKS}[kind])
    told = refused(tmp_path)
    assert kind == "host" or (str(file) in told and "remove it" in told)
    assert len(told) < 1000 and told.isprintable()
    assert other.read_text() == "mine" and (file.exists() or file.is_symlink())
    assert len(list(tmp_path.iterdir())) == 2


def test_the_holder_notices_what_becomes_of_its_file(tmp_path):
    with hold(tmp_path, "output_dir") as held:
        held.check()
        (tmp_path / NAME).unlink()
        held.check()
        assert "in use" in refused(tmp_path)
        (tmp_path / NAME).unlink()
        write(tmp_path)
        with pytest.raises(UserError, match="by process 7 on host elsewhere"):
            held.check()
    assert (tmp_path / NAME).exists()


def test_the_holder_renews_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with hold(tmp_path, "output_dir"):
        os.utime(tmp_path / NAME, (0, 0))
        until = time.monotonic() + 60
        while (tmp_path / NAME).stat().st_mtime == 0:
            assert time.monotonic() < until
            time.sleep(0.01)
