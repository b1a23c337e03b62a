"""One run on two and on four hosts, which are processes of this machine, is the run of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from lora_jax.report.journal import read_lines
from lora_jax.train import checkpoint

from ..train.tiny import SUMS, write_model, write_rows

SETTINGS = {
    "adapter": {"rank": 4, "dropout": 0.2},
    "train": {
        "steps": 6,
        "batch_size": 4,
        "remat": "none",
        "learning_rate": 2e-3,
        "epsilon": 1e-5,  # AdamW makes whole steps of the rounding of small gradients otherwise
        "eval_every": 3,
        "save_every": 2,
    },
    "eval": {"batch_size": 4, "max_new_tokens": 4, "samples": 1},
    "mesh": {"data": 1, "fsdp": -1},
    "hosts": {"lost_after": 15},
}
PLAIN = ("data.eval=null",)
BYTES = 96_896  # of all weights of the model
NORMS = 640  # of those that lie whole on every device


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("multihost")
    model = write_model(directory / "model")
    rows = str(write_rows(directory / "rows.jsonl", SUMS))
    data = {"train": rows, "eval": rows, "max_length": 96}
    settings = {"model": str(model), "data": data, **SETTINGS}
    (directory / "run.yaml").write_text(yaml.safe_dump(settings))
    return directory


@pytest.fixture(scope="module")
def launch(files):
    """`launch(name, hosts, *overrides, **job)`: statuses of the hosts; files.name is the output."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "LORA_JAX_CACHE": str(files / "cache")}
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("launcher.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )

    def run(name, hosts, *overrides, **job):
        logs = files / f"logs-{name}"
        logs.mkdir(exist_ok=True)
        arguments = ["--config", str(files / "run.yaml"), f"output_dir={files / name}", *overrides]
        job |= {"hosts": hosts, "arguments": arguments, "logs": str(logs)}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    with process:  # which closes its input, and waits
        yield run


@pytest.fixture(scope="module")
def one(files, launch):
    assert launch("one", 1) == [0], log(files, "one", 0)
    return files / "one"


@pytest.fixture(scope="module")
def two(files, launch):
    assert launch("two", 2) == [0, 0], log(files, "two", 1)
    return files / "two"


def log(files, name, host):
    return (files / f"logs-{name}" / f"host-{host}.txt").read_text()


def counts(files, name, host):
    return json.loads((files / f"logs-{name}" / f"host-{host}.json").read_text())


def curve(output):
    """The loss and gradient norm of every step, and the held-out losses."""
    names = ("step", "loss", "grad_norm", "task_loss", "supervised_tokens")
    return [
        {name: line[name] for name in names if name in line}
        for line in read_lines(output / "metrics.jsonl")
    ]


def training(output):
    return [
        {name: value for name, value in line.items() if name != "task_loss"}
        for line in curve(output)
    ]


def apart(found, expected):
    """The largest |x - y| / max(1, |y|) over the numbers of two curves."""
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    return max(
        abs(line[name] - other[name]) / max(1, abs(other[name]))
        for line, other in zip(found, expected, strict=True)
        for name in other
    )


def adapters_apart(found, expected):
    x, y = (load_file(out / "adapter/adapter_model.safetensors") for out in (found, expected))
    assert x.keys() == y.keys()
    return max(np.max(np.abs(x[k] - y[k])) / max(1, np.max(np.abs(y[k]))) for k in y)


def test_two_hosts_train_and_measure_what_one_does(one, two):
    assert [line["step"] for line in curve(one)] == list(range(1, 7))
    assert apart(curve(two), curve(one)) <= 1e-5
    assert adapters_apart(two, one) <= 1e-5
    texts = [(out / "samples.jsonl").read_text() for out in (one, two)]
    assert texts[0] == texts[1]
    scores = [json.loads((out / "summary.json").read_text())["task"] for out in (one, two)]
    assert scores[0]["examples"] == 23 and scores[0].keys() == scores[1].keys()
    assert all(abs(scores[0][name] - scores[1][name]) <= 1e-5 for name in scores[0])


def test_each_host_reads_its_shards_and_rows_alone(files, one, two):
    assert counts(files, "one", 0) == {"weights": BYTES, "rows": 24}
    half = {"weights": (BYTES - NORMS) // 2 + NORMS, "rows": 12}
    assert [counts(files, "two", host) for host in (0, 1)] == [half, half]


def test_one_host_speaks_and_writes(files, one, two):
    def names(out):
        return {p.relative_to(out) for p in out.rglob("*") if "checkpoints" not in p.parts}

    assert names(two) == names(one)
    assert "step 6: task loss" in log(files, "two", 0)
    lines = [line for line in log(files, "two", 1).splitlines() if "[Gloo]" not in line]
    assert lines == []


@pytest.mark.slow
def test_four_hosts_with_replicas_train_what_one_does(files, launch, one):
    options = ("mesh.data=2", "mesh.fsdp=2", *PLAIN)
    assert launch("four", 4, *options) == [0] * 4, log(files, "four", 1)
    assert apart(training(files / "four"), training(one)) <= 1e-5
    assert adapters_apart(files / "four", one) <= 1e-5
    quarter = {"weights": (BYTES - NORMS) // 2 + NORMS, "rows": 6}
    assert [counts(files, "four", host) for host in range(4)] == [quarter] * 4


@pytest.mark.slow
def test_a_killed_host_ends_the_other_and_a_restart_of_both_goes_on(files, launch, two):
    killed, survivor = launch("killed", 2, *PLAIN, harm=[1, 5, "SIGKILL"])[::-1]
    assert killed == -9 and survivor not in (0, "hung"), survivor
    assert checkpoint.list_steps(files / "killed/checkpoints")[-1] == 4
    assert launch("killed", 2, *PLAIN, "resume=true") == [0, 0], log(files, "killed", 0)
    assert training(files / "killed") == training(two)
    names = [out / "adapter/adapter_model.safetensors" for out in (files / "killed", two)]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_without_the_coordinator_the_others_end(files, launch):
    killed, survivor = launch("headless", 2, *PLAIN, harm=[0, "data", "SIGKILL"])
    assert killed == -9 and survivor not in (0, "hung"), survivor


def test_a_signal_to_one_saves_all_and_one_host_can_go_on(files, launch, one):
    """With checkpoints in a directory of their own: the outputs need not be shared."""
    place = files / "shared-checkpoints"
    elsewhere = {"1": [f"output_dir={files / 'elsewhere'}"]}
    options = (*PLAIN, f"checkpoint_dir={place}")
    harm = [1, 5, "SIGTERM"]
    assert launch("stopped", 2, *options, harm=harm, own=elsewhere) == [0, 0]
    assert "SIGTERM: step 5 is saved; resume=true goes on" in log(files, "stopped", 0)
    assert checkpoint.list_steps(place) == [4, 5]
    assert not (files / "elsewhere").exists()
    assert launch("stopped", 1, *options, "resume=true") == [0], log(files, "stopped", 0)
    assert apart(training(files / "stopped"), training(one)) <= 1e-5
    assert adapters_apart(files / "stopped", one) <= 1e-5


def test_what_one_host_finds_damaged_ends_all_with_its_words(files, launch):
    assert launch("damaged", 2, harm=[1, "data"]) == [2, 2]
    problem = "rows.jsonl is damaged on this host"
    assert f"host 1 ended the run: {problem}" in log(files, "damaged", 0)
    assert f"error: {problem}" in log(files, "damaged", 1)


def test_directories_that_are_not_shared_are_refused(files, launch):
    own = {"1": [f"output_dir={files / 'apart-1'}"]}
    assert launch("apart", 2, own=own) == [2, 2]
    assert "is not the same directory on host 1 as on host 0" in log(files, "apart", 1)
    assert "set checkpoint_dir" in log(files, "apart", 0)
    assert list((files / "apart").iterdir()) == []


@pytest.mark.parametrize(
    ("absent", "expected"),
    [(0, "cannot be reached: Connection refused"), (1, "not all 2 processes came within 2 s")],
)
def test_hosts_that_do_not_come_are_told_of_in_time(files, launch, absent, expected):
    name = f"without-{absent}"
    assert launch(name, 2, "hosts.start_timeout=2", absent=[absent]) == [2]
    text = log(files, name, 1 - absent)
    assert "error: the coordinator localhost:" in text and expected in text
    assert not (files / name).exists()
