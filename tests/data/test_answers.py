"""References and generations are read alike, under the chat templates of real models."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data import AnswerReader, Rendering, encode, stop_tokens
from lora_jax.data.answers import split_thought
from lora_jax.data.calls import canonical
from lora_jax.data.rows import THOUGHTS
from lora_jax.errors import UserError
from lora_jax.report import scores
from lora_jax.train.evaluate import to_answer

from .test_real_templates import BITS, CALLS, ROWS, TOKENIZERS, WEATHER, answer, row, user

OSLO = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "n": 2}}}
SLOTS = '{"a": 1, "b": [2]}'
KINDS = ROWS | {
    "two calls": row(user("q"), answer("", tool_calls=[*CALLS, OSLO]), tools=(WEATHER,)),
    "call and reasoning": row(
        user("q"), answer("", reasoning_content="hm", tool_calls=CALLS), tools=(WEATHER,)
    ),
    "slots": row(user("q"), answer(SLOTS)),
    "slots and reasoning": row(user("q"), answer(SLOTS, reasoning_content="hm")),
}
METRICS = ["exact_match", "slot_f1", "bleu", "rouge_l"]


def reader(name, **options):
    tokenizer = TOKENIZERS[name]
    return AnswerReader(Rendering(tokenizer), stop_tokens(tokenizer), **options)


def taught(conversation, tokenizer):
    """Supervised tokens of the last supervised turn."""
    example = encode(conversation, tokenizer, max_length=1_000_000)
    places = np.flatnonzero(example.loss_weights)
    starts = [places[0], *places[1:][np.diff(places) > 1]]
    return [t for t in example.tokens[starts[-1] :].tolist() if t in example.tokens[places]]


def accepted(name):
    """Kinds of rows that a template takes, with their supervised tokens."""
    for kind, conversation in KINDS.items():
        try:
            yield kind, conversation, taught(conversation, TOKENIZERS[name])
        except UserError:
            continue


def generated(read, conversation, tokens):
    return to_answer(read, [conversation], read.prompt(conversation).tolist(), tokens)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_model_that_says_what_was_supervised_is_right(name):
    for kind, conversation, tokens in accepted(name):
        for options in ({}, {"strip_thoughts": False}):
            right = generated(reader(name, **options), conversation, tokens)
            assert right.references == (right.answer,), kind
            assert right.answer, kind
            found = scores.compute(METRICS, [right])
            assert found["exact_match"] == found["slot_f1"] == 1, kind
            if re.search("[a-z]", right.answer):  # ROUGE knows nothing else
                assert found["rouge_l"] == 1, kind
            if len(right.answer.split()) > 3:  # BLEU counts runs of four words
                assert found["bleu"] == pytest.approx(100), kind


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_thoughts_and_what_a_template_writes_before_answers_are_not_compared(name):
    for kind, conversation, tokens in accepted(name):
        (wanted,) = reader(name).references([conversation])
        said = conversation.messages[conversation.answer_index]["content"]
        if kind in ("thought", "reasoning", "slots", "slots and reasoning", "one"):
            assert wanted == said.rpartition("</think>")[2].strip(), kind
        thought = generated(reader(name), conversation, tokens).thought
        assert thought == ("hm" if kind in ("thought", "reasoning") else thought), kind


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe", "gptoss", "muse_glimmer"])
def test_another_thought_is_as_good_and_another_answer_is_wrong(name):
    tokenizer, read = TOKENIZERS[name], reader(name)
    tokens = taught(KINDS["slots and reasoning"], tokenizer)
    plain = KINDS["slots"]
    one = generated(read, plain, tokens)
    assert (one.references, one.answer, one.thought) == ((SLOTS,), SLOTS, "hm")
    assert scores.compute(METRICS[:2], [one]) == {"exact_match": 1, "slot_f1": 1}
    whole = reader(name, strip_thoughts=False)
    assert scores.exact_match([generated(whole, plain, tokens)]) == 0
    wrong = taught(row(user("q"), answer('{"a": 2}', reasoning_content="hm")), tokenizer)
    assert scores.compute(METRICS[:2], [generated(read, plain, wrong)]) == {
        "exact_match": 0,
        "slot_f1": 0,
    }
    unfinished = tokens[: len(tokens) // 4]
    assert scores.exact_match([generated(read, plain, unfinished)]) == 0


WRITTEN = {  # calls of another writing, with their supervised twin
    "qwen2_5": (
        '<tool_call>{"arguments":{"n":2,\n"city":"Oslo"},"name":"weather"}</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "n": 3}}\n</tool_call>',
    ),
    "llama3_1": (
        '{"parameters": {"n": 2, "city":"Oslo"}, "name":"weather"}',
        '{"name": "forecast", "parameters": {"city": "Oslo", "n": 2}}',
    ),
    "qwen3_5_think": (
        "</think><tool_call><function=weather><parameter=n>2</parameter>\n"
        "<parameter=city>Oslo</parameter></function></tool_call>",
        "</think><tool_call><function=weather><parameter=city>Oslo</parameter></function>"
        "</tool_call>",
    ),
    "glm4moe": (
        "<think></think><tool_call>weather\n<arg_key>n</arg_key><arg_value>2</arg_value>"
        "<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>",
        "<tool_call>weather\n<arg_key>n</arg_key><arg_value>Oslo</arg_value></tool_call>",
    ),
    "lfm2_2_5": ('[weather(n=2, city="Oslo")]', "[weather('Oslo', n=2)]"),
    "gptoss": (
        ' to=functions.weather<|channel|>commentary json<|message|>{"n":2,"city":"Oslo"}',
        ' to=functions.weather<|channel|>commentary json<|message|>{"n":2}',
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_calls_are_compared_by_what_they_call(name):
    call = row(user("q"), answer("", tool_calls=[OSLO]), tools=(WEATHER,))
    for text, expected in zip(WRITTEN[name], (1, 0), strict=True):
        tokens = TOKENIZERS[name](text)["input_ids"]
        one = generated(reader(name), call, tokens)
        assert scores.exact_match([one]) == expected, one


def test_a_call_in_the_text_of_a_row_is_compared_as_one():
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    other = '<tool_call>{"arguments": {"b": 2, "a": 1}, "name": "f"}</tool_call>'
    tokens = TOKENIZERS["qwen2_5"](other)["input_ids"]
    one = generated(reader("qwen2_5"), row(user("q"), answer(text)), tokens)
    assert scores.compute(METRICS[:2], [one]) == {"exact_match": 1, "slot_f1": 1}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            '[{"name": "f", "arguments": {"a": 1}, "id": "x1"}]',
            '[{"arguments":{"a":1},"name":"f"}]',
        ),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"name": "f", "arguments": {"a": 1}}'),
        ('f\n```json\n{"a": 1,\n"b": 2}\n```', 'f ```json {"b": 2, "a": 1} ```'),
        ("[f(a=1, b='x'), g()]", '[ f(b="x",a=1), g( ) ]'),
        ('<parameter name="a">1</parameter><parameter name="b">2</parameter>',) * 2,
    ],
)
def test_calls_in_one_form(one, other):
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "arguments": {"a": "1"}}'),
        ('{"name": "f", "arguments": {"a": "x  y"}}', '{"name": "f", "arguments": {"a": "x y"}}'),
        ('<tool_call>{"name": "f"}</tool_call>', '{"name": "f"}'),
        ("[f(a=1)]", "[f(a=2)]"),
        ("[f(1)]", "[f(2)]"),
        ('{"name": "f"', '{"name": "f"}'),
    ],
)
def test_other_calls_stay_apart(one, other):
    assert canonical(one) != canonical(other)


@given(st.text(alphabet="[]{}()\"'\\=,:ax1 \n\0") | st.text())
def test_any_text_has_a_form(text):
    assert canonical(canonical(text)) == canonical(text) or "(" in text or '"' in text


# Ordinary answers are read as before: the reference is the content, a generation its decoding.

FREE = ["qwen2_5", "gemma3", "llama3", "cohere"]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from([*BITS, "\t", "\u3000", "é"]), max_size=6).map("".join))
def test_the_reference_of_an_ordinary_row_is_its_content(text):
    text = text + "x"
    for name in FREE:
        tokenizer, conversation = TOKENIZERS[name], row(user("q"), answer(text))
        (wanted,) = reader(name).references([conversation])
        assert wanted == (text if name == "qwen2_5" else text.strip())
        tokens = tokenizer(text)["input_ids"]
        one = generated(reader(name), conversation, tokens)
        assert (one.answer, one.thought) == (tokenizer.decode(tokens), "")
        assert scores.exact_match([one]) == 1


def test_special_tokens_in_an_answer_are_skipped_on_both_sides():
    tokenizer, conversation = TOKENIZERS["qwen2_5"], row(user("q"), answer("a<|eot_id|> b"))
    one = generated(reader("qwen2_5"), conversation, taught(conversation, tokenizer))
    assert (one.references, one.answer) == (("a b",), "a b")


def test_without_a_template_the_completion_is_the_reference():
    tokenizer, conversation = TOKENIZERS["qwen2_5"], row(user("Q: "), answer(" 4 "))
    plain = Rendering(tokenizer, chat_template="none")
    read = AnswerReader(plain, stop_tokens(tokenizer, "none"))
    assert read.references([conversation]) == (" 4 ",)


def test_what_is_asked_is_the_last_supervised_turn():
    read = reader("qwen2_5")
    conversation = ROWS["last untrained"]
    assert read.references([conversation]) == ("a b",)
    prompt = TOKENIZERS["qwen2_5"].decode(read.prompt(conversation))
    assert prompt.endswith("user\nq<|im_end|>\n<|im_start|>assistant\n")


def test_rows_that_share_a_prompt_give_their_distinct_references():
    rows = [row(user("q"), answer(text)) for text in ("a", "b", "a")]
    assert reader("qwen3").references(rows) == ("a", "b")


def test_a_thought_is_split_off_where_it_begins_the_answer():
    assert split_thought("", "so <think>hm</think> a") == ("", "so <think>hm</think> a")
    assert split_thought("", "a </think> b") == ("", "a </think> b")
    assert split_thought("<think>\n", "a </think> b") == ("a ", " b")
    for opening, closing in THOUGHTS:
        assert split_thought("", f"{opening}hm{closing}a") == ("hm", "a")
    assert json.loads(split_thought("", "<think></think>\n\n{}")[1]) == {}
