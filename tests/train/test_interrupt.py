"""Signals as an exception, at once or when the run can take it."""

import argparse
import hashlib
import os
import signal
import threading
import time

import pytest

from lora_jax import cli
from lora_jax.train import interrupt
from lora_jax.train.interrupt import Interrupted, Signals, catch

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def send(number=signal.SIGTERM):
    """The signal to this process, whose handler runs before this returns."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.fixture(autouse=True)
def handlers():
    """Handlers of this test's own, so that a signal that nothing catches is seen."""
    seen = []
    before = {number: signal.getsignal(number) for number in NUMBERS}
    for number in NUMBERS:
        signal.signal(number, lambda number, _frame: seen.append(number))
    own = {number: signal.getsignal(number) for number in NUMBERS}
    yield seen
    after = {number: signal.getsignal(number) for number in NUMBERS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == own, "the handlers were not restored"


@pytest.mark.parametrize(("number", "status"), [*zip(NUMBERS, (0, 130, 0), strict=True)])
def test_outside_held_a_signal_raises_at_once(number, status, handlers):
    with pytest.raises(Interrupted) as raised, catch():
        send(number)
        pytest.fail("it did not raise")
    assert (str(raised.value), raised.value.status) == (number.name, status)
    assert not isinstance(raised.value, Exception)
    send(number)
    assert handlers == [number]  # outside, what was there before


@pytest.mark.parametrize("number", NUMBERS)
def test_inside_held_a_signal_waits_for_check(number):
    reached = []
    with pytest.raises(Interrupted) as raised, catch() as signals, signals.held():
        signals.check()  # nothing has come
        send(number)
        reached.append("after the signal")
        signals.check()
        pytest.fail("check did not raise")
    assert reached and str(raised.value) == number.name


def test_a_signal_that_waited_is_still_there_after_held():
    with pytest.raises(Interrupted), catch() as signals:
        with signals.held():
            send()
        signals.check()
        pytest.fail("it was forgotten")


@pytest.mark.parametrize("first", NUMBERS)
def test_repetitions_do_not_disturb_what_ends_the_run(first):
    """A scheduler, a terminal and a parent process may each pass the same signal on."""
    saved = []
    with pytest.raises(Interrupted) as raised, catch() as signals, signals.held():
        send(first)
        for number in NUMBERS:
            send(number)
        try:
            signals.check()
        except Interrupted:
            for number in NUMBERS:
                send(number)
            saved.append("whole")
            raise
    assert saved and str(raised.value) == first.name


@pytest.fixture
def deliberate(monkeypatch):
    """Every repetition counts as one that comes late enough."""
    monkeypatch.setattr(interrupt, "DELIBERATE", 0.0)


@pytest.mark.parametrize("first", NUMBERS)
def test_only_a_later_ctrl_c_gives_up_and_says_so(first, deliberate):
    said = []
    with pytest.raises(Interrupted) as raised, catch(say=said.append) as signals, signals.held():
        send(first)
        send(signal.SIGTERM)
        send(signal.SIGHUP)
        hint = "; Ctrl-C again gives up what is not saved" * (first == signal.SIGINT)
        assert said == [f"{first.name}: stopping after this step{hint}"]
        send(signal.SIGINT)
        pytest.fail("the second Ctrl-C waited")
    assert raised.value.status == 130
    assert said[1:] == ["stopping now: what was not saved yet is lost"]


def test_what_nohup_ignores_stays_ignored(handlers):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert handlers == []


def test_free_raises_at_once_and_held_holds_again_after_it():
    with catch() as signals, signals.held():
        with pytest.raises(Interrupted), signals.free():
            send()
            pytest.fail("it waited")
    with catch() as signals, signals.held():
        with signals.free():
            pass
        send()  # waits
        with pytest.raises(Interrupted), signals.free():
            pytest.fail("free entered although a signal waited")
        with pytest.raises(Interrupted):
            signals.check()


def test_held_inside_held():
    reached = False
    with pytest.raises(Interrupted), catch() as signals, signals.held():
        with signals.held():
            pass
        send()
        reached = True  # the outer one still holds
        signals.check()
        pytest.fail("the signal was lost")
    assert reached


def test_handlers_come_back_after_other_failures_too():
    """The fixture compares the handlers."""
    with pytest.raises(KeyError), catch():
        raise KeyError


def test_other_threads_leave_the_signals_alone():
    found = []

    def run():
        before = [signal.getsignal(number) for number in NUMBERS]
        with catch() as signals:
            found.append([signal.getsignal(number) for number in NUMBERS] == before)
            with signals.held(), signals.free():
                signals.check()
            found.append(isinstance(signals, Signals))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True, True]


def stay_in_c(*numbers):
    """Run one long call of C code, during which no handler runs, and send these signals in it."""

    def send_all():
        for number in numbers:
            time.sleep(0.1)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send_all)
    thread.start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
    thread.join()


@pytest.fixture
def answers(monkeypatch):
    """What was said and the statuses the process was left with, at once where nobody else acts."""
    monkeypatch.setattr(interrupt, "ANSWER", 0.02)
    monkeypatch.setattr(interrupt, "STUCK", 0.02)
    return []


def test_a_signal_inside_of_a_program_is_answered_at_once_and_waits_for_check(answers):
    before = None
    with pytest.raises(Interrupted), catch(None, answers.append, answers.append) as signals:
        with signals.held():
            stay_in_c(signal.SIGTERM)
            before = list(answers)
            signals.check()
    assert before == answers == ["SIGTERM: stopping after this step"]


@pytest.mark.parametrize(("number", "status"), [*zip(NUMBERS, (0, 130, 0), strict=True)])
def test_a_process_with_nothing_to_save_is_left_inside_of_a_program(answers, number, status):
    with pytest.raises(Interrupted), catch(None, answers.append, answers.append):
        stay_in_c(number)
        pytest.fail("it did not raise")
    assert answers == [f"{number.name}: stopping now", status]


def test_a_deliberate_ctrl_c_inside_of_a_program_gives_up(answers, deliberate):
    """Both come while no handler runs, which Python makes one call of the handler of."""
    with pytest.raises(Interrupted), catch(None, answers.append, answers.append) as signals:
        with signals.held():
            stay_in_c(signal.SIGINT, signal.SIGINT)
            pytest.fail("it waited")
    assert answers == [
        "SIGINT: stopping after this step; Ctrl-C again gives up what is not saved",
        "stopping now: what was not saved yet is lost",
        130,
    ]


@pytest.mark.parametrize("leave", [True, False])
def test_several_hosts_and_a_notebook_are_not_left(answers, leave):
    agree, end = (lambda number: number, answers.append) if leave else (None, None)
    with pytest.raises(Interrupted), catch(agree, answers.append, end):
        stay_in_c(signal.SIGINT)
        pytest.fail("it did not raise")
    assert answers == ["SIGINT: stopping now"]


def test_a_command_that_was_interrupted_does_not_wait_for_programs_that_still_run(
    monkeypatch, capsys
):
    def run(_):
        raise Interrupted(signal.SIGINT)

    left = []
    options = argparse.Namespace(function=run, verbose=False)
    assert (cli._status(options), left) == (130, [])
    monkeypatch.setattr(interrupt, "leave", left.append)
    assert (cli._status(options), left) == (130, [130])
    assert capsys.readouterr().err == "ended by SIGINT\n" * 2
