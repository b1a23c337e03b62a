"""Runs on preferences: the first loss, what they learn, resuming, references, mistakes."""

import json
import math
import os
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from lora_jax import config as configs
from lora_jax import objectives
from lora_jax.cli import main, train_main
from lora_jax.errors import UserError
from lora_jax.report.journal import read_lines
from lora_jax.train import loop

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
    """`run.yaml` over pairs, `pairs.jsonl` and `judged.jsonl`, and `tuned`, an adapter that
    prefers every chosen answer.
    """
    directory = tmp_path_factory.mktemp("preference")
    model = write_model(directory / "model", num_hidden_layers=1)
    rows = str(write_rows(directory / "pairs.jsonl", PAIRS))
    write_rows(directory / "judged.jsonl", JUDGED)
    one = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    write_rows(directory / "one.jsonl", one)
    data = {"train": rows, "eval": rows, "max_length": 224}
    content = {"model": str(model), "data": data, **SETTINGS}
    (directory / "run.yaml").write_text(yaml.safe_dump(content))
    alone = ("eval.before=false", "train.eval_every=null", "data.eval=null", "train.steps=10")
    train(directory, directory / "tuning", *alone, "train.save_every=10")
    shutil.move(directory / "tuning" / "adapter", directory / "tuned")
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
    "tuned": ("adapter.path={files}/tuned",),
    "stream": ("data.streaming=true", "data.stream_rows=6"),
    "stream-tuned": ("data.streaming=true", "data.stream_rows=6", "adapter.path={files}/tuned"),
    "prompt": ("adapter.method=prompt", "adapter.num_virtual_tokens=3"),
}


@pytest.mark.long_table(3)
@pytest.mark.parametrize("case", STARTS)
def test_the_first_loss_is_log_2_exactly(files, tmp_path, case):
    overrides = [one.format(files=files) for one in STARTS[case]]
    first, second, _ = train(files, tmp_path / "out", *overrides)
    assert abs(first["loss"] - LN_2) < 1e-7  # a mean of as many equal numbers as there are pairs
    assert first["margin"] == first["accuracy"] == first["kl"] == 0
    assert first["chosen_drift"] == first["rejected_drift"] == 0
    assert second["loss"] < LN_2 and second["task_loss"] < LN_2


@pytest.mark.long_table(2)
@pytest.mark.parametrize("case", ["packed", "kto", "stream-tuned"])
def test_a_resumed_run_is_the_same_to_the_bit(files, tmp_path, interrupted, case):
    """The reference of a stream is in the directory of the run; its adapter may be gone."""
    overrides = {
        "packed": ("adapter.use_dora=true", "train.steps=5"),
        "kto": ("train.objective=kto", *(f"data.{x}={files / 'judged.jsonl'}" for x in SETS)),
        "stream-tuned": (
            "data.streaming=true",
            "data.stream_rows=6",
            f"adapter.path={files}/tuned",
        ),
    }[case]
    config = files / "run.yaml"
    assert train_main(["--config", str(config), f"output_dir={tmp_path / 'a'}", *overrides]) == 0
    interrupted(config, tmp_path / "b", 1, *overrides)
    if case == "stream-tuned":
        assert (tmp_path / "b" / "reference.bin").exists()
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


@pytest.mark.parametrize("metric", ["task_accuracy", "task_margin"])
def test_the_best_evaluation_is_that_of_the_highest_metric_of_pairs(files, tmp_path, metric):
    """Of pairs that say the opposite of what is learned, every evaluation is worse."""
    swap = {"prompt": "prompt", "chosen": "rejected", "rejected": "chosen"}
    rows = [{to: row[name] for name, to in swap.items()} for row in PAIRS]
    held_out = write_rows(tmp_path / "opposite.jsonl", rows)
    best = ("train.load_best_model_at_end=true", f"train.metric_for_best_model={metric}")
    lines = train(files, tmp_path / "out", f"data.eval={held_out}", "train.steps=6", *best)
    found = [line[metric] for line in lines if metric in line]
    assert len(found) == 3 and found[0] >= found[1] >= found[2]
    record = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert record["exported_step"] == 2


@pytest.mark.slow
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
    path = ("train.steps=1", f"adapter.path={files}/tuned")
    references = {"start": "start", "base": "base", "own": f"{files}/tuned"}
    start, base, own = (
        train(files, tmp_path / name, *path, f"objective.reference={reference}")[0]
        for name, reference in references.items()
    )
    assert start["margin"] == own["margin"] == 0
    assert start["loss"] == own["loss"] == pytest.approx(LN_2, abs=1e-7)
    assert abs(base["loss"] - LN_2) > 1e-3 and base["kl"] > 1e-4
    # The adapter is the reference of a run that begins with the base.
    (line,) = train(
        files, tmp_path / "fresh", "train.steps=1", f"objective.reference={files}/tuned"
    )
    assert line["margin"] == pytest.approx(-base["margin"], rel=1e-4)


def test_a_first_step_with_nothing_to_learn_stops_the_run(files, tmp_path, capsys):
    path = (f"adapter.path={files}/tuned", "objective.reference=base", "objective.beta=1000")
    command = ["--config", str(files / "run.yaml"), f"output_dir={tmp_path / 'out'}", *path]
    assert train_main([*command, "eval.before=false"]) == 2
    error = capsys.readouterr().err
    assert "accuracy 1 and margin" in error and "nothing to learn" in error
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.long_table(4)
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
    overrides = [f"objective.reference={files}/tuned", f"model={other}"]
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


def test_a_run_without_its_reference_does_not_resume(files, tmp_path, interrupted, capsys):
    overrides = (f"adapter.path={files}/tuned", "data.eval=null", "train.eval_every=null")
    output = interrupted(files / "run.yaml", tmp_path / "out", 1, *overrides)
    content = (output / "reference.bin").read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), None):
        (output / "reference.bin").unlink()
        if damaged is not None:
            (output / "reference.bin").write_bytes(damaged)
        command = ["--config", str(files / "run.yaml"), f"output_dir={output}", *overrides]
        assert train_main([*command, "resume=true"]) == 2
        error = capsys.readouterr().err
        assert "reference.bin holds the reference of the run" in error


def test_an_objective_of_ones_own_gets_pairs_and_their_reference(files, tmp_path):
    def hinge(forward, batch, key):
        gains = forward(forward.bound, batch).log_probs() - batch["reference_log_probs"]
        chosen, rejected, some = (
            objectives.pair_sums(values, batch, role)
            for values, role in ((gains, 1), (gains, 2), (batch["roles"], 1))
        )
        losses = jnp.maximum(1 - 0.5 * (chosen - rejected), 0)
        return jnp.sum(jnp.where(some > 0, losses, 0)), objectives.count_pairs(batch), {}

    overrides = [f"output_dir={tmp_path / 'out'}", "data.eval=null", "train.eval_every=null"]
    config = configs.load(str(files / "run.yaml"), overrides)
    loop.run(config, objective=hinge)
    first, *_, last = read_lines(tmp_path / "out" / "metrics.jsonl")
    assert first["loss"] == 1.0 > last["loss"]
    config = configs.load(str(files / "run.yaml"), [*overrides, "objective.beta=0.2"])
    with pytest.raises(UserError, match="objective.beta=0.2: these are read by the dpo"):
        loop.run(config, objective=hinge)
