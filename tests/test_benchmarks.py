"""The benchmarks beside PEFT at tiny sizes: what they print, and how their ratios are made."""

import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from .train.tiny import SUMS, write_model, write_rows

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WARM = 2
ONE_PART = ["--rows", "2", "--length", "16", "--steps", "4", "--rank", "4", "--rounds", "1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Options that name a tiny model and rows. Where 64 divides the inputs of a weight, its NF4 is
    that of bitsandbytes.
    """
    home = tmp_path_factory.mktemp("vs_peft")
    model = write_model(
        home / "model", max_position_embeddings=1024, hidden_size=64, intermediate_size=128
    )
    rows = write_rows(home / "rows.jsonl", SUMS)
    return ["--model", str(model), "--data", str(rows)]


@pytest.fixture
def load(monkeypatch):
    """`load(name)`: a benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for file in BENCHMARKS.glob("*.py"):
        sys.modules.pop(file.stem, None)


def call(script, *options, **environment):
    """The finished command; transparent huge pages would only start it again."""
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options],
        env=os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"} | environment,
        capture_output=True,
        text=True,
    )


def report(done):
    """The JSON of the last line."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def figure(run, name):
    """A figure from the raw report of a run."""
    seconds = run["step_seconds"][WARM:]
    if name == "tokens":
        return sum(run["supervised"][WARM:]) / sum(seconds)
    return statistics.median(seconds) if name == "step" else run[name]


def ratio(found, part, name):
    """The median over rounds of ours over PEFT's."""
    pairs = zip(found["raw"][part]["ours"], found["raw"][part]["peft"], strict=True)
    return statistics.median(figure(ours, name) / figure(peft, name) for ours, peft in pairs)


def test_a_step_beside_peft(files):
    """Same tokens and first loss, a ratio of the raw times, and the rates of products."""
    done = call("vs_peft.py", *files, *ONE_PART, "--parts", "step")
    found = report(done)
    assert {key for key in found if key.endswith("ratio")} == {"step_ratio"}
    assert found["step_ratio"] == ratio(found, "step", "step")
    (ours,), (peft,) = found["raw"]["step"]["ours"], found["raw"]["step"]["peft"]
    assert ours["supervised"] == peft["supervised"] == [30] * 4
    assert ours["losses"] == pytest.approx(peft["losses"], abs=0.05)  # lora_a is drawn by each
    assert abs(ours["losses"][0] - peft["losses"][0]) < 1e-3
    assert set(found["machine"]["gflops"]) == {"xla", "torch"}
    assert min(found["machine"]["gflops"].values()) > 0 and found["machine"]["cores"] >= 1
    assert min(ours["peak_rss"], peft["peak_rss"]) > 5e7
    assert "step: a step (s)" in done.stdout


@pytest.mark.slow
def test_all_parts_beside_peft(files):
    """Packed rows hold as many examples as PEFT's batches, every example is trained on once, both
    adapters are written, and all ratios are those of the raw figures.
    """
    sizes = ["--examples", "23", "--long-examples", "12", "--batch", "4", "--prompt-tokens", "300"]
    found = report(call("vs_peft.py", *files, *ONE_PART, *sizes))
    made = {
        "step_ratio": ("step", "step"),
        "packed_tokens_ratio": ("task", "tokens"),
        "long_prompt_tokens_ratio": ("long", "tokens"),
        "rss_ratio": ("task", "peak_rss"),
        "job_ratio": ("task", "job_seconds"),
        "first_step_ratio": ("task", "first_step"),
        "nf4_step_ratio": ("nf4", "step"),
        "dora_step_ratio": ("dora", "step"),
    }
    assert {key for key in found if key.endswith("ratio")} == set(made)
    for key, (part, name) in made.items():
        assert found[key] == pytest.approx(ratio(found, part, name)), key
    for part, count in (("task", 23), ("long", 12)):
        (ours,), (peft,) = found["raw"][part]["ours"], found["raw"][part]["peft"]
        assert sum(peft["examples"]) == sum(ours["examples"]) == count
        assert sum(peft["supervised"]) == sum(ours["supervised"])
        assert 2 < statistics.mean(ours["examples"]) < 6
    jobs = found["jobs"]
    assert jobs["long"]["ours"]["share_prompts"] is True
    # 300 tokens once in a row, and not for each of its examples.
    assert 300 < jobs["long"]["ours"]["length"] < 2 * 300
    assert jobs["task"]["ours"]["adapter"] != jobs["task"]["peft"]["adapter"]
    first = {side: runs[0]["losses"][0] for side, runs in found["raw"]["nf4"].items()}
    assert first["ours"] == pytest.approx(first["peft"], abs=0.05)


def test_sides_that_differ_end_the_comparison(load):
    """Losses further apart than 1e-3, a loss that is no number, and other tokens."""
    vs_peft = load("vs_peft")

    def runs(loss, tokens=(30, 30)):
        same = {"supervised": [30, 30], "losses": [5.0, 4.0]}
        return {"ours": same, "peft": {"supervised": [*tokens], "losses": [loss, 3.0]}}

    vs_peft.check_same("step", runs(5.0009))
    vs_peft.check_same("task", runs(6.0))
    for part, wrong in (("step", runs(5.0011)), ("dora", runs(float("nan")))):
        with pytest.raises(vs_peft.Disagreement, match="losses of the first step"):
            vs_peft.check_same(part, wrong)
    with pytest.raises(vs_peft.Disagreement, match="supervised tokens"):
        vs_peft.check_same("step", runs(5.0, tokens=(30, 31)))


def test_ratios_are_medians_over_rounds(load):
    """Of the ratio in each round, not a ratio of medians; the first two steps do not count."""
    vs_peft = load("vs_peft")

    def run(step):
        times = {"step_seconds": [99.0, 99.0, step], "supervised": [10] * 3}
        return times | {"peak_rss": 1, "job_seconds": 1.0, "first_step": 1.0}

    rounds = {"ours": [run(1.0), run(2.0), run(9.0)], "peft": [run(2.0), run(1.0), run(10.0)]}
    lines, ratios = vs_peft.summarize({"step": rounds})
    assert ratios == {"step_ratio": 0.9}
    assert lines == [["step: a step (s)", 2.0, 2.0, 0.9]]


@pytest.mark.parametrize(
    ("script", "options", "text"),
    [
        ("vs_peft.py", ["--steps", "2"], "a process needs more than 2 steps"),
        ("vs_peft.py", ["--parts", "stepp"], "invalid choice: 'stepp'"),
        ("vs_peft.py", ["--model", "no/where/at/all"], "error: "),
        ("gpu.py", [], "error: nvidia-smi finds no GPU here; --tiny runs everything on the CPU"),
    ],
)
def test_mistakes_are_one_error(script, options, text, tmp_path):
    done = call(script, *options, PATH=str(tmp_path))
    assert done.returncode in (1, 2) and text in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_gpu_at_tiny_size():
    """All cases run, no card is invented, and ratios are those of the steps."""
    done = call("gpu.py", "--tiny")
    found = report(done)
    cases = {(one["side"], one["method"]): one for one in found["cases"]}
    assert set(cases) == {(side, m) for side in ("ours", "peft") for m in ("lora", "nf4", "dora")}
    assert not [one for one in found["cases"] if "error" in one or "mfu" in one]
    for method in ("lora", "nf4", "dora"):
        steps = [cases[side, method]["step"] for side in ("ours", "peft")]
        assert found["ratios"][f"{method}_step_ratio"] == pytest.approx(steps[0] / steps[1])
    losses = [one["runs"][0]["losses"][0] for one in found["raw"]]
    assert max(losses) - min(losses) < 0.05
    assert found["model_flops"] > 0 and found["peak_flops"] is None
    assert "MFU is left out" in done.stdout


def test_figures_of_a_gpu(load):
    """MFU where the card is known, errors in place of figures, our fastest attention in ratios."""
    gpu, sides = load("gpu"), load("sides")
    job = sides.Job(model="m", rows="r", steps=4, batch=2, length=8)
    speed = {"flops": 50e12, "peak": gpu.find_peak("NVIDIA A100-SXM4-80GB")}

    def summarize(side, attention, step, **more):
        runs = [{"step_seconds": [9.0, 9.0, step, step], "peak_rss": 3, "device_bytes": 2, **more}]
        return gpu.summarize(gpu.Case(side, "lora", attention), runs, job, speed)

    found = [
        summarize("ours", "xla", 0.5),
        summarize("ours", "cudnn", 0.25),
        summarize("peft", "sdpa", 1.0),
    ]
    assert found[0]["mfu"] == pytest.approx(50e12 / 0.5 / 312e12)
    assert found[0]["tokens_per_second"] == 32 and found[0]["peak_bytes"] == 2
    assert gpu.compare(found) == {"lora_step_ratio": 0.25, "cudnn_over_xla": 0.5}
    found[1] = summarize("ours", "cudnn", 0.25, error="RESOURCE_EXHAUSTED")
    assert found[1]["error"] == "RESOURCE_EXHAUSTED" and "step" not in found[1]
    assert gpu.compare(found) == {"lora_step_ratio": 0.5}
    names = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A10G": None}
    assert {name: gpu.find_peak(name) for name in names} == names


def test_rows_hold_as_many_examples_as_a_batch(load):
    """Whatever their lengths; with shared prompts, the prompt counts once in a row."""
    import numpy as np

    from lora_jax.data import Example

    vs_peft, rng = load("vs_peft"), np.random.default_rng(0)

    def make(prompt):
        start = np.arange(prompt)
        texts = [np.concatenate([start, rng.integers(5, 99, n)]) for n in rng.integers(20, 60, 96)]
        weights = [(np.arange(len(text)) >= prompt).astype(np.float32) for text in texts]
        return [Example(t.astype(np.int32), w, "row") for t, w in zip(texts, weights, strict=True)]

    length, steps = vs_peft.fit_rows(make(0), 2, 8, shares=False)
    assert 150 < length < 200 and 11 <= steps <= 13
    shared, steps = vs_peft.fit_rows(make(200), 1, 8, shares=True)
    whole, _ = vs_peft.fit_rows(make(200), 1, 8, shares=False)
    assert 500 < shared < 580 and 11 <= steps <= 13
    assert whole > 1800
