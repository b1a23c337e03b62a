"""A chat template of somebody else's ends in an error, and not in hours or gigabytes."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lora_jax import UserError
from lora_jax.data import sandbox

QUESTION = [{"role": "user", "content": "hi"}]
DOUBLED = "{%% set ns = namespace(x='abcdefgh') %%}{%% for i in range(60) %%}%s{%% endfor %%}"
LOOPS = {
    "nested loops": "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
    "condition of a loop": (
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "loops through a macro": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
    ),
    "loop inside of a call": (
        "{% macro f() %}{{ caller() }}{% endmacro %}{% for i in range(99999) %}{% call f() %}"
        "{% for i in range(99999) %}{% endfor %}{% endcall %}{% endfor %}"
    ),
}
BOMBS = {
    "product": "{{ 'a' * 10**10 }}",
    "product of constants": "{{ 'a' * 10000000000 }}",
    "product of lists": "{{ ([1] * 10000000000)|length }}",
    "power": "{{ 10 ** 10000000000 }}",
    "filter": "{{ 'a'|center(1000000000) }}",
    "method": "{{ 'a'.center(1000000000) }}",
    "method of a number": "{{ (1).to_bytes(10000000000, 'big') }}",
    "zeros": "{{ '1'.zfill(10000000000) }}",
    "joined": DOUBLED % "{% set ns.x = ns.x ~ ns.x %}",
    "added": DOUBLED % "{% set ns.x = ns.x + ns.x %}",
    "join": "{{ (['a' * 1000000] * 10000)|join }}",
    "join by method": "{{ ''.join(['a' * 1000000] * 10000) }}",
    "join of a generator": "{{ range(99999)|map('string')|join('b' * 90000) }}",
    "replace": "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}",
    "replace by method": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width from a value": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format from a value": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "random text": "{{ lipsum(1000000000) }}",
    "batch": "{{ [1]|batch(10000000000, 'x')|list }}",
    "indent of JSON": "{{ [[1]]|tojson(indent=1000000000) }}",
    "text of a list": "{{ ['a' * 1000000] * 10000 }}",
    "JSON of a list": "{{ (['a' * 1000000] * 10000)|tojson }}",
    "list joined as text": "{{ 'a' ~ ['a' * 1000000] * 10000 }}",
    "sum of lists": "{{ ([[1] * 90000] * 10000)|sum(start=[]) }}",
    "wrapped": "{{ ('a ' * 90000)|wordwrap(1, wrapstring='b' * 90000) }}",
    "tabs": "{{ ('\\t' * 1000000).expandtabs(100000) }}",
    "translated": "{{ 'aaaa'.translate({97: 'b' * 30000000}) }}",
    "kept in a list": (
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
        "{% set ns.x = ns.x + ['a' * 20000000] %}{% endfor %}"
    ),
    "written": "{% set x = 'a' * 20000000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "written into a variable": (
        "{% set x %}{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{% endset %}"
    ),
    "mapped": "{{ range(99999)|map('center', 99999)|list|length }}",
    "source": "{{ a }}" * 40_000,
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "join of characters": "{{ ('a' * 1000000).join('b' * 1000000) }}",
    "join of keys": "{{ ('a' * 1000000).join(dict.fromkeys(range(99)|map('string'))) }}",
    "join of a generator by method": "{{ ('a' * 1000000).join(range(99)|map('string')) }}",
    "long lines": "{{ ('a' * 1000000)|wordwrap(1) }}",
}
# Each list holds the one before twice: small in memory, and 2**60 items to walk through.
SHARED = (
    "{%% set ns = namespace(x=(1,), y=(1,)) %%}{%% for i in range(60) %%}"
    "{%% set ns.x = (ns.x, ns.x) %%}{%% set ns.y = (ns.y, ns.y) %%}{%% endfor %%}%s"
)
COMPARED = {
    "equal": SHARED % "{{ ns.x == ns.y }}",
    "less": SHARED % "{{ ns.x < ns.y }}",
    "among constants": SHARED % "{{ 1 < 2 != [ns.x] }}",
    "in a list": SHARED % "{{ ns.x in [ns.y] }}",
    "test": SHARED % "{{ ns.x is eq ns.y }}",
    "test of many": SHARED % "{{ [ns.x]|select('in', [ns.y])|list }}",
    "sort": SHARED % "{{ [ns.x, ns.y]|sort }}",
    "sort of a generator": SHARED % "{{ [ns.x, ns.y]|map('default')|sort }}",
    "unique": SHARED % "{{ [ns.x, ns.y]|unique|list }}",
    "index": SHARED % "{{ [ns.x].index(ns.y) }}",
    "key": SHARED % "{{ {ns.x: 1} }}",
    "looked up": SHARED % "{{ {}[ns.x] }}",
    "looked up by method": SHARED % "{{ {}.get(ns.x) }}",
    "made a mapping": SHARED % "{{ dict([(ns.x, 1)]) }}",
}


@pytest.fixture(autouse=True)
def no_memory_of_others(monkeypatch):
    monkeypatch.setattr(sandbox, "_FAILED", {})
    monkeypatch.setattr(sandbox, "_SPENT", {})


@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_limited(name):
    with pytest.raises(sandbox.TemplateLimit, match="the chat template was stopped: it"):
        sandbox.render(BOMBS[name], QUESTION)


@pytest.mark.parametrize("name", COMPARED)
def test_what_is_compared_or_hashed_is_limited(name, monkeypatch):
    monkeypatch.setattr(sandbox, "_LARGEST", 100_000)
    with pytest.raises(sandbox.TemplateLimit, match="it makes a text or list of"):
        sandbox.render(COMPARED[name], QUESTION)


@pytest.mark.parametrize("name", LOOPS)
def test_time_is_limited(name, monkeypatch):
    monkeypatch.setattr(sandbox, "_SECONDS", 0.05)
    with pytest.raises(sandbox.TemplateLimit, match="takes more than 0.05 seconds"):
        sandbox.render(LOOPS[name], QUESTION)


def test_a_template_that_was_stopped_is_not_run_again(monkeypatch):
    source = BOMBS["product"]
    with pytest.raises(UserError, match="was stopped") as first:
        sandbox.render(source, QUESTION)
    monkeypatch.setattr(sandbox, "_render", None)
    with pytest.raises(UserError, match="was stopped") as second:
        sandbox.render(source, QUESTION)
    assert str(first.value) == str(second.value)


def test_slow_conversations_are_limited_in_all(monkeypatch):
    monkeypatch.setattr(sandbox, "_SLOW", 0.0)
    monkeypatch.setattr(sandbox, "_SECONDS_IN_ALL", 0.0)
    sandbox.render("{{ messages }} ", QUESTION)
    with pytest.raises(UserError, match="was stopped: it takes"):
        sandbox.render("{{ messages }} ", QUESTION)


TEXTS = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ m.content }}"
    "{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content + 'x' ~ 1 }}{% else %}-{% endfor %}",
    "{% for m in messages recursive %}{{ m }}{% if m is mapping %}{{ loop(m.values()) }}{% endif %}"
    "{% endfor %}",
    "{{ messages|tojson(indent=2) }}{{ '%05.2f|%s' % (1.5, 'a') }}{{ '{:>5}'.format('b') }}",
    "{{ messages|map(attribute='content')|join(', ')|upper }}{{ [1, 2]|sum }}{{ 7 ** 2 * 3 % 5 }}",
    "{% set ns = namespace(a='') %}{% for i in range(3) %}{% set ns.a = ns.a + i|string %}"
    "{% continue %}{% endfor %}{{ ns.a.replace('1', 'one').split(',')|first|trim|center(9) }}",
    "{{ messages == messages }}{{ 'user' in messages|map(attribute='role') }}{{ {'a': 1}['a'] }}"
    "{{ messages[0] in messages }}{{ messages[0]['role'] in ['user', 'b'] }}{{ [2, 1]|sort|max }}"
    "{{ ', '.join(messages|map(attribute='role')) }}{{ '-'.join('abc') }}{{ 1 is eq 1 }}"
    "{{ 'abc'.translate({97: 'x'}) }}{{ [1, 2].index(2) }}{{ 'a b'|wordwrap(1) }}{{ {}.get(1) }}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') * 2 }}{{ 'abc'[::-1]|indent(2, true) }}",
]


@pytest.mark.parametrize("source", TEXTS)
def test_other_templates_render_as_in_transformers(source):
    expected = render_jinja_template([QUESTION], chat_template=source)
    assert sandbox.render(source, QUESTION) == expected
