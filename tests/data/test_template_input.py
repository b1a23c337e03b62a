"""Input of chat templates from rows and settings: arguments, keys of messages, calls, tools."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_jax.data import (
    Rendering,
    Row,
    TokenRow,
    encode,
    encode_rows,
    parse_rows,
    prompt_tokens,
    stop_tokens,
)
from lora_jax.errors import UserError

ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
END = "<|im_end|>"
# As Qwen's: a thought is asked for, unless it is turned off.
THINKING = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
).replace(
    "{{ m['role'] }}:",
    "{{ m['role'] }}:{% if m['role'] == 'user' and enable_thinking is defined %}"
    "{{ '[think]' if enable_thinking else '[no think]' }}{% endif %}",
)
MARKED = THINKING.replace(
    "{{ m['content'] }}{{ '<|im_end|>' }}",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{{ '<|im_end|>' }}{% endif %}",
)
CALLS = (
    "{% for t in tools or [] %}{{ t.function.name }},{% endfor %}{% for m in messages %}"
    "{{ m['role'] }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.type }} {{ c.function.name }} ARGUMENTS{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
READ = {
    "as json": CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}"),
    "by item": CALLS.replace(
        "ARGUMENTS", "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}"
    ),
    "joined": CALLS.replace("ARGUMENTS", "{{ '' + c.function.arguments }}"),
}


def build(template):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    tokenizer.chat_template = template
    return tokenizer


def row(record, **options):
    (found,) = parse_rows(record, "f:1", **options)
    assert isinstance(found, Row)
    return found


def text(record, tokenizer, **options):
    """The example with its supervised part in « »."""
    example = encode(row(record), tokenizer, max_length=1000, **options)
    first = int(np.argmax(example.loss_weights > 0))
    assert (example.loss_weights[first:] > 0).all()
    return (
        tokenizer.decode(example.tokens[:first]) + f"«{tokenizer.decode(example.tokens[first:])}»"
    )


@pytest.mark.parametrize("template", [THINKING, MARKED], ids=["split", "marked"])
def test_arguments_of_the_row_come_before_those_of_the_config(template):
    tokenizer = build(template)
    plain = {"messages": [ASK, ANSWER]}
    off = {"enable_thinking": False}
    written = {key: f"user:{key}q{END}assistant:«a{END}»" for key in ("", "[think]", "[no think]")}
    assert text(plain, tokenizer) == written[""]
    assert text(plain, tokenizer, chat_template_kwargs=off) == written["[no think]"]
    on = plain | {"chat_template_kwargs": {"enable_thinking": True}}
    assert text(on, tokenizer) == written["[think]"]
    assert text(on, tokenizer, chat_template_kwargs=off) == written["[think]"]
    for record, options in ((plain, {"chat_template_kwargs": off}), (on, {})):
        prompt = tokenizer.decode(prompt_tokens(row(record), tokenizer, **options))
        assert text(record, tokenizer, **options).startswith(prompt + "«")


def test_rows_with_other_arguments_are_rendered_apart():
    tokenizer = build(THINKING)
    rows = [row({"messages": [ASK, ANSWER], "chat_template_kwargs": {"enable_thinking": value}})
            for value in (True, False, True)]  # fmt: skip
    examples, _ = encode_rows(rows, Rendering(tokenizer), max_length=100)
    assert ["[no" in tokenizer.decode(example.tokens) for example in examples] == [
        False,
        True,
        False,
    ]


def test_arguments_that_no_template_reads():
    tokenizer = build(THINKING)
    record = {"messages": [ASK, ANSWER], "chat_template_kwargs": {"enable_thinkin": True}}
    with pytest.raises(UserError, match="f:1: 'chat_template_kwargs' that .* 'enable_thinkin'"):
        encode(row(record), tokenizer, max_length=100)
    false = record | {"chat_template_kwargs": {"python_tools": None, "xml_tools": []}}
    assert text(false, tokenizer) == text({"messages": [ASK, ANSWER]}, tokenizer)
    for call in (encode, prompt_tokens):
        options = {"max_length": 100} if call is encode else {}
        for template in (None, "none"):
            with pytest.raises(UserError, match="data.chat_template_kwargs names 'thinking'"):
                call(
                    row({"messages": [ASK, ANSWER]}),
                    tokenizer,
                    chat_template=template,
                    chat_template_kwargs={"thinking": False},
                    **options,
                )


def test_the_end_of_an_answer_is_found_with_the_arguments():
    needs = "{{ raise_exception('no mode') if mode is not defined else '' }}" + THINKING
    tokenizer = build(needs.replace("<|im_end|>", "[{{ mode }}]<|im_end|>").replace("'[", "'["))
    with pytest.raises(UserError, match="no mode"):
        stop_tokens(tokenizer)
    end = tokenizer.convert_tokens_to_ids(END)
    assert stop_tokens(tokenizer, None, (), {"mode": "x"}) == {end}


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "strftime_now"])
def test_arguments_that_are_the_programs_own(name):
    tokenizer = build(THINKING + "{{ tools or '' }}{# strftime_now #}")
    with pytest.raises(UserError, match=f"data.chat_template_kwargs cannot hold '{name}'"):
        encode_rows(
            [row({"messages": [ASK, ANSWER]})],
            Rendering(tokenizer, chat_template_kwargs={name: [1]}),
            max_length=100,
        )


def test_keys_of_messages_that_the_template_reads():
    tokenizer = build(THINKING.replace("{{ m['role'] }}:", "{{ m['role'] }}:{{ m['mood'] }}"))
    rows = [
        row({"messages": [ASK | {"mood": "glad"}, ANSWER | more]}) for more in ({}, {"pose": 1}) * 2
    ]
    assert text({"messages": [ASK | {"mood": "glad"}, ANSWER]}, tokenizer).startswith("user:gladq")
    with pytest.raises(UserError) as caught:
        encode_rows([*rows, *rows], Rendering(tokenizer), max_length=100)
    told = str(caught.value)
    assert told.count("\n") == 0 and told.count("'pose'") == 1 and "mood" not in told
    assert told.startswith("f:1 and 3 more rows: keys of messages that are not known, nor read by")
    examples, counts = encode_rows(rows, Rendering(tokenizer), max_length=100, on_bad_row="drop")
    assert (len(examples), counts.bad) == (2, 2)
    ignored = row({"messages": [ASK, ANSWER | {"pose": 1}]}, ignore_columns=["pose"])
    assert ignored == row({"messages": [ASK, ANSWER]})


@pytest.mark.parametrize("template", READ.values(), ids=READ)
def test_calls_and_tools_are_rendered_alike_in_every_form(template):
    tokenizer = build(template)
    function = {"name": "f", "arguments": {"é": [1, "x"]}}
    as_text = function | {"arguments": json.dumps(function["arguments"])}
    found = set()
    for call in (
        {"type": "function", "function": function},
        {"id": "1", "type": "function", "function": as_text},
        {"function": as_text, "type": None},
        function,
        {"id": "1", **as_text},
    ):
        for tool in ({"name": "f"}, {"type": "function", "function": {"name": "f"}}):
            calls = ASK, {"role": "assistant", "content": "", "tool_calls": [call]}
            found.add(text({"messages": [*calls], "tools": [tool]}, tokenizer))
    legacy = {"role": "assistant", "content": "", "function_call": as_text}
    found.add(text({"messages": [ASK, legacy], "functions": [{"name": "f"}]}, tokenizer))
    (one,) = found
    assert one.startswith(f"f,user:q{END}assistant:«function f ") and '\\"' not in one


def test_packed_sequences_are_examples_of_their_own():
    weights = [0, 1, 0.5, 1, 0, 1, 1]
    packed = {"input_ids": [5, 6, 7, 8, 9, 5, 6], "loss_weights": weights}
    rows = [
        *parse_rows(packed | {"seq_lengths": [3, 2, 2]}, "f:1"),
        *parse_rows({"input_ids": [5, 6]}, "f:2"),
    ]
    apart = [
        TokenRow((5, 6, 7), (0.0, 1.0, 0.5), "f:1[0]"),
        TokenRow((5, 6), (1.0, 1.0), "f:1[2]"),
        TokenRow((5, 6), (1.0, 1.0), "f:2"),
    ]
    examples, counts = encode_rows(rows, Rendering(build(None)), max_length=10)
    alone, _ = encode_rows(apart, Rendering(build(None)), max_length=10)
    for one, other in zip(examples, alone, strict=True):
        assert one.where == other.where
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.loss_weights.tolist() == other.loss_weights.tolist()
    assert (counts.packed, counts.left_out, counts.bad, counts.examples) == (1, 1, 0, 3)
