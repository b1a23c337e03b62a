"""The .jsonl files of a run are read and cut back line by line, whatever stands in a line."""

import json

import pytest

from lora_jax.report import journal
from lora_jax.report.scores import Answer


@pytest.fixture
def log(tmp_path):
    file = tmp_path / "samples.jsonl"
    for step, text in enumerate(("plain", "line\u2028separator", "next\u0085line", "ü"), start=1):
        journal.append_line(file, {"step": step, "answer": text})
    return file


def test_every_line_comes_back(log):
    texts = [line["answer"] for line in journal.read_lines(log)]
    assert texts == ["plain", "line\u2028separator", "next\u0085line", "ü"]


def test_a_line_that_was_cut_off_is_left_out(log):
    whole = log.read_bytes()
    for end in (len(whole) - 3, len(whole) - 4):  # inside of the two bytes of the last character
        log.write_bytes(whole[:end])
        assert [line["step"] for line in journal.read_lines(log)] == [1, 2, 3]


def test_cutting_back_keeps_what_came_before(log):
    journal.cut_back(log, 2)
    assert [json.loads(line)["step"] for line in log.read_text().split("\n") if line] == [1, 2]
    journal.append_samples(log, 2, [Answer("p", ("r",), "new")])
    assert [line.get("answer") for line in journal.read_lines(log)] == ["plain", "new"]
    assert not list(log.parent.glob(".*"))
    assert journal.read_lines(log.with_name("none")) == []
