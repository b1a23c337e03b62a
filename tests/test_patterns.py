"""Patterns and long lists of a user or a file take linear time, or end in an error."""

import re

import pytest

from lora_jax import AdapterConfig, UserError
from lora_jax.models import describe
from lora_jax.patterns import Pattern
from lora_jax.targets import find_trainable, match
from lora_jax.targets.match import matches, pattern_values

from .methods import TINY

# On a name of one character each they take exponential time in `re`.
SLOW = (r"((\w|\.|[a-z])+)+[!?]", r"([a-z._0-9]+|[a-z._0-9]+)*[!?]", r"(?:(?:.|[a-z])*)*(?<=[!?])")
ENTRIES = [f"no_such_{i}" for i in range(200_000)]


@pytest.fixture(scope="module")
def params():
    return describe(TINY).params


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"]
)
def test_patterns_that_backtrack_end_in_an_error(params, field, slow, monkeypatch):
    monkeypatch.setattr("lora_jax.patterns._SECONDS", 0.05)
    value = {slow: 2} if field.endswith("pattern") else slow
    with pytest.raises(UserError, match=f"{field}.*(takes too long|matches no)") as error:
        find_trainable(params, AdapterConfig(**{field: value}))
    assert len(str(error.value)) < 2000


def test_the_limit_is_one_for_all_matches_of_a_pattern(monkeypatch):
    monkeypatch.setattr("lora_jax.patterns._SLOW", 0.0)
    pattern = Pattern("a|b")
    pattern._left = 1e-4
    with pytest.raises(UserError, match="takes too long"):
        for _ in range(10_000):
            pattern.matches("b")


def test_long_and_deep_patterns_are_refused():
    with pytest.raises(UserError, match="20,001 characters"):
        Pattern("a" * 20_001)
    with pytest.raises(UserError, match="is not a regex that can be compiled: maximum recursion"):
        Pattern("(" * 9_000 + ")" * 9_000)


@pytest.mark.parametrize(
    "pattern", [r"a{2}", r"a{,2}", r"a{x}", r"a\{b<=1\}", r"(?:abc){e<=1}", r"[{]e<=1", r"\\{s}"]
)
@pytest.mark.parametrize("text", ["aa", "a{x}", "a{b<=1}", "abd", "abc{e<=1}", "{e<=1", "\\{s}"])
def test_patterns_mean_what_they_mean_in_re(pattern, text):
    assert Pattern(pattern).matches(text) == bool(re.fullmatch(pattern, text))


NAMES = ["model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "q_proj", "xq_proj"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "pattern", ["q_proj", "1.self_attn.q_proj", "self.attn.q_proj", ".q_proj", "proj", NAMES[0]]
)
def test_names_as_patterns_match_as_in_peft(name, pattern):
    expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert pattern_values({pattern: True})(name, False) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": [*ENTRIES, "q_proj"]}, "target_modules: 199,992 more entries"),
        ({"exclude_modules": ENTRIES}, "exclude_modules: 199,992 more entries"),
        ({"modules_to_save": ENTRIES}, "modules_to_save: 199,992 more entries"),
        ({"rank_pattern": dict.fromkeys(ENTRIES, 2)}, "rank_pattern has 200,000 entries"),
        ({"alpha_pattern": dict.fromkeys(ENTRIES, 2)}, "alpha_pattern has 200,000 entries"),
        ({"layers_to_transform": list(range(200_000))}, "does not exist; the model has layers"),
        ({"trainable_token_indices": [5] * 200_000}, "every token once"),
        ({"trainable_token_indices": list(range(200_000))}, "the model has tokens 0 to"),
    ],
)
def test_long_lists(params, fields, message):
    with pytest.raises(UserError, match=message) as error:
        find_trainable(params, AdapterConfig(**fields))
    assert len(str(error.value)) < 5000


def test_many_regexes_are_refused(params):
    patterns = {rf"q_proj|{i}[a-z]+": 2 for i in range(5000)}
    with pytest.raises(UserError, match="rank_pattern has regexes of"):
        find_trainable(params, AdapterConfig(rank_pattern=patterns))


def test_entries_are_paths_or_ends_of_them():
    assert matches("a.b.c", ["b.c"]) and matches("a.b.c", ["a.b.c"])
    assert not matches("a.b.c", ["b"]) and not matches("a.bb.c", ["b.c"])


def test_a_long_pattern_is_cut_in_messages():
    problems = list(match._entry_problems("x", "(a|b)*c" * 300, ["q_proj"], ["q_proj"]))
    assert "matches no weight" in problems[0] and len(problems[0]) < 700


def test_repeats_inside_of_each_other_are_limited():
    for text in ("(?:" * 90 + "a" + "){2,9}" * 90, "(" * 7 + "q" + "){2}" * 7):
        with pytest.raises(UserError, match="more than 6 nested counted repeats"):
            Pattern(text)
    for text in ("(" * 6 + "q" + "){1,2}" * 6, "(q){1}" * 50, r"[(](q){1}\)?", "(" * 50 + ")" * 50):
        Pattern(text)
