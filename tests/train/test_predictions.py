"""Answers of a run and of `lora-jax eval` in files, and the base's scores out of the cache."""

import json
import shutil

import pytest
from rich.console import Console

from lora_jax import config as configs
from lora_jax.cli import main, train_main
from lora_jax.report import scores
from lora_jax.report.console import print_samples
from lora_jax.report.journal import read_lines
from lora_jax.report.scores import Answer
from lora_jax.train import base_scores, warn

from .tiny import ROWS, write_model, write_rows

LEARN = (
    *("train.steps=24", "train.learning_rate=2e-2", "train.eval_every=8", "eval.generate_every=8"),
    *("train.load_best_model_at_end=true", "train.metric_for_best_model=exact_match"),
    *("eval.metrics=[exact_match,rouge_l]", "train.report_to=[tensorboard]", "eval.samples=2"),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache directory of these tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cache")
        patch.setenv("LORA_JAX_CACHE", str(directory))
        yield directory / "scores"


def command(files, output, *overrides):
    return [
        *("--config", str(files / "run.yaml"), f"output_dir={output}"),
        *(f"data.eval={files / 'rows.jsonl'}", *overrides),
    ]


@pytest.fixture(scope="module")
def run(files, cache, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    assert train_main(command(files, output, *LEARN)) == 0
    return output


def summary(output):
    return json.loads((output / "summary.json").read_text())


def test_every_answer_is_kept_with_the_metrics_of_it_alone(run):
    lines = read_lines(run / "predictions.jsonl")
    assert [line["step"] for line in lines] == [0] * 4 + [8] * 4 + [16] * 4 + [24] * 4
    for i, line in enumerate(lines):
        row = ROWS[i % 4]
        assert set(line) == {
            *("step", "where", "prompt", "references", "answer", "exact_match", "rouge_l"),
        }
        assert line["where"].endswith(f"rows.jsonl:{i % 4 + 1}")
        assert (line["prompt"], line["references"]) == (row["prompt"], [row["completion"]])
        assert line["exact_match"] == (line["answer"] == row["completion"])
        one = Answer("", (row["completion"],), line["answer"])
        assert line["rouge_l"] == scores.rouge_l([one])


def test_metrics_of_answers_are_in_the_log_and_the_best_is_exported(run):
    logged = {
        line["step"]: line["exact_match"]
        for line in read_lines(run / "metrics.jsonl")
        if "exact_match" in line
    }
    assert set(logged) == {8, 16, 24}
    lines = read_lines(run / "predictions.jsonl")
    for step, value in logged.items():
        own = [line["exact_match"] for line in lines if line["step"] == step]
        assert value == sum(own) / 4
    found = summary(run)
    assert found["exported_step"] == max(logged, key=logged.__getitem__)  # the first of equals
    assert found["task"]["exact_match_after"] == max(logged.values()) > 0
    assert found["task"]["exact_match_before"] == 0


def test_the_trackers_have_the_base_and_the_answers(run):
    from .test_trackers import shown

    curves = shown(run / "tensorboard")
    task = summary(run)["task"]
    assert curves["task_loss"][0] == (0, pytest.approx(task["loss_before"]))
    assert [step for step, _ in curves["task_loss"]] == [0, 8, 16, 24]
    assert curves["exact_match"][0] == (0, 0.0)
    assert [step for step, _ in curves["exact_match"]][:4] == [0, 8, 16, 24]


def test_eval_writes_the_answers_of_the_base_and_of_each_adapter(run, files, tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    options = ["--adapter", str(run / "adapter"), "--predictions", str(file)]
    settings = [f"data.eval={files / 'rows.jsonl'}", "eval.metrics=[exact_match,rouge_l]"]
    capsys.readouterr()
    assert main(["eval", "--config", str(files / "run.yaml"), *settings, *options]) == 0
    assert "scores of an earlier run; eval.cache=false" in capsys.readouterr().err
    lines = read_lines(file)
    assert [line.pop("adapter") for line in lines] == ["base"] * 4 + [str(run / "adapter")] * 4
    step = summary(run)["exported_step"]
    kept = [line for line in read_lines(run / "predictions.jsonl") if line["step"] in (0, step)]
    assert lines == [{k: v for k, v in line.items() if k != "step"} for line in kept]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--predictions", "no/such/file"], "--predictions no/such/file: its directory is missing"),
        (["--predictions", "."], "--predictions . is a directory; give a file in it"),
        (["--predictions", "p", "eval.generate=false"], "eval.generate=false generates none"),
    ],
)
def test_predictions_that_cannot_be_written_are_refused_first(files, capsys, options, told):
    capsys.readouterr()
    assert main(["eval", "--config", str(files / "run.yaml"), *options]) == 2
    assert told in capsys.readouterr().err


ONE = ("train.steps=1", "eval.samples=0")


def test_the_base_is_measured_once_whatever_the_rank(run, files, cache, tmp_path, capsys):
    capsys.readouterr()
    options = ("eval.metrics=[rouge_l]", "adapter.rank=2", "adapter.alpha=3", "seed=5")
    assert train_main(command(files, tmp_path / "again", *ONE, *options)) == 0
    said = capsys.readouterr().err
    assert "base: scores of an earlier run; eval.cache=false measures them again" in said
    first, again = (read_lines(one / "predictions.jsonl")[:4] for one in (run, tmp_path / "again"))
    assert [line["answer"] for line in again] == [line["answer"] for line in first]
    assert summary(tmp_path / "again")["task"]["loss_before"] == summary(run)["task"]["loss_before"]
    # Asked not to, it measures again, and finds the same.
    assert train_main(command(files, tmp_path / "own", *ONE, "eval.cache=false")) == 0
    assert "earlier run" not in capsys.readouterr().err
    assert summary(tmp_path / "own")["task"]["loss_before"] == pytest.approx(
        summary(run)["task"]["loss_before"], rel=1e-6
    )


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other", "directory"])
def test_a_damaged_entry_is_ignored(run, files, cache, tmp_path, monkeypatch, capsys, damage):
    copy = tmp_path / "cache" / "scores"
    shutil.copytree(cache, copy)
    monkeypatch.setenv("LORA_JAX_CACHE", str(copy.parent))
    for one in copy.iterdir():
        content = one.read_text()
        damaged = {
            "flip": content.replace('"task": ', '"task": 1'),
            "cut": content[:-20],
            "empty": "",
            "other": f"{base_scores.digest_content('[1]')}\n[1]",
            "directory": None,
        }[damage]
        one.unlink()
        one.mkdir() if damaged is None else one.write_text(damaged)
    capsys.readouterr()
    assert train_main(command(files, tmp_path / "out", *ONE)) == 0
    said = capsys.readouterr().err
    assert f"note: the cached scores {copy}/" in said and "earlier run" not in said
    assert summary(tmp_path / "out")["task"]["loss_before"] == pytest.approx(
        summary(run)["task"]["loss_before"], rel=1e-6
    )


@pytest.fixture
def keys(monkeypatch, files, tmp_path):
    """`keys(*overrides)`: the digest of the key under which a run looks for its base's scores."""

    class Found(BaseException):
        pass

    def stop(file, *_):
        raise Found(file.name)

    monkeypatch.setattr(base_scores, "_read", stop)

    def find(*overrides):
        with pytest.raises(Found) as raised:
            train_main(command(files, tmp_path / "out", "train.steps=1", *overrides))
        shutil.rmtree(tmp_path / "out")
        return str(raised.value)

    return find


def test_the_key_has_all_that_scores_depend_on(keys, files, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", ROWS[:3])
    (tmp_path / "cut").mkdir()
    longer = [row | {"completion": row["completion"] + " " + "x" * 90} for row in ROWS]
    ends = [row | {"completion": row["completion"] + "y"} for row in longer]  # beyond the cut
    long, end = (
        write_rows(tmp_path / name / "rows.jsonl", rows)
        for name, rows in (("cut", longer), (".", ends))
    )
    found = {
        "": keys(),
        "data": keys(f"data.eval={other}"),
        "long": keys(f"data.eval={long}"),
        "end": keys(f"data.eval={end}"),
        "regression": keys(f"data.regression={other}"),
        "system": keys("data.system_prompt=Be brief."),
        "template": keys("data.chat_template=none"),
        "length": keys("data.max_length=32"),
        "dtype": keys("base_dtype=bfloat16"),
        "quantised": keys("base_dtype=int8"),
        "compute": keys("train.compute_dtype=bfloat16"),
        "batch": keys("eval.batch_size=2"),
        "examples": keys("eval.generate_examples=2"),
        "losses": keys("eval.loss_examples=2"),
        "tokens": keys("eval.max_new_tokens=4"),
        "none": keys("eval.generate=false"),
        "thoughts": keys("eval.strip_thoughts=false"),
        "dora": keys("adapter.use_dora=true"),
        "pissa": keys("adapter.init=pissa"),
        "pissa of another rank": keys("adapter.init=pissa", "adapter.rank=2"),
        "prompt": keys("adapter.method=prompt", "adapter.num_virtual_tokens=3"),
        "seed": keys("adapter.method=prompt", "adapter.num_virtual_tokens=3", "seed=1"),
        "model": keys(f"model={write_model(tmp_path / 'model', seed=3)}"),
        "rope": keys(f"model={write_model(tmp_path / 'rope', rope_theta=5e5)}"),
    }
    assert len(set(found.values())) == len(found)
    free = ("adapter.rank=3", "seed=2", "eval.metrics=[rouge_l]", "eval.samples=0", "train.steps=9")
    assert keys(*free) == found[""]


def test_without_a_measured_base_a_run_says_null(files, tmp_path, capsys):
    output = tmp_path / "out"
    options = (*ONE, "eval.before=false", f"data.regression={files / 'rows.jsonl'}")
    capsys.readouterr()
    assert train_main(command(files, output, *options)) == 0
    said = capsys.readouterr().err
    assert "before: not measured (eval.before=false)" in said
    found = summary(output)
    assert found["task"]["loss_before"] is found["task"]["exact_match_before"] is None
    assert found["regression"]["loss_before"] is None and found["task"]["loss_after"] > 0
    assert [line["step"] for line in read_lines(output / "predictions.jsonl")] == [1] * 4
    assert (output / "plots" / "loss.png").is_file()
    # It goes on without one too.
    more = [*options, "train.steps=2", "resume=true", "allow_change=[train.steps]"]
    assert train_main(command(files, output, *more)) == 0
    assert "resumed from step 1" in capsys.readouterr().err
    assert summary(output)["task"]["loss_before"] is None


def test_samples_are_marked_without_colour_too(capsys):
    console = Console(highlight=False, markup=False, no_color=True, width=60)
    answers = [Answer("[p]", ("yes", "no"), "no"), Answer("q", ("yes",), "no")]
    print_samples(console, answers)
    text = capsys.readouterr().out
    assert text.index("answer: right") < text.index("answer: wrong") and "[p]" in text
    assert text.count("answer: ") == 2


@pytest.mark.parametrize(
    ("before", "after", "warned"), [(2.0, 2.31, True), (2.0, 2.29, False), (None, 9.0, False)]
)
def test_a_regression_loss_that_rises_is_warned_of(before, after, warned):
    found = warn.of_forgetting({"loss_before": before, "loss_after": after})
    assert len(found) == warned and not warn.of_forgetting(None)
    assert all("rose from 2.0000 to 2.3100, by more than 0.3" in text for text in found)


def test_a_metric_that_the_model_does_not_give_is_refused_before_it_is_loaded(
    files, tmp_path, capsys
):
    options = ("train.load_best_model_at_end=true", "train.metric_for_best_model=accuracy")
    every = ("train.eval_every=1", "eval.generate_every=1")
    capsys.readouterr()
    assert train_main(command(files, tmp_path / "out", *options, *every)) == 2
    told = capsys.readouterr().err
    assert "train.metric_for_best_model='accuracy' is not measured" in told
    assert "loading" not in told and configs.Config().train.metric_for_best_model in told
