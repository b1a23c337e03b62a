"""Space files: the trials that they describe, and what is wrong with them."""

import pytest
import yaml

from lora_jax.config import document
from lora_jax.errors import UserError
from lora_jax.sweep.schedule import Rungs, list_trials
from lora_jax.sweep.space import Halving, draws, load_space, parse_space

from .tiny import make_config


def read(text):
    return parse_space(document.read(text, "space"))


def test_a_grid_has_every_combination_and_its_types():
    space = read("space: {adapter.rank: [1, 4], train.learning_rate: [1e-4, 3e-3], seed: [0, 1]}")
    trials = list_trials(space, make_config())
    assert len(trials) == space.points == 8
    assert trials[3].settings == {"adapter.rank": 1, "train.learning_rate": 3e-3, "seed": 1}
    assert trials[7].config.adapter.rank == 4 and trials[7].config.seed == 1
    assert [one.number for one in trials] == list(range(8))


def test_settings_that_go_together():
    space = read(
        "space: {tenant: [{data.train: a.jsonl, adapter.rank: 2}, {data.train: b.jsonl, "
        "adapter.rank: 16}], seed: [3]}"
    )
    found = [one.settings for one in list_trials(space, make_config())]
    assert found == [
        {"data.train": "a.jsonl", "adapter.rank": 2, "seed": 3},
        {"data.train": "b.jsonl", "adapter.rank": 16, "seed": 3},
    ]


def test_random_draws_are_in_range_different_and_repeat():
    space = read(
        "{sampler: random, trials: 30, space: {train.learning_rate: {low: 1e-4, high: 1e-2, "
        "log: true}, adapter.rank: {low: 1, high: 8}}}"
    )
    found = list(draws(space, seed=5))
    assert found == list(draws(space, seed=5)) != list(draws(space, seed=6))
    assert all(1e-4 <= one["train.learning_rate"] <= 1e-2 for one in found)
    assert {type(one["adapter.rank"]) for one in found} == {int}
    assert len({repr(one) for one in found}) == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("space: {adapter.rnak: [1]}", "Did you mean 'adapter.rank'?"),
        ("space: {rank: [1]}", "Did you mean 'adapter.rank'?"),
        ("space: {eval.batch_size: [1]}", "the same for all trials"),
        ("space: {adapter.rank: []}", "leaves no trial"),
        ("space: {}", "must be a mapping of settings"),
        ("space: {adapter.rank: [4, 8, 4]}", "has 4 twice, which makes duplicate trials"),
        ("space: {adapter.rank: [four]}", "is not a whole number"),
        ("space: {adapter.rank: 4}", "must be a list of values"),
        ("space: {adapter.rank: {low: 1, high: 8}}", "sampler=grid needs a list"),
        ("{sampler: random, space: {adapter.rank: [1, 2]}}", "needs the number of trials"),
        ("{sampler: random, trials: 3, space: {adapter.rank: [1, 2]}}", "duplicate trials"),
        ("{trials: 1, space: {adapter.rank: [1, 2]}}", "the grid has 2 points"),
        ("{sampler: gird, space: {adapter.rank: [1]}}", "Did you mean 'grid'?"),
        ("{trails: 1, space: {adapter.rank: [1]}}", "Did you mean 'trials'?"),
        ("{halving: 3, space: {adapter.rank: [1]}}", "halving must be a mapping"),
        ("{halving: {first_step: 3, factor: 1}, space: {seed: [1]}}", "must be at least 2"),
        ("space: {a: [{seed: 1}, {data.train: x}]}", "must set the same settings"),
        ("space: {a: [{seed: 1}], seed: [1]}", "values in two places"),
        (
            "{sampler: tpe, trials: 2, space: {train.learning_rate: {low: 0, high: 1, log: true}}}",
            "a range needs 0 < low < high",
        ),
        ("{sampler: tpe, trials: 2, space: {data.train: {low: 0, high: 1}}}", "is no number"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(UserError) as error:
        read(text)
    assert message in str(error.value)


def test_a_trial_that_no_run_would_take_names_its_number():
    space = read("space: {adapter.rank: [4, 0]}")
    with pytest.raises(UserError, match="trial 1: adapter.rank=0"):
        list_trials(space, make_config())


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_space(tmp_path / "none.yaml")
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump({"space": {"seed": [1, 2]}}))
    assert load_space(file).points == 2


def test_halving_keeps_the_best_of_those_that_reached_a_rung():
    rungs = Rungs(Halving(10, 2))
    assert [step for step in range(1, 100) if rungs.is_due(step, 100)] == [10, 20, 40, 80]
    assert not rungs.is_due(40, 40)
    assert rungs.add(10, "a", [3.0, 1.0, 2.0, float("nan")]) == [True, False, False, True]
    assert rungs.add(10, "a", [1.5]) == [False]
    assert rungs.add(10, "b", [9.0]) == [False]
