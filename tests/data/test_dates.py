"""Templates that read the date are given one that stays; templates that use chance are refused."""

from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from lora_jax.data import encode, prompt_tokens
from lora_jax.data.dates import reads_date, with_date
from lora_jax.errors import UserError

from .test_real_templates import TOKENIZERS, answer, build, row, user

DATED = ["llama3_2", "gptoss", "gptoss_training", "muse_glimmer", "muse_glimmer_training"]
ROW = row(user("q"), answer("a b"))


class Clock(datetime):
    """The clock that transformers reads."""

    day = datetime(2026, 11, 26, 23, 59)

    @classmethod
    def now(cls, tz=None):
        return cls.day


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return Clock


def text(tokenizer, date=None):
    tokens = encode(ROW, tokenizer, max_length=1_000_000, template_date=date).tokens.tolist()
    prompt = prompt_tokens(ROW, tokenizer, template_date=date).tolist()
    assert tokens[: len(prompt)] == prompt
    return tokenizer.decode(tokens)


def test_the_templates_that_read_the_date():
    assert [n for n in sorted(TOKENIZERS) if reads_date(TOKENIZERS[n].chat_template)] == sorted(
        DATED
    )


@pytest.mark.parametrize("name", DATED)
def test_a_fixed_date_is_what_the_clock_gives_on_that_day(name, clock, monkeypatch):
    tokenizer = TOKENIZERS[name]
    by_clock = text(tokenizer)
    monkeypatch.setattr(clock, "day", datetime(2027, 1, 2))
    assert text(tokenizer) != by_clock
    assert text(tokenizer, "2026-11-26") == by_clock
    assert text(tokenizer, "2027-01-02") == text(tokenizer)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama3"])
def test_other_templates_are_not_touched(name):
    source = TOKENIZERS[name].chat_template
    assert with_date(source, "2026-11-26") is source


FORMATS = ["%d %b %Y", "%Y-%m-%d", "%-d %B %y", "%A, %j", "%%d 100%% %d", "%H:%M:%S", "%x %X", "no"]
FORMATS += ["%Ey %Od %5d %_d %^a %G-W%V", "%s", "%"]
AROUND = ["{}", "\n  {}", "  {{% if true %}}{}{{% endif %}}", "{{# c #}}\n\n{}", "{{%- if 1 %}} {}"]


@pytest.mark.parametrize("around", AROUND)
def test_formats_are_those_of_strftime_and_whitespace_stays(around, clock, monkeypatch):
    monkeypatch.setattr(clock, "day", datetime(2026, 11, 5))
    calls = "".join(f"{{{{ strftime_now('{one}') }}}}|" for one in FORMATS)
    source = around.format(calls) + ("{% endif %}" if around.startswith("{{%- if") else "")
    source += "{% macro m() %}{{ strftime_now(format='%d' ~ ' %b') }}{% endmacro %}{{ m() }}"
    source += "{{ strftime_now is defined }}{{ strftime_now('%' ~ 'h') }}"
    tokenizer = build("qwen2_5")

    def render(source):
        return tokenizer.apply_chat_template(
            list(ROW.messages), chat_template=source, tokenize=False
        )

    assert render(with_date(source, "2026-11-05")) == render(source)


@pytest.mark.parametrize("date", ["0001-01-01", "9999-12-31"])
def test_the_first_and_the_last_day(date):
    assert with_date("{{ strftime_now('%d') }}", date).endswith("{{ strftime_now('%d') }}")


@pytest.mark.parametrize(
    ("used", "told"),
    [
        ("{{ ['a', 'b'] | random }}", "random"),
        ("{% filter random %}ab{% endfilter %}", "random"),
        ("{{ [['a']] | map('random') | list }}", "random"),
        ("{{ lipsum(1) }}", "lipsum"),
    ],
)
def test_chance_is_refused_by_name(used, told):
    tokenizer = build("qwen2_5")
    tokenizer.chat_template += used
    with pytest.raises(UserError, match=f"uses Jinja's '{told}': it renders another text"):
        encode(ROW, tokenizer, max_length=1_000_000)


@pytest.mark.parametrize("used", ["random|random", "{# |random lipsum #}", "{{ 'lipsum' }}"])
def test_words_that_only_read_alike_are_no_chance(used):
    tokenizer = build("qwen2_5")
    tokenizer.chat_template = used + tokenizer.chat_template
    assert encode(ROW, tokenizer, max_length=1_000_000) is not None
