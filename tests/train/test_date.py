"""A template that reads the date: a run keeps the day on which it started."""

import shutil
from datetime import datetime, timedelta

import pytest
import yaml
from transformers.utils import chat_template_utils

from lora_jax import config as configs
from lora_jax.cli import train_main
from lora_jax.data import sets
from lora_jax.errors import UserError
from lora_jax.report.journal import read_lines
from lora_jax.train import checkpoint

from .tiny import CHATML, ROWS, write_model, write_rows

DATED = "{{ '<|im_start|>' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
SETTINGS = {
    "adapter": {"rank": 2},
    "train": {"steps": 4, "batch_size": 2, "save_every": 2, "remat": "none"},
    "eval": {"batch_size": 4, "max_new_tokens": 2, "samples": 1},
}


class _FastClock:
    """Every look at it is a day later: what it is used for is never the same twice."""

    day = datetime(1999, 1, 1)

    @classmethod
    def now(cls):
        cls.day += timedelta(days=1)
        return cls.day


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(output, day, *overrides)`: status and messages of a run that starts on a day."""
    model = write_model(tmp_path / "model")
    rows = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    (tmp_path / "dated.jinja").write_text(DATED)
    data = {"train": rows, "eval": rows, "max_length": 96}
    data["chat_template"] = str(tmp_path / "dated.jinja")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": str(model), "data": data, **SETTINGS}))
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(chat_template_utils, "datetime", _FastClock)

    def start(output, day, *overrides):
        monkeypatch.setattr(sets, "today", lambda: day)
        status = train_main(["--config", str(file), f"output_dir={tmp_path / output}", *overrides])
        printed = capsys.readouterr()
        return status, " ".join((printed.out + printed.err).split())

    return start


def leaves(output):
    return checkpoint.read_record(output / "checkpoints")["leaves"]


def test_a_run_goes_on_days_later_with_the_day_it_started_on(run, tmp_path):
    status, printed = run("whole", "2026-11-26")
    assert status == 0 and "gets data.template_date=2026-11-26" in printed
    assert configs.load(tmp_path / "whole" / "config.yaml").data.template_date == "2026-11-26"
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "4")
    (tmp_path / "part" / "summary.json").unlink()
    status, printed = run("part", "2026-12-01", "resume=true")
    assert status == 0 and "gets data.template_date=2026-11-26" in printed
    assert "resumed from step 2" in printed
    assert leaves(tmp_path / "part") == leaves(tmp_path / "whole")
    losses = [
        [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")]
        for name in ("part", "whole")
    ]
    assert losses[0] == losses[1]
    status, printed = run("whole", "2026-12-01", "resume=true", "data.template_date=2026-12-01")
    assert status != 0
    assert "data.template_date='2026-12-01', and the checkpoint was made with" in printed


def test_the_cache_is_served_on_the_same_day_alone_where_the_template_reads_it(run, tmp_path):
    entries = tmp_path / "cache" / "examples"
    model = ("data.chat_template=null", "train.steps=1", "eval.generate=false")
    steps = ("train.steps=1", "eval.generate=false")
    counts = []
    for output, day, options in (
        ("a", "2026-11-26", steps),
        ("b", "2026-11-26", steps),
        ("c", "2026-11-27", steps),
        ("d", "2026-11-28", (*steps, "data.template_date=2026-11-26")),
        ("e", "2026-11-26", model),
        ("f", "2026-11-27", model),
    ):
        status, printed = run(output, day, *options)
        assert status == 0, printed
        counts.append(len(list(entries.iterdir())))
    assert counts == [1, 1, 2, 2, 3, 3]
    assert configs.load(tmp_path / "f" / "config.yaml").data.template_date is None
    assert leaves(tmp_path / "a") == leaves(tmp_path / "d") != leaves(tmp_path / "c")


def test_a_date_without_effect_is_told(run):
    options = ("data.chat_template=null", "data.template_date=2026-11-26", "train.steps=1")
    status, printed = run("out", "2026-11-26", *options)
    assert status == 0
    assert "data.template_date has no effect: the chat template reads no date" in printed


@pytest.mark.parametrize("day", ["tomorrow", "2026-13-01", "20261126", "26.11.2026"])
def test_a_date_is_a_day(day):
    with pytest.raises(UserError, match="data.template_date='.*' is no day of the form"):
        configs.parse({"model": "m"}, [f"data.template_date={day}"])


def test_an_unquoted_date_in_a_file_is_read_as_text(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata:\n  template_date: 2026-11-26\n")
    assert configs.load(file).data.template_date == "2026-11-26"
