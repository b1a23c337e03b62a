"""Every form of a record becomes the row it stands for; whatever else is a `BadRow`."""

import datetime
import json
import math
import random

import numpy as np
import pytest

from lora_jax.data import AnyRow, BadRow, Row, TextRow, TokenRow, columns, parse_row, parse_rows
from lora_jax.errors import UserError

ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
PAIR = {"prompt": "q", "completion": "a"}
TOOL = {"type": "function", "function": {"name": "f"}}


def problem(record, **templates) -> str:
    with pytest.raises(BadRow) as caught:
        parse_row(record, "f:1", **templates)
    str(caught.value).encode("utf-8")  # can be printed
    return str(caught.value)


def messages(record, **templates) -> tuple:
    row = parse_row(record, "f:1", **templates)
    assert isinstance(row, Row)
    return row.messages


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (PAIR | {"id": 3, "messages": None}, (ASK, ANSWER)),
        ({"messages": [SYSTEM, ASK, ANSWER], "prompt": "other"}, (SYSTEM, ASK, ANSWER)),
        (
            {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]},
            (ASK, ANSWER | {"train": False}, ASK, ANSWER),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a", "train": False, "weight": None},
                    {"from": "tool", "value": "3"},
                    {"from": "observation", "value": "4"},
                    {"from": "model", "value": "b"},
                ]
            },
            (
                SYSTEM,
                ASK,
                ANSWER | {"train": False},
                {"role": "tool", "content": "3"},
                {"role": "tool", "content": "4"},
                {"role": "assistant", "content": "b"},
            ),
        ),
        ({"conversations": [ASK, ANSWER]}, (ASK, ANSWER)),
        ({"conversations": [{"from": "human", "value": "q", "role": None}, ANSWER]}, (ASK, ANSWER)),
        ({"instruction": "q", "output": "a"}, (ASK, ANSWER)),
        ({"instruction": "q", "input": "", "output": "a", "text": "all"}, (ASK, ANSWER)),
        ({"instruction": "q", "input": None, "output": "a", "history": None}, (ASK, ANSWER)),
        (
            {"instruction": "q", "input": "x", "output": "a", "history": [["1", "2"]]},
            (
                {"role": "user", "content": "1"},
                {"role": "assistant", "content": "2"},
                {"role": "user", "content": "q\n\nx"},
                ANSWER,
            ),
        ),
    ],
)
def test_forms_of_conversations(record, expected):
    assert messages(record) == expected
    if expected[0]["role"] != "system":
        assert messages(record | {"system": "s"}) == (SYSTEM, *expected)
        assert messages(record | {"system": ""}) == expected
    assert messages(record | {"system": None}) == expected
    for tools in ([TOOL], json.dumps([TOOL])):
        assert parse_row(record | {"tools": tools}, "f:1") == Row(expected, "f:1", (TOOL,))
    for none in (None, "", [], "[]", "null"):
        assert parse_row(record | {"tools": none}, "f:1") == Row(expected, "f:1", ())


def test_messages_keep_their_other_keys_but_for_nulls():
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "train": False}
    tool = {"role": "tool", "content": "1", "name": "f"}
    with_nulls = [ASK | {"tool_calls": None, "train": None}, called | {"name": None}, tool, ANSWER]
    assert messages({"messages": with_nulls}) == (ASK, called, tool, ANSWER)


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a", "image_url": None}, {"type": "text", "text": "b"}]
    read = messages({"messages": [ASK, ANSWER | {"content": parts}]})
    assert read[1]["content"] == "ab"


def test_a_system_column_that_repeats_the_system_turn_is_no_second_one():
    assert messages({"messages": [SYSTEM, ASK, ANSWER], "system": "s"}) == (SYSTEM, ASK, ANSWER)
    text = problem({"messages": [SYSTEM, ASK, ANSWER], "system": "other"})
    assert "'system' differs from the system turn" in text


def test_text():
    assert parse_row({"text": "hi", "label": 1, "prompt": None}, "f:1") == TextRow("hi", "f:1")


@pytest.mark.parametrize(
    ("extra", "tokens", "weights"),
    [
        ({}, (5, 6, 7), (1, 1, 1)),
        ({"loss_weights": [0, 0.5, 2]}, (5, 6, 7), (0, 0.5, 2)),
        ({"loss_weights": np.array([0, 0.5, 2])}, (5, 6, 7), (0, 0.5, 2)),
        ({"labels": [-100, -100, 7], "loss_weights": None}, (5, 6, 7), (0, 0, 1)),
        ({"completion_mask": [0, 1, 1]}, (5, 6, 7), (0, 1, 1)),
        ({"assistant_masks": [False, True, True]}, (5, 6, 7), (0, 1, 1)),
        ({"attention_mask": [0, 1, 1]}, (6, 7), (1, 1)),
        ({"attention_mask": [1, 1, 0], "labels": [-100, 6, -100]}, (5, 6), (0, 1)),
        ({"messages": [ASK], "text": "ignored"}, (5, 6, 7), (1, 1, 1)),
    ],
)
def test_tokens(extra, tokens, weights):
    for ids in ([5, 6, 7], np.array([5, 6, 7])):
        row = parse_row({"input_ids": ids} | extra, "f:1")
        assert row == TokenRow(tokens, weights, "f:1")
        assert {type(token) for token in row.tokens} == {int}
        assert {type(weight) for weight in row.loss_weights} == {float}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "a row must be an object, not a string"),
        (None, "a row must be an object, not null"),
        ({"question": "q", "answer": "a"}, "data.completion); its keys: 'question', 'answer'"),
        ({}, "its keys: none"),
        (
            {"prompt": "q"},
            "a row needs 'messages', 'conversations', 'prompt' and 'completion', 'instruction' and "
            "'output', 'text', or 'input_ids'",
        ),
        ({"prompt": "q", "completion": None}, "its keys: 'prompt', 'completion' (null)"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "its keys: 'prompt', 'chosen'"),
        ({"prompt": 1, "completion": "a"}, "'prompt' is a number, not a string"),
        ({"prompt": "q", "completion": [ANSWER]}, "'completion' is a list, not a string"),
        ({"prompt": [ASK], "completion": "a"}, "'completion' is a string, not a list of messages"),
        ({"prompt": [ASK], "completion": [ASK]}, "'completion' has no assistant turn"),
        ({"prompt": [], "completion": [ANSWER]}, "'prompt' is empty"),
        ({"prompt": [ASK], "completion": [SYSTEM]}, "completion[0] is a 'system' turn"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": {}}, "'messages' is an object, not a list of messages"),
        ({"messages": ["hi"]}, "messages[0] is a string, not an object"),
        ({"messages": [{"from": "human", "value": "x"}]}, "no 'role'; its keys: 'from', 'value'"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no 'content'; its keys: 'role'"),
        ({"messages": [{"role": None, "content": "x"}]}, "messages[0] has no 'role'"),
        ({"messages": [{"role": 3, "content": "x"}]}, "messages[0].role is a number, not a string"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "Did you mean 'assistant'?"),
        ({"messages": [{"role": "\ud800", "content": "x"}]}, "messages[0].role is '\\ud800'"),
        ({"messages": [ASK | {"content": True}]}, "messages[0].content is a boolean, not a string"),
        ({"messages": [ASK | {"content": None}]}, "messages[0].content is null, not a string"),
        ({"messages": [ASK, ANSWER | {"content": []}]}, "messages[1].content is an empty list"),
        (
            {"messages": [ASK | {"content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
            "messages[0].content[0] is no",
        ),
        ({"messages": [ASK, ANSWER | {"content": [{"type": "text", "text": 3}]}]}, "content[0] is"),
        (
            {"messages": [ASK, ANSWER | {"content": None, "tool_calls": []}]},
            "messages[1].content is null",
        ),
        ({"messages": [ASK]}, "no assistant turn: nothing to learn from"),
        ({"messages": [ASK, ANSWER | {"train": False}]}, "every assistant turn has 'train': false"),
        ({"messages": [ASK, SYSTEM, ANSWER]}, "messages[1] is a 'system' turn"),
        (
            {"messages": [SYSTEM, ASK | {"role": "developer"}, ANSWER]},
            "messages[1] is a 'developer' turn: only the first turn can be one",
        ),
        ({"messages": [ASK, ANSWER | {"train": "no"}]}, "train is a string, not true or false"),
        ({"messages": [ASK | {"train": True}, ANSWER]}, "train is true on a 'user' turn"),
        ({"prompt": "\ud800", "completion": "a"}, "the unpaired surrogate \\ud800"),
        ({"messages": [ASK | {"x": ["\udfff"]}, ANSWER]}, "the unpaired surrogate \\udfff"),
        (
            {"messages": [ASK | {"x": b""}, ANSWER]},
            "value outside JSON: Object of type bytes",
        ),
        ({"conversations": "hi"}, "'conversations' is a string, not a list"),
        ({"conversations": [{"from": 3, "value": "x"}]}, "conversations[0].from is a number"),
        (
            {"conversations": [{"from": "humna", "value": "x"}]},
            "conversations[0].from is 'humna', not one of: human, gpt, model, observation, system, "
            "developer, user, assistant, tool. Did you mean 'human'?",
        ),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0].value is null, not a string"),
        (
            {"conversations": [{"from": f, "value": "x"} for f in ("human", "system", "gpt")]},
            "conversations[1] is a 'system' turn",
        ),
        ({"instruction": "q", "output": 3}, "'output' is a number, not a string"),
        ({"instruction": "q", "input": [], "output": "a"}, "'input' is a list, not a string"),
        ({"instruction": "q"}, "'instruction' and 'output'"),
        ({"instruction": "q", "output": "a", "history": "x"}, "'history' is a string"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "history[0] is not a list of a"),
        (PAIR | {"system": 3}, "'system' is a number, not a string"),
        (PAIR | {"tools": {}}, "'tools' is an object, not a list of JSON schemas"),
        (PAIR | {"tools": ["f"]}, "tools[0] is a string, not an object"),
        (PAIR | {"tools": "{"}, "'tools' is a string that is no JSON: Expecting property name"),
        (PAIR | {"tools": "[" * 100_000}, "'tools' is a string that is no JSON: nested too deeply"),
        (PAIR | {"tools": [{"x": "\ud800"}]}, "the unpaired surrogate \\ud800"),
        ({"text": 3}, "'text' is a number, not a string"),
        ({"text": " \n"}, "'text' is empty"),
        ({"text": "\ud800"}, "the unpaired surrogate \\ud800"),
        (
            {"text": "t", "prompt": "p"},
            "'text' next to 'prompt' could mean two things; a row needs",
        ),
        (
            {"text": "t", "output": "p"},
            "'text' next to 'output' could mean two things; a row needs",
        ),
        ({"input_ids": "5 6"}, "'input_ids' is a string, not a list of numbers"),
        ({"input_ids": []}, "'input_ids' is empty"),
        ({"input_ids": [5, -1]}, "input_ids[1] is not between 0 and 2147483647"),
        ({"input_ids": [5, 2**31]}, "input_ids[1] is not between 0 and 2147483647"),
        ({"input_ids": [5, True]}, "input_ids[1] is a boolean, not an integer"),
        ({"input_ids": [5, 6.0]}, "input_ids[1] is a float, not an integer"),
        ({"input_ids": [5, None]}, "input_ids[1] is null, not an integer"),
        ({"input_ids": [[5], [6]]}, "input_ids[0] is a list, not an integer"),
        ({"input_ids": [5]}, "no token after the first is supervised"),
        ({"input_ids": [5, 6], "labels": [5, -100]}, "no token after the first is supervised"),
        ({"input_ids": [5, 6], "labels": [6, -100]}, "labels[0] is neither -100 nor input_ids[0]"),
        ({"input_ids": [5, 6], "labels": [6]}, "'labels' has 1 elements, and 'input_ids' 2"),
        ({"input_ids": [5, 6], "labels": ["5", 6]}, "labels[0] is a string, not an integer"),
        ({"input_ids": [5, 6], "labels": [5, 6], "loss_weights": [1, 1]}, "'loss_weights' and"),
        ({"input_ids": [5, 6], "loss_weights": [0, 0]}, "no token after the first is supervised"),
        ({"input_ids": [5, 6], "loss_weights": [0, 1e-60]}, "no token after the first"),
        ({"input_ids": [5, 6], "loss_weights": [1, math.nan]}, "nan in 'loss_weights' is not"),
        ({"input_ids": [5, 6], "loss_weights": [1, math.inf]}, "inf in 'loss_weights' is not"),
        ({"input_ids": [5, 6], "loss_weights": [1, 1e39]}, "1e+39 in 'loss_weights' is not"),
        ({"input_ids": [5, 6], "loss_weights": [1, -0.5]}, "-0.5 in 'loss_weights' is not"),
        ({"input_ids": [5, 6], "loss_weights": [1, 10**400]}, "is too large"),
        ({"input_ids": [5, 6], "loss_weights": [1, True]}, "loss_weights[1] is a boolean"),
        ({"input_ids": [5, 6], "loss_weights": [1]}, "'loss_weights' has 1 elements"),
        ({"input_ids": [5, 6], "completion_mask": [0, 2]}, "completion_mask[1] is neither 0 nor 1"),
        ({"input_ids": [5, 6], "assistant_masks": [0, 0]}, "no token after the first"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, "'attention_mask' has 1 elements"),
        ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "no token after the first"),
    ],
)
def test_malformed_records(record, message):
    assert message in problem(record)


def test_deep_nesting_and_long_values():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert problem({"messages": [ASK | {"x": deep}, ANSWER]}) == "nested too deeply"
    assert "cannot be written as JSON" in problem({"x": deep}, prompt="{x}", completion="{x}")
    long = "é" * 10_000_000
    assert messages({"prompt": long, "completion": "a"})[0]["content"] == long
    assert parse_row({"text": long}, "f:1") == TextRow(long, "f:1")
    for record in ({long: long}, {"messages": [{"role": long, "content": long}]}):
        assert len(problem(record)) < 700


# Columns by name


def test_named_columns():
    record = {"question": "2+2?", "context": "{x}", "answer": 4, "messages": [ASK]}
    assert messages(record, prompt="{{{question}}}\nC: {context}", completion="{answer}") == (
        {"role": "user", "content": "{2+2?}\nC: {x}"},
        {"role": "assistant", "content": "4"},
    )
    record = {"Q 1": "q", "completion": "a", "system": "s", "tools": [TOOL]}
    assert parse_row(record, "f:1", prompt="{Q 1}") == Row((SYSTEM, ASK, ANSWER), "f:1", (TOOL,))
    assert messages({"prompt": "q", "x": "a"}, completion="{x}") == (ASK, ANSWER)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("é", "é"),
        (3, "3"),
        (0.5, "0.5"),
        (True, "true"),
        (None, "null"),
        (["a", "é"], '["a", "é"]'),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        (np.int64(3), "3"),
        (np.array([1, 2]), "[1, 2]"),
        (datetime.date(2024, 2, 3), "2024-02-03"),
        ([datetime.date(2024, 2, 3)], '["2024-02-03"]'),
    ],
)
def test_values_that_are_no_strings_stand_as_json(value, text):
    [ask, _] = messages({"x": value, "completion": "a"}, prompt="<{x}>")
    assert ask["content"] == f"<{text}>"


@pytest.mark.parametrize(
    ("record", "templates", "message"),
    [
        (
            {"question": "q", "answer": "a"},
            {"prompt": "{qestion}", "completion": "{answer}"},
            "data.prompt names {qestion}; the columns are: 'question', 'answer'. Did you mean "
            "'question'?",
        ),
        (
            {"question": "q"},
            {"prompt": "{question}"},
            "no column 'completion', and data.completion is not set; the columns are: 'question'",
        ),
        (
            {"question": "q", "completion": [ANSWER]},
            {"prompt": "{question}"},
            "'completion' is a list, not a string; set data.completion",
        ),
        (
            {"question": "q", "answer": "a"},
            {"prompt": "question", "completion": "{answer}"},
            "data.prompt='question' is a column's name: write {question}",
        ),
        ({"x": math.nan}, {"prompt": "{x}", "completion": "c"}, "column 'x' cannot be written"),
        ({"x": b"b"}, {"prompt": "{x}", "completion": "c"}, "bytes is not a JSON type"),
        ({"x": None}, {"prompt": "p", "completion": "{x}"}, "column 'x' of data.completion is nul"),
        ({"x": "\ud800"}, {"prompt": "{x}", "completion": "c"}, "the unpaired surrogate"),
        (3, {"prompt": "{x}", "completion": "c"}, "a row must be an object"),
    ],
)
def test_rows_that_do_not_fit_the_named_columns(record, templates, message):
    assert message in problem(record, **templates)


@pytest.mark.parametrize(
    "template", ["{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{a:}", "{a", "a}", "{a{b}}", "}{"]
)
def test_templates_with_other_braces(template):
    with pytest.raises(UserError, match=r"data\.prompt='.*not a \{column\}.*brace as \{\{ or \}\}"):
        columns(template, "data.prompt")
    with pytest.raises(UserError, match=r"data\.completion="):
        parse_row({"a": "b", "prompt": "q"}, "f:1", completion=template)


def test_columns_of_a_template():
    assert columns("{{x}} {a b}{c-d}\n{a b}", "prompt") == ("a b", "c-d", "a b")
    assert columns("none", "prompt") == ()


# Whatever comes


def check_invariants(row: AnyRow) -> None:
    if isinstance(row, TextRow):
        assert row.text.strip()
        row.text.encode("utf-8")
    elif isinstance(row, TokenRow):
        assert len(row.tokens) == len(row.loss_weights) >= 2
        assert all(type(token) is int and 0 <= token < 2**31 for token in row.tokens)
        assert all(type(w) is float and 0 <= w < 3.5e38 for w in row.loss_weights)
        assert any(w > 0 for w in row.loss_weights[1:])
    else:
        roles = [message["role"] for message in row.messages]
        assert set(roles) <= {"system", "developer", "user", "assistant", "tool"}
        assert not {"system", "developer"} & set(roles[1:])
        supervised = [m.get("train", True) for m in row.messages if m["role"] == "assistant"]
        assert any(supervised)
        assert row.prompt == row.messages[: row.answer_index]
        for message in row.messages:
            content = message.get("content")
            assert isinstance(content, str) or (content is None and message["tool_calls"])
        assert all(isinstance(tool, dict) for tool in row.tools)
        json.dumps([row.messages, row.tools], ensure_ascii=False).encode("utf-8")


VALID = [
    PAIR,
    PAIR | {"system": "s", "tools": [TOOL]},
    PAIR | {"tools": json.dumps([TOOL])},
    {"messages": [SYSTEM, ASK, ANSWER | {"train": False}, ASK, ANSWER]},
    {"messages": [ASK, ANSWER | {"content": [{"type": "text", "text": "a"}]}]},
    {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [TOOL]}]},
    {"prompt": [ASK], "completion": [ANSWER]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "q", "input": "x", "output": "a", "history": [["1", "2"]], "system": "s"},
    {"text": "t"},
    {"text": "t", "id": 1, "label": 0},
    {"input_ids": [1, 2, 3]},
    {"input_ids": [1, 2, 3], "loss_weights": [0, 0.5, 1]},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
    {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]},
    {"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 0, 1], "seq_lengths": [2, 2]},
    {"input_ids": [1, 2], "attention_mask": [[1, 0], [1, 1]], "cu_seqlens": [0, 2]},
    {"input_ids": [1, 2, 3], "segment_ids": [1, 1, 0], "token_type_ids": [0, 0, 0]},
    PAIR | {"chat_template_kwargs": {"x": 1}, "tool_choice": "auto", "response_format": {}},
    PAIR | {"functions": [{"name": "f", "parameters": {}}], "system_prompt": "s", "id": 1},
    {"messages": [ASK, ANSWER | {"weight": 1, "thinking": "t", "function_call": {"name": "f"}}]},
    {
        "conversations": [
            {"from": "human", "value": "q", "weight": 0},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "tool", "value": "1", "timestamp": "t"},
        ]
    },
    {"a": "q", "b": 3},
]
LEAVES = [None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e39, math.nan, math.inf, 2**31, 10**400]
LEAVES += ["", "a", "user", "assistant", "system", "text", "gpt", "\ud800", "é\0", "[]", "{", b"x"]
LEAVES += [datetime.date(2024, 1, 1), np.arange(3), np.float32(1), (1, 2), {1}]
KEYS = sorted({key for record in VALID for key in record} | {"role", "content", "train", "from"})
KEYS += ["weight", "tool_calls", "function_call", "function", "name", "arguments", "type", "value"]


def random_value(rng: random.Random, depth: int = 0):
    if depth > 2 or rng.random() < 0.5:
        return rng.choice(LEAVES)
    if rng.random() < 0.5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def mutated(rng: random.Random, value):
    """A copy that differs in about one place."""
    if rng.random() < 0.15:
        return random_value(rng)
    if isinstance(value, dict) and value:
        copy, key = dict(value), rng.choice(list(value))
        action = rng.randrange(4)
        if action == 0:
            del copy[key]
        elif action == 1:
            copy[rng.choice(KEYS)] = random_value(rng)
        else:
            copy[key] = mutated(rng, value[key])
        return copy
    if isinstance(value, list) and value:
        index = rng.randrange(len(value))
        replacement = [[], [value[index]] * 2, [mutated(rng, value[index])]][rng.randrange(3)]
        return value[:index] + replacement + value[index + 1 :]
    return rng.choice(LEAVES)


def test_a_hundred_thousand_mutated_records_are_rows_or_bad():
    rng = random.Random(0)
    templates = [{}] * 6 + [{"prompt": "{a}", "completion": "{b}"}, {"completion": "{system}"}]
    accepted: dict[type, int] = {}
    for _ in range(100_000):
        record = rng.choice(VALID)
        for _ in range(rng.randrange(3)):
            record = mutated(rng, record)
        try:
            rows = parse_rows(record, "f:1", **rng.choice(templates))
        except BadRow as error:
            str(error).encode("utf-8")
            accepted[BadRow] = accepted.get(BadRow, 0) + 1
        else:
            for number, row in enumerate(rows):
                assert row.where == ("f:1" if len(rows) == 1 else f"f:1[{number}]")
                if len(rows) == 1:
                    check_invariants(row)
                accepted[type(row)] = accepted.get(type(row), 0) + 1
    # The test would say little if nearly all were accepted, or refused.
    assert all(accepted[outcome] > 2000 for outcome in (Row, TextRow, TokenRow, BadRow)), accepted
