"""Chat templates that render the same text every day: a fixed date, and no randomness.

transformers gives chat templates the function `strftime_now`, which reads the clock. Here, a macro
of that name with a fixed day is put in front of a template that calls it:

    {% macro strftime_now(format) %}...{% endmacro %}
    Today Date: {{ strftime_now("%d %b %Y") }}      ->      Today Date: 26 Nov 2026
"""

import json
import re
from datetime import datetime
from itertools import pairwise
from string import ascii_letters
from typing import Any

import jinja2

from lora_jax.errors import UserError

_CLOCK = "strftime_now"
_DIRECTIVE = re.compile(r"(?<!\{)%[-_0^#]*\d*[EO]?[A-Za-z]")
_MACRO = (
    "{%% macro strftime_now(format) %%}{%% set day = namespace(text=format) %%}"
    "{%% for code, value in %s %%}{%% set day.text = day.text.replace(code, value) %%}"
    "{%% endfor %%}{{ day.text }}{%% endmacro %%}\n"
)


def reads_date(source: str) -> bool:
    """Return True if the text of a template depends on the day."""
    return _CLOCK in source


def with_date(source: str, date: str | None) -> str:
    """Return the template with `strftime_now` fixed to `date` (YYYY-MM-DD), at 00:00.

    A template that reads no date is returned unchanged. With `date` None, every template is: then
    it reads the clock.
    """
    if date is None or not reads_date(source):
        return source
    day = datetime.fromisoformat(date)
    # "%%" is a percent sign; a letter after it is not a code.
    codes = [["%%", "\0"]]
    # A template may also concatenate a code: '%' ~ 'Y'. Longer codes go first: %Ey before %E.
    found = {*_DIRECTIVE.findall(source), *(f"%{letter}" for letter in ascii_letters)}
    codes += [[code, day.strftime(code)] for code in sorted(found, key=lambda c: (-len(c), c))]
    return _MACRO % json.dumps([*codes, ["\0", "%"]]) + source


def check_repeatable(source: str, tokenizer: str) -> None:
    """Refuse a template whose text is random.

    Raises:
        UserError: it uses the filter `random` or the function `lipsum` of Jinja.
    """
    try:
        lexed = jinja2.Environment().lex(source)
        words = [(kind, text) for _, kind, text in lexed if kind != "whitespace"]
    except jinja2.TemplateSyntaxError:  # reported by rendering, with the row
        return
    problem = next((name for name in map(_random_name, pairwise(words)) if name), None)
    if problem is not None:
        raise UserError(
            f"the chat template of {tokenizer} uses Jinja's {problem!r}: it renders another text "
            "each time, so no run could be repeated or resumed; use another data.chat_template"
        )


def _random_name(pair: tuple[tuple[str, str], tuple[str, Any]]) -> str | None:
    (before, opening), (kind, text) = pair
    if kind == "name" and text == "lipsum" and (before, opening) != ("operator", "."):
        return text
    applied = (before, opening) in (("operator", "|"), ("name", "filter"))
    mapped = kind == "string" and opening == "(" and text[1:-1] == "random"  # |map("random")
    return "random" if (applied and (kind, text) == ("name", "random")) or mapped else None
