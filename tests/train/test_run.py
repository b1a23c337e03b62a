"""Whole runs by the command line: what they learn, what they write, and that they repeat."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from lora_jax import config as configs
from lora_jax.cli import main, train_main
from lora_jax.train import trainer
from lora_jax.train.step import make_train_step

from .tiny import ROWS

LEARN = (
    "train.steps=50",
    "train.learning_rate=2e-2",
    "train.save_every=20",
    "train.eval_every=25",
    "adapter.rank=8",
    "adapter.dropout=0.05",
    "export.merged=true",
)


def train(files, output, *overrides, config=None):
    """A finished run: its directory, the lines of metrics.jsonl, summary.json."""
    command = ["--config", str(config or files / "run.yaml"), f"output_dir={output}", *overrides]
    assert train_main(command) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        path=output,
        steps=lines,
        losses=[line["loss"] for line in lines],
        summary=json.loads((output / "summary.json").read_text()),
    )


def hashes(directory):
    """sha256 of every file below a directory, by name."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """Four rows learnt by heart, which are the held-out sets too."""
    before = hashes(files)
    sets = [f"data.{name}={files / 'rows.jsonl'}" for name in ("eval", "regression")]
    done = train(files, tmp_path_factory.mktemp("run") / "out", *sets, *LEARN)
    assert hashes(files) == before, "the run changed the model or the data"
    return done


def test_it_learns_the_rows_by_heart(run):
    task, regression = run.summary["task"], run.summary["regression"]
    assert run.losses[-1] < 0.1 < 5 < run.losses[0]
    assert (task["exact_match_before"], task["exact_match_after"], task["examples"]) == (0, 1, 4)
    assert task["loss_after"] < 0.1 < 5 < task["loss_before"]
    names = [f"{name}_{when}" for name in ("loss", "bits_per_byte") for when in ("before", "after")]
    assert regression == {name: task[name] for name in names}
    counts = run.summary["data"]
    assert [one["examples"] for one in counts.values()] == [4, 4, 4]
    assert {one["supervised_tokens"] for one in counts.values()} == {20}
    assert abs(task["loss_before"] - run.losses[0]) < 1  # dropout apart, the same rows


def test_what_a_run_writes(run):
    assert {path.name for path in run.path.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "norms.jsonl", "samples.jsonl", "summary.json"),
        *("checkpoints", "adapter", "merged", "plots", "predictions.jsonl", "run.json"),
    }
    for plot in ("loss", "norms"):
        assert (run.path / "plots" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert [line["step"] for line in run.steps] == list(range(1, 51))
    names = {"step", "loss", "grad_norm", "supervised_tokens", "learning_rate", "tokens_per_second"}
    norms = {f"norm_{name}" for name in ("lora_a", "lora_b", "update", "relative")}
    measured = {"task_loss", "regression_loss", *norms}
    for line in run.steps:
        assert set(line) == (names | measured if line["step"] in (25, 50) else names)
    summary = run.summary
    assert set(summary) == {
        *("steps", "supervised_tokens", "tokens_per_second", "seconds", "peak_rss_bytes"),
        *("total_parameters", "trainable_parameters", "adapter_bytes", "checkpoint_bytes"),
        *("trainable_share", "session_seconds", "data"),
        *("task", "regression", "exported_step", "merge", "warnings", "outputs", *norms),
    }
    assert summary["steps"] == summary["exported_step"] == 50
    assert summary["supervised_tokens"] == sum(line["supervised_tokens"] for line in run.steps)
    trained = 2 * 8 * (2 * 64 + 2 * 48 + 3 * 80)
    frozen = 272 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    assert summary["trainable_parameters"] == trained == summary["adapter_bytes"] / 4
    assert summary["total_parameters"] == trained + frozen
    assert summary["trainable_share"] == trained / (trained + frozen)
    assert summary["session_seconds"] == pytest.approx(summary["seconds"], abs=1)
    assert min(summary["peak_rss_bytes"], summary["seconds"], summary["tokens_per_second"]) > 0


def test_adapter_and_merged_are_complete_directories(run):
    tensors = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert sum(x.size for x in tensors.values()) == run.summary["trainable_parameters"]
    merged = {path.name for path in (run.path / "merged").iterdir()}
    shared = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert merged >= {"config.json", "model.safetensors"} | shared
    assert {path.name for path in (run.path / "adapter").iterdir()} >= shared


def test_checkpoints_hold_adapters_and_optimizer_alone(run):
    kept = sorted(int(path.name) for path in (run.path / "checkpoints").iterdir())
    assert kept == [40, 50]  # the latest two; the last is the best too
    last = run.path / "checkpoints" / "50"
    size = sum(file.stat().st_size for file in last.rglob("*") if file.is_file())
    assert size == run.summary["checkpoint_bytes"]
    assert size <= 3.1 * run.summary["adapter_bytes"] + 256 * 1024
    for item in ("adapters", "optimizer"):
        tree = json.loads((last / item / "_METADATA").read_text())["tree_metadata"]
        names = [entry["key_metadata"] for entry in tree.values()]
        paths = [".".join(key["key"] for key in keys) for keys in names]
        leaves = {path.rpartition(".")[2] for path in paths if not path.endswith("count")}
        assert paths and leaves == {"lora_a", "lora_b"}


def test_the_resolved_config_gives_the_same_run(run, files, tmp_path):
    resolved = run.path / "config.yaml"
    config = configs.load(resolved)
    assert yaml.safe_load(resolved.read_text())["train"]["steps"] == 50 == config.train.steps
    again = train(files, tmp_path / "again", config=resolved)
    assert again.losses == run.losses
    assert hashes(again.path / "adapter") == hashes(run.path / "adapter")
    assert hashes(again.path / "merged") == hashes(run.path / "merged")


@pytest.mark.parametrize(("kind", "made"), [("peft", "adapter"), ("hf", "merged")])
def test_export_from_the_checkpoint_is_what_the_run_wrote(run, tmp_path, kind, made):
    target = tmp_path / "exported"
    command = ["export", "--run", str(run.path), "--format", kind, "--output", str(target)]
    assert main(command) == 0
    assert hashes(target) == hashes(run.path / made)
    assert main(command) == 2  # what is there is never overwritten
    assert hashes(target) == hashes(run.path / made)


def test_the_export_of_a_run_that_is_not_finished_says_so(run, tmp_path, capsys):
    part = tmp_path / "part"
    shutil.copytree(run.path, part)
    command = ["export", "--run", str(part), "--format", "peft", "--output"]
    for name, finished in (("whole", True), ("early", False)):
        if not finished:
            (part / "summary.json").unlink()
        capsys.readouterr()
        assert main([*command, str(tmp_path / name)]) == 0
        printed = "".join(capsys.readouterr()).replace("\n", " ")
        assert ("is not finished: this is its checkpoint of step 50" in printed) != finished


def test_generate_gives_the_trained_answers(run, files, capsys):
    prompts = [word for row in ROWS for word in ("--prompt", row["prompt"])]
    answers = "\n\n".join(row["completion"] for row in ROWS)
    options = ["--max-new-tokens", "8", *prompts]
    adapter = ["--model", str(files / "model"), "--adapter", str(run.path / "adapter")]
    for model in (adapter, ["--model", str(run.path / "merged")]):
        capsys.readouterr()
        assert main(["generate", *model, *options]) == 0
        assert capsys.readouterr().out.strip() == answers


def test_continuing_an_adapter_starts_where_it_ended(run, files, tmp_path, capsys):
    start = f"adapter.path={run.path / 'adapter'}"
    refused = ["--config", str(files / "run.yaml"), f"output_dir={tmp_path / 'more'}", start]
    capsys.readouterr()
    assert train_main(refused) == 2  # run.yaml has rank 4
    assert "adapter.rank=4 contradicts" in capsys.readouterr().err
    config = yaml.safe_load((files / "run.yaml").read_text()) | {"adapter": {}}
    file = tmp_path / "more.yaml"
    file.write_text(yaml.safe_dump(config))
    more = train(files, tmp_path / "more", start, "train.learning_rate=1e-4", config=file)
    assert abs(more.losses[0] - run.summary["task"]["loss_after"]) < 1e-4
    kept = configs.load(more.path / "config.yaml").adapter
    assert (kept.rank, kept.alpha) == (8, 16.0)
    assert "adapter.rank=8" not in (more.path / "config.yaml").read_text()


def test_micro_batches_and_unpacked_rows_train_alike(files, tmp_path, monkeypatch):
    made_steps = []

    def recorded(*arguments):
        made_steps.append(make_train_step(*arguments))
        return made_steps[-1]

    monkeypatch.setattr(trainer, "make_train_step", recorded)
    options = ("train.steps=3", "data.packing=false", "data.shuffle=false")
    whole = train(files, tmp_path / "whole", *options)
    split = train(files, tmp_path / "split", *options, "train.micro_batch_size=2")
    assert [step._cache_size() for step in made_steps] == [1, 1], "a step compiled again"
    assert np.allclose(whole.losses, split.losses, rtol=1e-5)
    assert whole.summary["supervised_tokens"] == split.summary["supervised_tokens"] == 3 * 20
    for made in (whole.path, split.path):
        assert not (made / "merged").exists()
    files_of = [load_file(d.path / "adapter" / "adapter_model.safetensors") for d in (whole, split)]
    assert all(np.allclose(files_of[0][name], files_of[1][name], atol=1e-5) for name in files_of[0])


def test_a_loss_that_is_no_number_ends_the_run(files, tmp_path, capsys):
    options = ("train.learning_rate=1e38", "train.grad_clip=null", "train.steps=4")
    command = ["--config", str(files / "run.yaml"), f"output_dir={tmp_path / 'out'}", *options]
    capsys.readouterr()
    assert train_main(command) == 2
    message = capsys.readouterr().err
    assert "the loss of step 2 is " in message and "Lower train.learning_rate" in message
    assert "Traceback" not in message
