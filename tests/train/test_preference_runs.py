"""Runs on preferences: the first loss, what they learn, resuming, references, mistakes."""

import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import yaml

from lora_jax.cli import main, train_main
from lora_jax.report.journal import read_lines

from .test_resume import interrupted as interrupted  # a fixture
from .test_resume import trace
from .tiny import write_model, write_rows

LN_2 = float(np.log(np.float32(2)))
PAIRS = [
    {
        "prompt": f"what is {i} plus {i % 5}",
        "chosen": str(i + i % 5) * (1 + i % 3),
        "rejected": "no idea " + "x" * (i % 7),
    }
    for i in range(13)
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": i % 2}
    for i, row in enumerate(PAIRS)
]
SETTINGS = {
    "adapter": {"rank": 4},
    "train": {
        "objective": "dpo",
        "steps": 3,
        "batch_size": 4,
        "micro_batch_size": 2,
        "remat": "none",
        "learning_rate": 5e-3,
        "eval_every": 2,
        "save_every": 2,
    },
    "eval": {"batch_size": 4, "generate": False},
    "export": {"peft": True},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`run.yaml` over pairs, `pairs.jsonl` and `judged.jsonl`, and `sft`, an adapter."""
    directory = tmp_path_factory.mktemp("preference")
    model = write_model(directory / "model", num_hidden_layers=1)
    rows = str(write_rows(directory / "pairs.jsonl", PAIRS))
    write_rows(directory / "judged.jsonl", JUDGED)
    one = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    answers = str(write_rows(directory / "one.jsonl", one))
    data = {"train": rows, "eval": rows, "max_length": 224}
    content = {"model": str(model), "data": data, **SETTINGS}
    (directory / "run.yaml").write_text(yaml.safe_dump(content))
    alone = ("train.objective=sft", "eval.before=false", "train.eval_every=null")
    sources = (f"data.train={answers}", "data.eval=null", "train.learning_rate=3e-2")
    sources += ("train.steps=12", "train.save_every=12")
    train(directory, directory / "sft-run", *alone, *sources)
    shutil.move(directory / "sft-run" / "adapter", directory / "sft")
    return directory


def train(files, output, *overrides):
    command = ["--config", str(files / "run.yaml"), f"output_dir={output}", *overrides]
    assert train_main(command) == 0
    return read_lines(output / "metrics.jsonl")


STARTS = {
    "lora": (),
    "dropout-free whole batch": ("train.micro_batch_size=null",),
    "dora": ("adapter.use_dora=true",),
    "nf4": ("base_dtype=nf4",),
    "pissa": ("adapter.init=pissa",),
    "sft": ("adapter.path={files}/sft", "adapter.rank=8"),
    "stream": ("data.streaming=true", "data.stream_rows=6"),
    "stream-sft": ("data.streaming=true", "data.stream_rows=6", "adapter.path={files}/sft"),
    "prompt": ("adapter.method=prompt", "adapter.num_virtual_tokens=3"),
}


@pytest.mark.long_table(4)
@pytest.mark.parametrize("case", STARTS)
def test_the_first_loss_is_log_2_exactly(files, tmp_path, case):
    overrides = [one.format(files=files) for one in STARTS[case]]
    if case == "sft":
        overrides.pop()
    first, second, _ = train(files, tmp_path / "out", *overrides)
    assert first["loss"] == LN_2
    assert first["margin"] == first["accuracy"] == first["kl"] == 0
    assert first["chosen_drift"] == first["rejected_drift"] == 0
    assert second["loss"] < LN_2 and second["task_loss"] < LN_2


@pytest.mark.long_table(2)
@pytest.mark.parametrize("case", ["packed", "kto", "stream-sft"])
def test_a_resumed_run_is_the_same_to_the_bit(files, tmp_path, interrupted, case):
    """The reference of a stream is in the directory of the run; its adapter may be gone."""
    overrides = {
        "packed": ("adapter.use_dora=true", "train.steps=5"),
        "kto": ("train.objective=kto", *(f"data.{x}={files / 'judged.jsonl'}" for x in SETS)),
        "stream-sft": ("data.streaming=true", "data.stream_rows=6", f"adapter.path={files}/sft"),
    }[case]
    config = files / "run.yaml"
    assert train_main(["--config", str(config), f"output_dir={tmp_path / 'a'}", *overrides]) == 0
    interrupted(config, tmp_path / "b", 1, *overrides)
    if case == "stream-sft":
        assert (tmp_path / "b" / "reference.safetensors").exists()
    shutil.rmtree(os.environ["LORA_JAX_CACHE"], ignore_errors=True)
    command = ["--config", str(config), f"output_dir={tmp_path / 'b'}", *overrides]
    assert train_main([*command, "resume=true"]) == 0
    assert trace(tmp_path / "a") == trace(tmp_path / "b")


SETS = ("train", "eval")


@pytest.mark.long_table(2)
@pytest.mark.parametrize("objective", ["ipo", "orpo", "simpo", "kto"])
def test_other_objectives_learn(files, tmp_path, objective, monkeypatch):
    overrides = [f"train.objective={objective}", "train.steps=6", "train.micro_batch_size=null"]
    if objective == "kto":
        overrides += [f"data.{name}={files / 'judged.jsonl'}" for name in SETS]
    lines = train(files, tmp_path / "out", *overrides)
    first, last = lines[0], lines[-1]
    assert last["task_loss"] < lines[1]["task_loss"]
    assert last["task_margin"] > lines[1]["task_margin"]
    expected = {"ipo": 25.0, "kto": 0.5}
    if objective in expected:
        assert first["loss"] == expected[objective]
    else:
        assert "kl" not in first and "chosen_drift" not in first


def test_metrics_and_summary_of_a_run(files, tmp_path):
    """Held-out pairs have the metrics of training, and the regression set keeps its own loss."""
    regression = f"data.regression={files / 'one.jsonl'}"
    lines = train(files, tmp_path / "out", regression, "eval.generate=true", "eval.samples=0")
    measured = ("margin", "accuracy", "chosen_log_prob", "rejected_log_prob", "kl")
    assert {*measured, *(f"task_{name}" for name in measured)} <= lines[1].keys()
    assert {"task_loss", "regression_loss", "task_chosen_drift"} <= lines[1].keys()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    task = summary["task"]
    assert task["loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert task["loss_after"] < task["loss_before"]
    assert task["accuracy_before"] == 0 < task["accuracy_after"]
    assert task["examples"] == len(PAIRS)  # prompts, answered and compared with the chosen answers
    assert task["exact_match_after"] is not None
    assert abs(summary["regression"]["loss_before"] - math.log(2)) > 1  # a cross-entropy


def test_a_stream_computes_what_the_cache_holds(files, tmp_path):
    """Data in the order of the file are the same steps, streamed or cached."""
    order = ("data.shuffle=false", "data.packing=false", "train.steps=2", "data.max_length=128")
    cached = train(files, tmp_path / "cached", *order)
    again = train(files, tmp_path / "again", *order)
    streamed = train(files, tmp_path / "streamed", *order, "data.streaming=true")
    assert "task_loss" in cached[-1]
    for one, same, other in zip(cached, again, streamed, strict=True):
        for name in {"loss", "margin", "task_loss", "kl"} & one.keys():
            assert one[name] == same[name]
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6)


def test_references(files, tmp_path):
    """`base` and a directory are other models than the adapter that the run begins with."""
    path = ("train.steps=1", f"adapter.path={files}/sft")
    references = {"start": "start", "base": "base", "own": f"{files}/sft"}
    start, base, own = (
        train(files, tmp_path / name, *path, f"objective.reference={reference}")[0]
        for name, reference in references.items()
    )
    assert start["loss"] == own["loss"] == LN_2
    assert abs(base["loss"] - LN_2) > 1e-3 and base["kl"] > 1e-4
    # The adapter is the reference of a run that begins with the base.
    (line,) = train(files, tmp_path / "fresh", "train.steps=1", f"objective.reference={files}/sft")
    assert line["margin"] == pytest.approx(-base["margin"], rel=1e-4)


def test_a_first_step_with_nothing_to_learn_stops_the_run(files, tmp_path, capsys):
    path = (f"adapter.path={files}/sft", "objective.reference=base", "objective.beta=1000")
    command = ["--config", str(files / "run.yaml"), f"output_dir={tmp_path / 'out'}", *path]
    assert train_main([*command, "eval.before=false"]) == 2
    error = capsys.readouterr().err
    assert "accuracy 1 and margin" in error and "nothing to learn" in error
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.long_table(6)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train={files}/one.jsonl"], "no 'chosen' and no 'rejected'.*needs pairs"),
        (["train.objective=kto"], "no 'completion' and no 'label'.*these are pairs"),
        (["train.objective=sft"], "train.objective=dpo trains on pairs"),
        (["objective.beta=0"], "objective.beta=0.0 must be above 0"),
        (["objective.beta=-1"], "objective.beta=-1.0 must be above 0"),
        (["objective.gamma=1"], "objective.gamma=1.0 is for train.objective=simpo, and it is dpo"),
        (["objective.desirable_weight=2"], "is for train.objective=kto, and it is dpo"),
        (["train.label_smoothing=0.1"], "train.label_smoothing=0.1 is for train.objective=sft"),
        (["train.objective=orpo", "objective.reference=base"], "is for train.objective=dpo or ipo"),
        (["objective.reference=nowhere"], "neither start nor base, and no directory"),
        (["objective.reference={files}/model"], "adapter_config.json"),
        (["objective.reference=base", "adapter.init=pissa"], "subtracts its factors.*use start"),
        (["adapter.method=full"], "adapter.method=full keeps no copy"),
        (["adapter.init=lora_ga"], "adapter.init=lora_ga looks at rows with one answer"),
        (["data.completion={{chosen}}"], "data.completion=.*reads its columns by their names"),
        (["train.objective=ppo"], "train.objective='ppo' is not one of: sft, dpo"),
    ],
)
def test_mistakes(files, tmp_path, capsys, overrides, message):
    overrides = [one.format(files=files) for one in overrides]
    command = ["--config", str(files / "run.yaml"), f"output_dir={tmp_path / 'out'}", *overrides]
    assert train_main(command) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error


def test_a_reference_that_does_not_fit_the_model(files, tmp_path, capsys):
    other = write_model(tmp_path / "other", num_hidden_layers=1, hidden_size=64)
    overrides = [f"objective.reference={files}/sft", f"model={other}"]
    command = ["--config", str(files / "run.yaml"), f"output_dir={tmp_path / 'out'}", *overrides]
    assert train_main(command) == 2
    assert "lora_A" in capsys.readouterr().err


def test_commands_that_look_show_pairs(files, capsys):
    assert main(["inspect", "--config", str(files / "run.yaml"), "--examples", "1"]) == 0
    text = capsys.readouterr().out
    assert "pairs.jsonl:1, chosen: " in text and "pairs.jsonl:1, rejected: " in text
    assert "«0<|im_end|>»" in text and "«no idea <|im_end|>»" in text
    assert train_main(["--config", str(files / "run.yaml"), "--dry-run"]) == 0
    assert "pairs.jsonl" in capsys.readouterr().out
    judged = [f"data.{name}={files / 'judged.jsonl'}" for name in SETS]
    command = ["inspect", "--config", str(files / "run.yaml"), "--examples", "2"]
    assert main([*command, "train.objective=kto", *judged]) == 0
    text = capsys.readouterr().out
    assert "judged.jsonl:1, label false: " in text and "judged.jsonl:2, label true: " in text
