"""Supervised text of templates with {% generation %} blocks."""

import pytest

from lora_jax.data import (
    Row,
    encode,
)

from .byte_templates import CHATML, GOLDEN, MISTRAL, build, chat, encoded, error_of


def blocks(before: str = "", inside: str = "", after: str = "", ends: str = "") -> str:
    """ChatML with a block around the content and `inside`; `before` and `after` it."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}" + before + "{% generation %}"
        "{{ m['content'] }}" + inside + "{% endgeneration %}" + after + "{% else %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" + ends + "{% if "
        "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


INSIDE = blocks(inside="{{ '<|im_end|>\n' }}")
OUTSIDE = blocks(after="{{ '<|im_end|>\n' }}")


@pytest.mark.parametrize("template", [INSIDE, OUTSIDE])
@pytest.mark.parametrize("last", ["c", ""])
def test_a_block_with_and_without_the_end_of_turn(template, last):
    row = chat("q", "a b", "r", last)
    assert encoded(row, build(template)) == GOLDEN["chatml"][1].replace("«c", f"«{last}")
    row = chat("q", "a~", "r", last)
    assert encoded(row, build(template)).count("«") == 1
    assert encoded(row, build(template)).endswith(f"«{last}<|im_end|>»")


def test_a_block_that_ends_in_nothing_gets_eos():
    assert encoded(chat("q", "a"), build(blocks(after="{{ '\nend' }}"))).endswith("«a</s>»")


def test_a_block_that_begins_in_the_prompt_is_cut_and_one_that_begins_later_wins():
    early = INSIDE.replace("'<|im_start|>' + m['role'] + '\n'", "'<|im_start|>'").replace(
        "{% generation %}", "{% generation %}{{ m['role'] + '\n' }}"
    )
    early = early.replace("{{ m['content'] + '<", "{{ m['role'] + '\n' + m['content'] + '<")
    assert encoded(chat("q", "a b", "r", "c"), build(early)) == GOLDEN["chatml"][1]
    later = blocks(before="{{ '<think></think>' }}", inside="{{ '<|im_end|>\n' }}")
    expected = GOLDEN["chatml"][1].replace("«", "<think></think>«")
    assert encoded(chat("q", "a b", "r", "c"), build(later)) == expected


REWRITTEN = """{% for m in messages %}{{ '<|im_start|>' + m['role'] }}\
{% set old = m['role'] == 'user' and loop.revindex > 2 %}{% if m['role'] == 'assistant' %}\
{% generation %}{{ '\\n' + m['content'] + '<|im_end|>\\n' }}{% endgeneration %}{% else %}\
{{ '\\n' + ('old ' if old else '') + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def test_blocks_of_templates_that_rewrite_history():
    row, expected = chat("q", "a b", "r", "c"), GOLDEN["chatml"][1].replace("q", "old q")
    assert encoded(row, build(REWRITTEN)) == expected  # the block begins in the prompt
    head = "{{ '\\n' }}{% generation %}{{ m['content'] + '<"
    after = REWRITTEN.replace("{% generation %}{{ '\\n' + m['content'] + '<", head)
    assert encoded(row, build(after)) == expected
    later = after.replace(
        "{{ '\\n' }}{% generation %}", "{{ '\\n<think></think>' }}{% generation %}"
    )
    text = encoded(row, build(later))
    assert text == expected.replace("«", "<think></think>«")
    text = encoded(chat("q", "a b~", "r", "c"), build(REWRITTEN))
    assert text == expected.replace("«a b<|im_end|>»", "a b<|im_end|>")
    end = " + '<|im_end|>\\n' }}{% endgeneration %}"
    stops_short = REWRITTEN.replace(end, " }}{% endgeneration %}{{ '<|im_end|>\\n' }}", 1)
    assert encoded(row, build(stops_short)) == expected
    # the same without blocks is refused
    plain = REWRITTEN.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    text = error_of(encode, row, build(plain), max_length=999)
    assert "renders the text before turn 1 differently as a prompt and inside the conver" in text
    assert "'q<|im_end|>\\n<|im_start|>assistant\\n' and 'old q<|im_end|>" in text
    # and so is a prompt that opens a thought which the answers lack
    opens = REWRITTEN.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>'")
    text = error_of(encode, row, build(opens), max_length=999)
    assert text.endswith("; begin the answers with a thought, or use another data.chat_template")
    thoughts = chat("q", "<think>a b", "r", "<think>c")
    assert encoded(thoughts, build(opens)) == expected.replace("«", "<think>«")


def test_two_blocks_in_a_turn():
    two = blocks(
        after="{{ ' tool ' }}{% generation %}{{ '!<|im_end|>\n' }}{% endgeneration %}",
    )
    text = encoded(chat("q", "a", "r", "c"), build(two))
    assert text.count(" tool ") == 2
    assert text.partition("\n<|im_start|>user\nr")[0].endswith("«a» tool «!<|im_end|>»")
    assert text.endswith("«c» tool «!<|im_end|>»")
    text = encoded(chat("q", "a~", "r", "c"), build(two))
    assert "a tool !" in text
    # where history is rewritten nobody knows whose they are
    rewritten = two.replace("{{ m['content'] + '<", "{{ loop.revindex }}{{ m['content'] + '<")
    text = error_of(encode, chat("q", "a", "r", "c"), build(rewritten), max_length=99)
    assert "rewrites earlier turns, and the 4 {% generation %} blocks cannot be assigned to" in text


def test_as_many_blocks_as_turns_may_still_be_of_one_turn():
    again = "{% if m['content'] == 'a b' %}{% generation %}{% endgeneration %}{% endif %}{% else %}"
    uneven = REWRITTEN.replace("{% else %}", again, 1).replace(
        "m['role'] == 'assistant' %}",
        "m['content'] == 'c' %}{{ 'c' }}{% elif m['role'] == 'assistant' %}",
    )
    text = error_of(encode, chat("q", "a b", "r", "c"), build(uneven), max_length=999)
    assert "the 2 {% generation %} blocks cannot be assigned to the 2 assistant turns" in text


def test_blocks_of_two_answers_in_a_row():
    block = "{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
    template = MISTRAL.replace("{{ ' ' + m['content'] + eos_token }}", block)
    row = Row((*chat("q", "a").messages, {"role": "assistant", "content": "b"}), "f:1")
    assert encoded(row, build(template)) == "<s>[INST] q [/INST]« a</s> b</s>»"
    assert encoded(row, build(template)) == encoded(row, build(MISTRAL))
    row = Row((*chat("q", "a~").messages, {"role": "assistant", "content": "b"}), "f:1")
    assert encoded(row, build(template)) == "<s>[INST] q [/INST] a</s>« b</s>»"


def test_a_turn_without_a_block_is_refused():
    only = INSIDE.replace("if m['role'] == 'assistant'", "if m['content'] == 'a'")
    assert encoded(chat("q", "a"), build(only)).endswith("«a<|im_end|>»")
    text = error_of(encode, chat("q", "a", "r", "c"), build(only), max_length=99)
    assert "has {% generation %} blocks, but none for turn 3; mark turn 3" in text
    assert encoded(chat("q", "c~", "r", "a"), build(only)).endswith("«a<|im_end|>»")


def test_blocks_that_are_no_use_are_passed_over():
    """In comments, and where transformers counts positions that are none of the text."""
    for template in (
        "{# no {% generation %} here #}" + CHATML,
        "{% macro say(m) %}{{ '<|im_start|>' + m['role'] + '\n' }}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        INSIDE.replace("{% for", "{% set text %}{% for", 1).replace(
            "{% if add", "{% endset %}{{ text }}{% if add"
        ),
    ):
        assert encoded(chat("q", "a b", "r", "c"), build(template)) == GOLDEN["chatml"][1]
