"""The rule of a setting is in its field, and all that treats settings alike reads it there."""

import dataclasses
import math

import pytest

from lora_jax.config import AdapterConfig, Config, all_keys, check, options_of
from lora_jax.config.options import Option, option, section, type_problems
from lora_jax.errors import UserError
from lora_jax.train import resume


@pytest.mark.parametrize(
    ("rule", "right", "wrong", "expected"),
    [
        (dict(at_least=1), 1, 0, "x=0 must be at least 1"),
        (dict(at_most=9), 9, 10, "x=10 must be at most 9"),
        (dict(at_least=1, at_most=9), 9, 0, "x=0 must be at least 1"),
        (dict(at_least=1, at_most=9), 1, 10, "x=10 must be at most 9"),
        (dict(above=0), 1e-9, 0.0, "x=0.0 must be above 0"),
        (dict(above=0), 1.0, math.nan, "x=nan must be above 0"),
        (
            dict(above=1, hint="null never stops"),
            2.0,
            1.0,
            "x=1.0 must be above 1; null never stops",
        ),
        (dict(at_least=0, below=1), 0.0, 1.0, "x=1.0 must be at least 0 and below 1"),
        (dict(at_least=0, below=1), 0.99, -0.1, "x=-0.1 must be at least 0 and below 1"),
        (dict(above=0, at_most=1), 1.0, 1.5, "x=1.5 must be above 0 and at most 1"),
        (dict(above=0, at_most=10**6), 1e6, 1e9, "x=1e+09 must be at most 1000000"),
        (dict(choices=("left", "right")), "left", "rigth", "is not one of: left, right. Did you"),
        (
            dict(choices=(False, True, "auto")),
            "auto",
            "x",
            "x='x' is not one of: false, true, auto.",
        ),
        (
            dict(choices=("a", "b"), hint="[] is none."),
            ["a", "b"],
            ["a", "none"],
            "x: 'none' is not",
        ),
        (dict(choices=("a", "b"), hint="[] is none."), [], ["zz"], "one of: a, b. [] is none."),
    ],
)
def test_a_value_is_held_against_its_rule(rule, right, wrong, expected):
    rule = Option(**rule)
    assert rule.problem("x", right) is None and rule.problem("x", None) is None
    assert expected in str(rule.problem("x", wrong))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (dict(), ""),
        (dict(choices=(False, "auto")), "`false`, `auto`"),
        (dict(at_least=5, at_most=10**7), "at least 5"),  # more is a slip of the hand
        (dict(at_least=1, at_most=1000), "at least 1 and at most 1,000"),
        (dict(above=0, below=1), "above 0 and below 1"),
    ],
)
def test_values_in_the_documentation(rule, expected):
    assert Option(**rule).values() == expected


def test_rules_that_do_not_exist_fail_where_they_are_written():
    with pytest.raises(TypeError, match="resumeable"):
        option(1, resumeable=True)
    with pytest.raises(TypeError, match="choices must be a tuple, not 'lora'"):
        option("lora", choices=("lora"))


def test_defaults_are_not_shared():
    @dataclasses.dataclass
    class Inner:
        names: list[str] = option([])

    @dataclasses.dataclass
    class Outer:
        inner: Inner = section(Inner, resumable=True)
        number: int = option(3)

    one, two = Outer(), Outer()
    one.inner.names.append("x")
    assert (two.inner.names, two.number) == ([], 3)
    rules = options_of(Outer)
    assert [*rules] == ["inner.names", "number"]
    assert rules["inner.names"].resumable and not rules["number"].resumable


def test_every_setting_has_a_rule():
    def plain(kind):
        for f in dataclasses.fields(kind):
            if "option" not in f.metadata:
                yield f"{kind.__name__}.{f.name}"
            if dataclasses.is_dataclass(f.type):
                yield from plain(f.type)

    assert not list(plain(Config))
    assert [*options_of(Config)] == [*all_keys(Config, "")]


def test_defaults_keep_their_rules():
    for key, rule in options_of(Config).items():
        value = Config()
        for part in key.split("."):
            value = getattr(value, part)
        assert rule.problem(key, value) is None


@pytest.mark.parametrize("key", [*options_of(Config)])
def test_a_resumed_run_may_change_what_is_resumable_and_nothing_else(key):
    """The checkpoint of a run that had another value of one setting."""
    config = Config(model="m")
    record = {"config": dataclasses.asdict(config), "step": 0}
    section, _, name = key.rpartition(".")
    (record["config"][section] if section else record["config"])[name] = "another"
    changed = [*resume.differences(record, config)]
    assert changed == ([] if options_of(Config)[key].resumable else [key])


def test_what_a_resumed_run_may_change():
    may = {key for key, rule in options_of(Config).items() if rule.resumable}
    assert {"model", "output_dir", "data.train", "adapter.path", "train.remat"} <= may
    assert {key for key in options_of(Config) if key.startswith(("mesh.", "export."))} <= may
    assert not may & {"seed", "train.learning_rate", "train.steps", "data.max_length", "base_dtype"}
    kept = [name for name, rule in options_of(AdapterConfig).items() if rule.with_path]
    assert kept == ["dropout", "freeze_a", "lora_plus_ratio", "path"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (dict(seed="1"), "seed='1' is not a whole number"),
        (dict(data=None), r"data=null is not DataConfig\(..\)"),
        (dict(resume=1), "resume=1 is not true or false or text"),
    ],
)
def test_values_of_another_type_are_refused_in_python(config, expected):
    with pytest.raises(UserError, match=expected):
        check(Config(model="m", **config))


def test_the_type_of_a_setting_in_a_section():
    config = dataclasses.replace(Config(), train=dataclasses.replace(Config().train, steps=2.5))
    assert [*type_problems(config)] == ["train.steps=2.5 is not a whole number or null"]
