"""What a run is told about its own course: the best evaluation, patience, numbers that are none,
divergence.
"""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.config import TrainConfig
from lora_jax.train.monitor import WINDOW, LossMonitor

LOSSES = st.floats(0, 20, allow_nan=False)


def steps(watch, losses, divergence=3.0, first=1):
    """What `problem` says to each loss."""
    return [watch.problem(first + i, loss, 1.0, divergence) for i, loss in enumerate(losses)]


def test_the_best_evaluation_is_the_lowest_and_the_first_of_equals():
    watch = LossMonitor()
    seen = [watch.evaluated(10 * (i + 1), {"task_loss": x}) for i, x in enumerate([3, 2, 2, 4, 1])]
    assert seen == [True, True, False, False, True]
    assert (watch.best_loss, watch.best_step, watch.stale) == (1, 50, 0)
    watch.evaluated(60, {"task_loss": 1.5, "regression_loss": 0.1})
    assert (watch.best_loss, watch.best_step, watch.stale) == (1, 50, 1)


def test_a_metric_of_answers_is_best_where_it_is_greatest():
    watch = LossMonitor()
    measured = [{"task_loss": 3 - i, "exact_match": x} for i, x in enumerate([0.2, 0.5, 0.5, 0.1])]
    seen = [watch.evaluated(i, values, "exact_match") for i, values in enumerate(measured)]
    assert seen == [True, True, False, False]
    assert (watch.best_loss, watch.best_step, watch.stale) == (0.5, 1, 2)
    assert not watch.evaluated(4, {"task_loss": 0.1}, "exact_match") and watch.stale == 2


def test_the_regression_loss_is_best_where_it_is_lowest():
    watch = LossMonitor()
    measured = [{"task_loss": 1.0, "regression_loss": x} for x in (2.0, 1.0, 1.5)]
    seen = [watch.evaluated(i, values, "regression_loss") for i, values in enumerate(measured)]
    assert seen == [True, True, False] and watch.best_loss == 1.0


def test_another_metric_begins_anew_and_old_records_are_those_of_the_task_loss():
    watch = LossMonitor(best_loss=0.3, best_step=8, stale=2)  # as a record of an earlier version
    assert watch.metric == "task_loss" and not watch.evaluated(9, {"task_loss": 0.4})
    assert watch.evaluated(10, {"task_loss": 0.4, "rouge_l": 0.1}, "rouge_l")
    assert (watch.best_loss, watch.best_step, watch.stale) == (0.1, 10, 0)


def test_other_sets_than_the_task_say_nothing():
    watch = LossMonitor()
    assert not watch.evaluated(1, {"regression_loss": 0.1}) and not watch.evaluated(2, {})
    assert watch == LossMonitor()


def test_a_loss_that_is_no_number_is_never_the_best():
    watch = LossMonitor()
    seen = [watch.evaluated(i, {"task_loss": x}) for i, x in enumerate([math.nan, math.inf, 5.0])]
    assert seen == [False, False, True] and watch.best_loss == 5.0
    assert not watch.evaluated(9, {"task_loss": math.nan})
    assert (watch.best_step, watch.stale) == (2, 1)


def test_patience_counts_evaluations_since_the_best():
    settings = TrainConfig(early_stopping_patience=2)
    watch, over = LossMonitor(), []
    for step, loss in enumerate([3.0, 3.1, 2.0, 2.5, 2.4, 1.0]):
        watch.evaluated(step, {"task_loss": loss})
        over.append(watch.gave_up(settings))
        assert not watch.gave_up(TrainConfig())
    assert over == [False, False, False, False, True, False]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.inf)])
def test_numbers_that_are_none_name_the_step(loss, norm):
    watch = LossMonitor()
    first = watch.problem(1, loss, norm, None)
    assert first and first.startswith(f"the loss of step 1 is {loss} and its gradient norm {norm}.")
    assert "steps before" not in first and "check the data of step 1" in first
    assert steps(watch, [1.0, 3.0]) == [None, None]
    later = watch.problem(3, loss, norm, None)
    assert later and f"the loss of step 3 is {loss}" in later and "train.learning_rate" in later
    assert "the 2 steps before have a mean loss of 2." in later


def test_divergence_names_the_steps_and_their_means():
    watch = LossMonitor()
    found = steps(watch, [1.0] * WINDOW + [5.0] * WINDOW)
    first = next(i for i, problem in enumerate(found, 1) if problem)
    assert first == 31  # 11 of 20 losses at 5: the first mean above 3
    assert found[first - 1] == (
        "the run diverges: steps 12-31 have a mean loss of 3.2, steps 1-20 had 1. Lower "
        "train.learning_rate, or raise train.divergence (3; null: never stop)"
    )
    assert steps(LossMonitor(), [1.0] * WINDOW + [5.0] * WINDOW, None) == [None] * 2 * WINDOW


def test_divergence_is_told_from_the_lowest_mean_not_the_first():
    watch = LossMonitor()
    losses = [6.0] * 30 + [1.0] * 30 + [4.0] * 20  # never above what it began with
    problem = next(filter(None, steps(watch, losses)), "")
    assert "steps 41-60 had 1." not in problem and "steps 31-50 had 1." in problem


@pytest.mark.parametrize(("later", "stops"), [(1.05, False), (1.15, True)])
def test_a_mean_must_be_a_nat_above_the_lowest(later, stops):
    assert any(steps(LossMonitor(), [0.1] * WINDOW + [later] * WINDOW)) == stops


def test_less_than_a_window_is_never_divergence():
    assert not any(steps(LossMonitor(), [0.01] + [20.0] * (WINDOW - 2)))


@given(
    st.lists(LOSSES, min_size=1, max_size=90),
    st.integers(1, 7),
    st.integers(0, 90),
    st.sampled_from([None, 1.01, 1.5, 3.0]),
)
def test_written_as_json_on_the_way_it_goes_on_alike(losses, every, cut, divergence):
    def go_on(watch, start, end):
        said = []
        for step in range(start, end):
            said.append(watch.problem(step, losses[step], 1.0, divergence))
            if step % every == 0:
                said.append(watch.evaluated(step, {"task_loss": losses[-1 - step]}))
                said.append(watch.gave_up(TrainConfig(early_stopping_patience=3)))
        return said

    cut = min(cut, len(losses))
    whole, before = LossMonitor(), LossMonitor()
    expected = go_on(whole, 0, len(losses))
    head = go_on(before, 0, cut)
    after = LossMonitor(**json.loads(json.dumps(dataclasses.asdict(before))))
    assert after == before
    assert head + go_on(after, cut, len(losses)) == expected
    assert after == whole


@given(
    st.lists(st.floats(0, 0.5), min_size=WINDOW, max_size=150),
    st.lists(st.floats(-0.49, 0.49), min_size=150, max_size=150),
    st.floats(0, 10),
)
def test_noise_on_a_falling_loss_is_no_divergence(falls, noise, end):
    """Within half a nat of a loss that falls, two means are never a whole nat apart."""
    falling = [end + sum(falls[i:]) for i in range(len(falls))]
    losses = [max(0.0, loss + x) for loss, x in zip(falling, noise, strict=False)]
    assert not any(steps(LossMonitor(), losses, 1.01))


@given(
    st.lists(st.floats(0.9, 1), min_size=WINDOW, max_size=150),
    st.lists(st.floats(0.6, 1.7), min_size=150, max_size=150),
)
def test_noise_in_proportion_is_no_divergence(factors, noise):
    """Means that are off by 0.6 to 1.7 are less than a factor of 3 apart, however large."""
    losses, level = [], 1e4
    for factor, x in zip(factors, noise, strict=False):
        level *= factor
        losses.append(level * x)
    assert not any(steps(LossMonitor(), losses, 3.0))


@given(st.lists(st.floats(0, 0.99), min_size=WINDOW, max_size=120))
def test_tiny_losses_never_diverge_whatever_their_ratio(losses):
    assert not any(steps(LossMonitor(), losses, 1.01))
