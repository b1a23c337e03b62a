"""Tools, turns and thoughts that a template writes, and rows whose parts it leaves out."""

import pytest

from lora_jax.data import (
    Row,
    encode,
    encode_all,
    prompt_tokens,
)
from lora_jax.data.rows import THOUGHTS

from .byte_templates import CHATML, build, chat, encoded, error_of, marked

TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {}}},)
WITH_TOOLS = (
    "{% if tools %}{{ 'tools: ' + tools | map(attribute='function.name') | join(' ') \
+ '\\n' }}{% endif %}"
    + CHATML
)


def test_tools_go_to_the_template():
    row = Row(chat("q", "a").messages, "f.jsonl:1", TOOLS)
    rest = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»"
    assert encoded(row, build(WITH_TOOLS)) == "tools: f\n" + rest
    prompt = build().decode(prompt_tokens(row, build(WITH_TOOLS)))
    assert prompt == "tools: f\n" + rest.partition("«")[0]
    assert encoded(chat("q", "a"), build(WITH_TOOLS)) == rest
    needs = "{% if not tools %}{{ raise_exception('none') }}{% endif %}" + WITH_TOOLS
    assert encoded(row, build(needs)) == "tools: f\n" + rest
    # a tokenizer may have a template for them alone
    tokenizer = build({"default": CHATML, "tool_use": WITH_TOOLS})
    examples, _ = encode_all([chat("q", "a"), row], tokenizer, max_length=99)
    assert [marked(e, tokenizer) for e in examples] == [rest, "tools: f\n" + rest]
    assert build().decode(prompt_tokens(row, tokenizer)) == prompt


def test_tools_that_the_template_leaves_out_are_refused():
    row = Row(chat("q", "a").messages, "f.jsonl:1", TOOLS)
    text = error_of(encode, row, build(CHATML), max_length=99)
    assert text.startswith("f.jsonl:1: the chat template leaves out the tools of the row")
    text = error_of(encode, row, build(CHATML), chat_template="none", max_length=99)
    assert text == "f.jsonl:1: data.chat_template='none' has no place for the row's tools"


def test_what_the_template_leaves_out_of_an_answer_is_refused():
    call = [{"function": {"name": "f", "arguments": {}}}]
    question = {"role": "user", "content": "q"}
    for more, lost in (
        ({"tool_calls": call}, "the tool call 'f'"),
        ({"tool_calls": [{"name": "g", "arguments": {}}]}, "the tool call 'g'"),
        ({"thinking": "hm"}, "the thinking"),
        ({"reasoning_content": "hm", "tool_calls": call}, "the reasoning_content and the tool"),
    ):
        row = Row((question, {"role": "assistant", "content": "a"} | more), "f.jsonl:1")
        text = error_of(encode, row, build(), max_length=99)
        assert text.startswith(f"f.jsonl:1: the chat template leaves out {lost}")
        assert " of turn 1, wholly or in part; " in text
    half = CHATML.replace("m['content']", "m['content'][:2 if m['role'] == 'assistant' else 99]")
    text = error_of(encode, chat("q", "abc", "r", "a"), build(half), max_length=99)
    assert "leaves out the content of turn 1, wholly or in part, or rewrites it when" in text
    text = error_of(encode, chat("q", "abc~", "r", "a"), build(half), max_length=99)
    assert "leaves out the content of turn 1, wholly or in part" in text  # nor is it in the prompt


def role(name: str, text: str) -> str:
    return "{% elif m['role'] == '" + name + "' %}{{ " + text + " }}"


THREE_ROLES = {  # as zephyr and olmo2 write conversations: what is of another role is passed over
    "zephyr": "{% for m in messages %}{% if false %}"
    + "".join(
        role(name, f"'<|{name}|>\n' + m['content'] + eos_token + '\n'")
        for name in ("user", "system", "assistant")
    )
    + "{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    "{% endfor %}",
    "olmo2": "{{ bos_token }}{% for m in messages %}{% if false %}"
    + role("system", "'<|system|>\n' + m['content'] + '\n'")
    + role("user", "'<|user|>\n' + m['content'] + '\n'")
    + role("assistant", "'<|assistant|>\n' + m['content'] + eos_token + '\n' * (not loop.last)")
    + "{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    "{% endfor %}",
}


@pytest.mark.parametrize("name", THREE_ROLES)
def test_turns_of_the_context_that_the_template_leaves_out_are_refused(name):
    tokenizer = build(THREE_ROLES[name])
    assert encoded(chat("q", "a", "r", "c"), tokenizer).count("«") == 2
    question, last = chat("1", "1").messages
    result = {"role": "tool", "content": "1"}  # which is found in the text by accident
    call = {"function": {"name": "f", "arguments": {"n": 1}}}
    asked = {"role": "assistant", "content": "1", "tool_calls": [call], "train": False}
    text = error_of(encode, Row((question, result, last), "f:1"), tokenizer, max_length=99)
    assert text.startswith("f:1: the chat template leaves out the tool result of turn 1, wholly")
    assert "; write tools, calls and results into the contents as text, or use" in text
    text = error_of(encode, Row((question, asked, question, last), "f:1"), tokenizer, max_length=99)
    assert text.startswith("f:1: the chat template leaves out the tool call 'f' of turn 1, wholly")
    # what follows the last supervised turn is no part of the example
    assert encoded(Row((question, last, result), "f:1"), tokenizer).count("«") == 1


def test_a_turn_that_is_left_out_for_its_text_is_refused():
    for condition in ("m['content'] != 'why?'", "'?' not in m['content']"):
        some = CHATML.replace("in messages", f"in messages if {condition}")
        assert encoded(chat("q", "a~", "s", "c"), build(some)).count("«") == 1
        text = error_of(encode, chat("Q", "A~", "why?", "C"), build(some), max_length=99)
        assert text.startswith("f.jsonl:1: the chat template leaves out the content of turn 2")


def test_turns_out_of_order_and_parts_in_other_answers_are_refused():
    swapped = CHATML.replace("in messages", "in messages[1:3] + messages[:1] + messages[3:]")
    text = error_of(encode, chat("q", "a~", "r", "c"), build(swapped), max_length=99)
    assert text == (
        "f.jsonl:1: the chat template moves parts of turn 0 behind later turns; "
        "use another data.chat_template"
    )
    echoes = CHATML.replace(
        "+ m['content']", "+ messages[0].content * (m.role == 'assistant') + m['content']"
    )
    text = error_of(encode, chat("q", "a"), build(echoes), max_length=99)
    assert text == (
        "f.jsonl:1: the chat template mixes the content of turn 0 with the answer of turn 1; "
        "use another data.chat_template"
    )


def test_a_thought_that_is_rendered_twice_is_refused():
    """The prompt opens the thought, and the content that begins with one is written behind it."""
    opens = CHATML.replace(
        "'<|im_start|>' + m['role'] + '\n' + m['content']",
        "'<|im_start|>' + m['role'] + '\n' + ('<think>\n' if m['role'] == 'assistant' else '')"
        " + m['content']",
    ).replace("assistant\n'", "assistant\n<think>\n'")
    assert encoded(chat("q", "hm</think>a"), build(opens)).endswith(
        "<think>\n«hm</think>a<|im_end|>»"
    )
    text = error_of(encode, chat("q", "<think>hm</think>a"), build(opens), max_length=99)
    assert text.startswith("f.jsonl:1: the chat template repeats the thought of turn 1; ")
    both = CHATML.replace("m['content']", "(m.thinking ~ m.reasoning if m.thinking) ~ m['content']")
    both = both.replace(" if m.thinking)", " if m.thinking else '')")
    question = {"role": "user", "content": "q"}
    twice = {"role": "assistant", "content": "a", "thinking": "hm", "reasoning": "hm"}
    text = error_of(encode, Row((question, twice), "f:1"), build(both), max_length=99)
    assert text.startswith("f:1: the chat template repeats the thinking of turn 1; ")
    for opening, closing in THOUGHTS:
        said = f"{opening}hm{closing}a"
        two = {"role": "assistant", "content": said, "reasoning_content": "hm"}
        text = error_of(encode, Row((question, two), "f:1"), build(), max_length=99)
        start = "f:1: turn 1 has a thought in its reasoning_content and another in its"
        assert text.startswith(start)
        assert "keep one; write the thoughts into the contents, as <think>..</think>, or" in text
    options = {"chat_template": "none", "max_length": 99}
    said = {"role": "assistant", "content": "a", "thinking": "hm"}
    text = error_of(encode, Row((question, said), "f:1"), build(), **options)
    assert text == (
        "f:1: data.chat_template='none' has no place for the thinking; write it into the content"
    )


def test_a_system_turn_that_the_template_leaves_out_is_refused():
    users = CHATML.replace("in messages", "in messages if m['role'] != 'system'")
    text = error_of(encode, chat("q", "a", system="Hm"), build(users), max_length=99)
    assert text.startswith(
        "f.jsonl:1: the chat template leaves out the system turn; put the system"
    )
    options = {"system_prompt": "Hm", "max_length": 99}
    assert "leaves out the system turn" in error_of(encode, chat("q", "a"), build(users), **options)


def test_eos_that_stands_between_turns_alone_is_supervised():
    between = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if not loop.last %}"
        "{{ eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ eos_token + '\nassistant:' }}{% endif %}"
    )
    text = encoded(chat("q", "a", "r", "c"), build(between))
    assert text == "user: q</s>\nassistant:« a</s>»\nuser: r</s>\nassistant:« c</s>»"
