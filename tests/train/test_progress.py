"""What a run shows while it works: bars on a terminal, plain lines elsewhere, and its ETA."""

import io
import os
import pty
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lora_jax.report import progress
from lora_jax.report.journal import Journal
from lora_jax.report.progress import Display, Phase, format_seconds
from lora_jax.report.usage import Clock
from lora_jax.train import forecast

from .tiny import make_config


@pytest.fixture
def at_once(monkeypatch):
    """Phases of any length have lines."""
    monkeypatch.setattr(progress, "FIRST", 0.0)


def plain():
    return Console(file=io.StringIO(), highlight=False, markup=False, soft_wrap=True)


def printed(console):
    text = console.file.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text), "control characters"
    return text.splitlines()


def without_times(lines):
    return [re.sub(r"\d+:\d\d", "T", line) for line in lines]


def wait_for(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("forced", [False, True])
def test_without_a_terminal_a_phase_has_lines_while_it_works_in_one_call(
    at_once, monkeypatch, forced
):
    if forced:  # colours are asked for; a file is no terminal all the same
        monkeypatch.setenv("FORCE_COLOR", "1")
    console = plain()
    display = Display(console)
    with display.about("base"), display.phase("answers", 154) as phase:
        phase.done = 64
        wait_for(lambda: phase.said)
    with display.phase("compiling the train step") as phase:
        wait_for(lambda: phase.said)
    assert without_times(printed(console)) == [
        "base: answers 64/154, T",
        "base: answers 64/154 in T",
        "compiling the train step, T",
        "compiling the train step in T",
    ]


def test_lines_come_at_intervals_and_of_the_innermost_phase(at_once, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    console = plain()
    display = Display(console)
    with display.phase("outer", every=0.0) as outer:
        wait_for(lambda: outer.said)
        with display.about("step 3"), display.phase("losses", 5, "batches", every=30.0) as inner:
            wait_for(lambda: inner.said)
            for _ in inner.over(range(5)):
                display.say_line(inner)
            before = len(printed(console))
        display.say_line(outer)
    lines = without_times(printed(console))
    assert lines[before - 1] == "step 3: losses 0/5 batches, T"
    assert lines[before:][:2] == ["step 3: losses 5/5 batches in T", "outer, T"]


def test_short_phases_and_quiet_consoles_say_nothing():
    console, quiet = plain(), plain()
    quiet.quiet = True
    for one in (console, quiet):
        with Display(one).phase("loading weights", 3):
            pass
    assert printed(console) == printed(quiet) == []


def test_a_phase_that_fails_is_not_said_to_be_done(at_once):
    console = plain()
    with pytest.raises(KeyError), Display(console).phase("merging") as phase:
        wait_for(lambda: phase.said)
        raise KeyError
    assert without_times(printed(console)) == ["merging, T"]


def test_the_rest_is_estimated_from_what_is_done():
    phase = progress.Phase("losses", 4, "batches")
    assert phase.line == "losses 0/4 batches, 0:00"
    phase.began -= 10
    phase.advance()
    assert phase.line == "losses 1/4 batches, 0:10, ETA 0:30"
    phase.began, phase._moved = phase.began - 40, phase._moved - 40
    assert phase.line == "losses 1/4 batches, 0:50"  # overdue: nobody knows


@pytest.fixture
def terminal(monkeypatch):
    """A console on a terminal, and what it has written."""
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as file:
        yield (
            Console(file=file, width=100, highlight=False),
            lambda: os.read(leader, 1 << 16).decode(),
        )
    os.close(leader)


def test_a_terminal_shows_bars_that_go(terminal):
    console, read = terminal
    display = Display(console)
    with display.phase("step", 8, done=3, status=lambda: "loss 1.5"):
        with display.about("step 3"), display.phase("answers", 9) as phase:
            phase.advance(4)
            text = ""
            while "answers 4/9" not in text:
                text += read()
            assert "step 3/8" in text and "step 3: answers 4/9" in text and "━" in text
    text = read()
    while "step 3/8  loss" not in text:
        text += read()
    assert "\x1b[?25h" in text  # the cursor is shown again
    assert text.rstrip().endswith("step 3/8  loss 1.5")


def test_after_a_resume_the_bar_starts_at_the_resumed_step(tmp_path):
    console = plain()
    clock, remaining = Clock(), lambda step: (90.0, True)
    file = tmp_path / "metrics.jsonl"
    with Journal(file, 20, Display(console), (), 7, remaining) as journal:
        assert journal._phase and journal._phase.title == "step 7/20"
        clock.lap(10)
        journal.show(8, 1.25, 1e-3, clock)
        journal.show(9, 1.25, 1e-3, clock)  # within ten seconds
        journal.show(20, 1.25, 1e-3, clock)
    first, last = printed(console)
    assert re.fullmatch(r"step 8/20  loss 1.2500  lr 1.00e-03  [\d,]+ tokens/s  ETA 1:30", first)
    assert last.startswith("step 20/20  loss")


@pytest.mark.parametrize(
    ("left", "end"), [((75.0, False), "ETA 1:15 and evaluations"), ((0.0, True), "tokens/s")]
)
def test_an_eta_says_what_it_leaves_out_and_never_stands_at_zero(tmp_path, left, end):
    console, clock = plain(), Clock()
    with Journal(tmp_path / "m", 2, Display(console), (), 0, lambda _: left) as journal:
        clock.lap(10)
        journal.show(1, 1.0, 1e-3, clock)
    assert printed(console)[0].endswith(end)


def make_evaluator(took, *overrides, prompts=20):
    """What `forecast` reads of a `Evaluator`."""
    count = lambda limit: prompts if limit is None else min(limit, prompts)  # noqa: E731
    config = make_config("data.eval=e", "train.steps=100", *overrides)
    return SimpleNamespace(config=config, took=took, held_out={"task": 1}, count_answers=count)


def seconds(evaluator, step):
    clock: Any = SimpleNamespace(remaining=lambda steps: 2.0 * steps)
    return forecast.seconds_left(evaluator, clock, step)


TOOK = {"losses": 10.0, "answers": 0.5}


@pytest.mark.parametrize(
    ("overrides", "step", "expected"),
    [
        ((), 40, 60 * 2 + 10 + 20 * 0.5),  # losses and answers at the end
        (("eval.samples=0", "train.eval_every=30"), 40, 60 * 2 + 3 * 10 + 20 * 0.5),
        (("eval.samples=3", "train.eval_every=30"), 40, 60 * 2 + 3 * 10 + (20 + 6) * 0.5),
        (("eval.samples=3", "train.eval_every=30"), 60, 40 * 2 + 3 * 10 + (20 + 6) * 0.5),
        (("eval.samples=3", "train.eval_every=30"), 61, 39 * 2 + 2 * 10 + (20 + 3) * 0.5),
        (("train.eval_every=50", "eval.generate_every=50"), 1, 99 * 2 + 2 * 10 + 40 * 0.5),
        (("train.eval_every=50", "eval.generate_every=100"), 1, 99 * 2 + 2 * 10 + 23 * 0.5),
        (("train.eval_every=50",), 100, 10 + 20 * 0.5),  # in the last evaluation
    ],
)
def test_the_eta_counts_the_evaluations_still_to_come(overrides, step, expected):
    assert seconds(make_evaluator(TOOK, *overrides), step) == (expected, True)


def test_evaluations_that_were_never_measured_are_said_to_be_left_out():
    assert seconds(make_evaluator({}), 40) == (120, False)
    assert seconds(make_evaluator({"losses": 10.0}), 40) == (130, False)
    assert seconds(make_evaluator({"losses": 10.0}, prompts=0), 40) == (130, True)


def test_a_bar_shows_the_speed_of_generation():
    phase = Phase("answers", 4)
    phase.began -= 10
    assert "tokens/s" not in phase.status
    phase.tokens += 250
    assert phase.status.endswith("  25 tokens/s") and "tokens/s" not in phase.line


def test_times_are_minutes_or_hours():
    assert [format_seconds(x) for x in (0.4, 59.6, 3600, 86399)] == [
        *("0:00", "1:00", "1:00:00", "23:59:59")
    ]
