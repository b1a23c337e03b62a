"""Every line of the tables in docs/data.md: what becomes of the key that it names."""

import datetime
import json
import re
from pathlib import Path

import numpy as np
import pytest

from lora_jax.data import BadRow, Row, TextRow, TokenRow, keys, parse_rows
from lora_jax.data.rows import REASONING

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
SILENT = ANSWER | {"train": False}
PAIR = {"prompt": "q", "completion": "a"}
HELLO = (ASK, ANSWER)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
DATE = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)


def chat(*messages, **more):
    return {"messages": list(messages), **more}


def turn(**more):
    """A conversation whose answer has more keys."""
    return chat(ASK, ANSWER | more)


def shared(*turns, **more):
    pairs = [{"from": speaker, "value": value} for speaker, value in turns]
    return {"conversations": pairs, **more}


def called(**call):
    return turn(content=None, tool_calls=[call])


def tokens(**more):
    return {"input_ids": [5, 6, 7, 8, 9], **more}


def with_train(value):
    return ((ASK, ANSWER | {"train": value}),)


def split(*lengths, ids=(5, 6, 7, 8, 9)):
    """The rows that sequences of these lengths make."""
    ends = np.cumsum(lengths)
    return tuple(
        TokenRow(tuple(ids[end - n : end]), (1.0,) * n, f"f:1[{i}]", i)
        for i, (n, end) in enumerate(zip(lengths, ends, strict=True))
    )


WHOLE = (TokenRow((5, 6, 7, 8, 9), (1.0,) * 5, "f:1"),)
CUT = split(3, 2)
SQUARE = np.kron([[1, 0], [0, 1]], np.tril(np.ones((3, 3), int)))[:5, :5]
CALLED = ASK, ANSWER | {"content": None, "tool_calls": [CALL]}

# The first cell of a line -> records, each with its messages, its row, rows of tokens, or a part of
# the message that refuses it.
LINES = {
    "`input_ids`": [(tokens(), WHOLE), (tokens(messages=[ASK], text="t", prompt="p"), WHOLE)],
    "`messages`": [(chat(*HELLO, prompt="q", text="q a"), HELLO)],
    "`conversations`": [
        (shared(("human", "q"), ("gpt", "a")), HELLO),
        ({"conversations": [ASK, ANSWER]}, HELLO),
    ],
    "`prompt`, `completion`": [
        (PAIR, HELLO),
        ({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}, (ASK, SILENT, ASK, ANSWER)),
    ],
    "`instruction`, `output`": [
        ({"instruction": "q", "input": "x", "output": "a"}, (ASK | {"content": "q\n\nx"}, ANSWER)),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, HELLO + HELLO),
        ({"instruction": "q", "output": "a", "text": "all of it"}, HELLO),
    ],
    "`text`": [({"text": "t"}, TextRow("t", "f:1")), ({"text": "t", "prompt": "q"}, "ambiguous")],
    "`chosen`, `rejected`": [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "are a preference pair"),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]}, "are a preference pair"),
        (chat(*HELLO, chosen=[], rejected=[ASK]), "'rejected': a row has one answer"),
    ],
    "`segments`": [({"segments": [{"label": True, "text": "t"}]}, "its keys: 'segments'")],
    "`system`": [
        (PAIR | {"system": "s"}, (SYSTEM, *HELLO)),
        ({"instruction": "q", "output": "a", "system_prompt": "s"}, (SYSTEM, *HELLO)),
        (shared(("human", "q"), ("gpt", "a"), system_message="s"), (SYSTEM, *HELLO)),
        (PAIR | {"system": "s", "system_prompt": "s"}, (SYSTEM, *HELLO)),
        (PAIR | {"system": "s", "system_prompt": "t"}, "'system' and 'system_prompt' differ"),
        (chat(SYSTEM, *HELLO, system="t"), "differs from the system turn"),
        ({"text": "t", "system": "s"}, "'system': a plain text has no turns"),
    ],
    "`tools`": [
        (PAIR | {"tools": [TOOL]}, Row(HELLO, "f:1", (TOOL,))),
        (
            shared(("human", "q"), ("gpt", "a"), tools=json.dumps([TOOL])),
            Row(HELLO, "f:1", (TOOL,)),
        ),
        (
            shared(("system", '<tools> {"name": "f"} </tools>'), ("human", "q"), ("gpt", "a"))
            | {"tools": json.dumps([TOOL])},
            Row((SYSTEM | {"content": '<tools> {"name": "f"} </tools>'}, *HELLO), "f:1"),
        ),
        (
            PAIR | {"tools": [{"name": "f", "parameters": None}]},
            Row(HELLO, "f:1", ({"name": "f"},)),
        ),
        (
            PAIR | {"tools": [{"type": "function", "function": {"name": "f", "parameters": None}}]},
            Row(HELLO, "f:1", ({"type": "function", "function": {"name": "f"}},)),
        ),
        (PAIR | {"tools": [{"name": 3}]}, "tools[0] has no function with a 'name'"),
        (
            PAIR | {"tools": [{"type": "function", "function": "f"}]},
            "tools[0].function is a string",
        ),
        (PAIR | {"tools": [{"name": "f", "parameters": []}]}, "tools[0].parameters is a list"),
        (PAIR | {"tools": [None]}, "tools[0] is null"),
    ],
    "`functions`": [
        (PAIR | {"functions": [{"name": "f"}]}, Row(HELLO, "f:1", ({"name": "f"},))),
        (PAIR | {"functions": [TOOL], "tools": [TOOL]}, "has both 'tools' and 'functions'"),
    ],
    "`chat_template_kwargs`": [
        (
            PAIR | {"chat_template_kwargs": {"enable_thinking": False}},
            Row(HELLO, "f:1", (), {"enable_thinking": False}),
        ),
        (PAIR | {"chat_template_kwargs": '{"x": 1}'}, Row(HELLO, "f:1", (), {"x": 1})),
        (PAIR | {"chat_template_kwargs": None}, Row(HELLO, "f:1")),
        (PAIR | {"chat_template_kwargs": "x"}, "is not valid JSON"),
        (PAIR | {"chat_template_kwargs": [1]}, "is a list, not an object"),
        (PAIR | {"chat_template_kwargs": {"tools": []}}, "cannot hold 'tools'"),
    ],
    "`tool_choice`, `function_call`, `response_format`": [
        (PAIR | {"tool_choice": "auto", "function_call": None}, HELLO),
        (PAIR | {"response_format": {"type": "text"}}, HELLO),
        (PAIR | {"tool_choice": "required"}, "'tool_choice' is set"),
        (PAIR | {"function_call": {"name": "f"}}, "'function_call' is set"),
        (PAIR | {"response_format": {"type": "json_object"}}, "'response_format' is set"),
    ],
    "`parallel_tool_calls`": [(PAIR | {"parallel_tool_calls": False}, HELLO)],
    "`weight`, `sample_weight`": [
        (PAIR | {"weight": 0.5}, "'weight': rows have no weights"),
        (PAIR | {"sample_weight": 0}, "'sample_weight': rows have no weights"),
        ({"text": "t", "weight": 2}, "'weight': rows have no weights"),
        (PAIR | {"weight": None}, HELLO),
    ],
    "`label`": [
        (PAIR | {"label": False}, "'label': a row has one answer"),
        ({"text": "t", "label": 1}, TextRow("t", "f:1")),
    ],
    "`images`, `audio`, `videos`": [
        (chat(*HELLO, images=["a.png"]), "'images': only text can be read"),
        (chat(*HELLO, audio={"path": "a"}), "'audio': only text can be read"),
        (chat(*HELLO, videos=["a"]), "'videos': only text can be read"),
        (chat(*HELLO, images=[]), HELLO),
    ],
    "`id`, `created_at`, `source`, ..": [
        (PAIR | dict.fromkeys(keys.HARMLESS, "x"), HELLO),
        (PAIR | {f"any{end}": 3 for end in keys.HARMLESS_ENDS}, HELLO),
        (PAIR | {"createdAt": 1, "Created-At": 1, "_meta": {}, "__index_level_0__": 7}, HELLO),
        (PAIR | {"id": b"x", "source": {1}}, HELLO),
        (tokens(id=3), WHOLE),
    ],
    "a date or a time": [
        (PAIR | {"when": DATE}, HELLO),
        (PAIR | {"when": DATE.date(), "lasted": DATE - DATE, "at": DATE.time()}, HELLO),
        (turn(when=DATE), HELLO),
    ],
    "any other key": [
        (PAIR | {"persona": "p", "id": 1, "mask": [1]}, "unknown keys: 'persona', 'mask'."),
        (PAIR | {"instruction": "Be brief."}, "unknown keys: 'instruction'"),
        (PAIR | {"context": "c"}, "unknown keys: 'context'"),
        (PAIR | {"sytem": "s"}, "Did you mean 'system'?"),
        (PAIR | {"train": False}, "unknown keys: 'train'"),
        (PAIR | {"persona": b"p"}, "unknown keys: 'persona'"),
        (PAIR | {"seq_lengths": [1]}, "unknown keys: 'seq_lengths'"),
        (tokens(pixel_values=[1.0]), "unknown keys: 'pixel_values'"),
        ({"text": "t", "train_on_inputs": True}, "unknown keys: 'train_on_inputs'"),
        (PAIR | {"persona": "", "traits": [], "extra": {}, "more": None}, HELLO),
    ],
    "`role`": [
        (chat(SYSTEM, *HELLO), (SYSTEM, *HELLO)),
        (
            chat(*CALLED, {"role": "function", "name": "f", "content": "1"}, ANSWER),
            (*CALLED, {"role": "tool", "name": "f", "content": "1"}, ANSWER),
        ),
        (chat(ASK, SYSTEM, ANSWER), "only the first turn"),
    ],
    "`from`": [
        (
            shared(("system", "s"), ("human", "q"), ("observation", "1"), ("model", "a")),
            (SYSTEM, ASK, {"role": "tool", "content": "1"}, ANSWER),
        ),
        (
            shared(("human", "q"), ("function_call", json.dumps(CALL)), ("tool", "1")),
            (ASK, ANSWER | {"content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}),
        ),
        (
            shared(("human", "q"), ("function_call", "f(1)")),
            "value is not valid JSON",
        ),
        (shared(("human", "q"), ("bot", "a")), "from is 'bot', not one of"),
    ],
    "`content`": [
        (
            turn(content=[{"type": "text", "text": t} for t in "ab"]),
            (ASK, ANSWER | {"content": "ab"}),
        ),
        (turn(content=[{"type": "image_url", "image_url": "x"}]), "only text can be read"),
        (
            chat(*CALLED, {"role": "tool", "content": {"é": [1, None]}}),
            (*CALLED, {"role": "tool", "content": '{"é": [1, null]}'}),
        ),
        (
            chat(*CALLED, {"role": "tool", "content": [{"x": 1}, 2]}),
            (*CALLED, {"role": "tool", "content": '[{"x": 1}, 2]'}),
        ),
        (chat(ASK | {"content": {"x": 1}}, ANSWER), "content is an object, not a string"),
    ],
    "`weight`": [
        (
            chat(ASK | {"weight": 0}, ANSWER | {"weight": 1}),
            (ASK | {"train": False}, ANSWER | {"train": True}),
        ),
        (chat(*HELLO, ASK, ANSWER | {"weight": 0}), (*HELLO, ASK, SILENT)),
        (
            {"conversations": [{"from": "human", "value": "q", "weight": 0.0}, ANSWER]},
            (ASK | {"train": False}, ANSWER),
        ),
        (turn(weight=0), "nothing to learn from"),
        (turn(weight=0.5), "messages[1].weight is 0.5"),
        (turn(weight=2), "messages[1].weight is 2"),
        (turn(weight="0"), "messages[1].weight is '0'"),
        (turn(weight=[0]), "messages[1].weight is a list"),
        (chat(ASK | {"weight": 1}, ANSWER), "only assistant turns are trained on"),
    ],
    "`train`": [
        *((turn(**{key: 1}), *with_train(True)) for key in ("training", "loss", "loss_scale")),
        *(
            (chat(*HELLO, ASK, ANSWER | {key: False}), (*HELLO, ASK, SILENT))
            for key in ("train", "loss")
        ),
        (turn(loss_weight=0.25), "messages[1].loss_weight is 0.25"),
        (turn(train=1), "train is a number, not true or false"),
        (turn(train=True, weight=0), "'train' and 'weight' differ: keep one"),
    ],
    "`train_detail`": [
        (turn(train_detail=[{"begin_offset": 0}]), "messages[1].train_detail cannot be used"),
        (turn(train_on_turn=True), "messages[1].train_on_turn cannot be used"),
        (turn(train_detail=[]), HELLO),
    ],
    "`tool_calls`": [
        (called(**CALL), CALLED),
        (
            called(name="f", arguments={"x": 1}),
            (ASK, called(name="f", arguments={"x": 1})["messages"][1]),
        ),
        (called(function=None, name="f"), (ASK, called(name="f")["messages"][1])),
        (turn(tool_calls=[]), HELLO),
        (chat(ASK | {"tool_calls": []}, ANSWER), HELLO),
        (turn(tool_calls="[]"), "messages[1].tool_calls is a string, not a list of calls"),
        (turn(tool_calls=CALL), "messages[1].tool_calls is an object, not a list"),
        (turn(tool_calls=["f()"]), "messages[1].tool_calls[0] is a string, not an object"),
        (turn(tool_calls=[CALL, None]), "messages[1].tool_calls[1] is null, not an object"),
        (called(id="1"), "has no function with a 'name'"),
        (called(function=None), "has no function with a 'name'"),
        (called(function={"name": 3}), "has no function with a 'name'"),
        (called(function="f"), "function is a string, not an object"),
        (chat(ASK | {"tool_calls": [CALL]}, ANSWER), "only assistants call tools"),
    ],
    "`arguments`": [
        (called(**CALL | {"function": {"name": "f", "arguments": '{"x": 1}'}}), CALLED),
        (
            called(name="f", arguments='{"é": [1.0, null]}'),
            (ASK, called(name="f", arguments={"é": [1.0, None]})["messages"][1]),
        ),
        *(
            (called(name="f", arguments=none), (ASK, called(name="f", arguments={})["messages"][1]))
            for none in ("", None, "{}")
        ),
        (
            called(name="f", arguments="x=1"),
            "tool_calls[0].arguments is not valid JSON",
        ),
        (called(name="f", arguments="[1]"), "tool_calls[0].arguments is a list, not an object"),
        (called(name="f", arguments=3), "tool_calls[0].arguments is a number, not an object"),
    ],
    "`id`, `type`, `index`": [
        (
            called(id="1", type="function", name="f", arguments={}, index=0),
            (
                ASK,
                called(id="1", type="function", name="f", arguments={}, index=0)["messages"][1],
            ),
        ),
        (called(name="f", parameters={"x": 1}), "has 'parameters', not known in a call"),
        (called(type="tool_use", name="f", input={"x": 1}), "has 'input', not known in a call"),
        (called(function={"name": "f", "arguments": {}}, weight=0), "has 'weight', not known"),
    ],
    "`function_call`": [
        (
            turn(content=None, function_call={"name": "f", "arguments": '{"x": 1}'}),
            (
                ASK,
                ANSWER
                | {"content": None, "tool_calls": [{k: v for k, v in CALL.items() if k != "id"}]},
            ),
        ),
        (turn(function_call=None), HELLO),
        (turn(function_call="f"), "messages[1].function_call.function is a string"),
        (turn(function_call={"name": "f"}, tool_calls=[CALL]), "keep one"),
    ],
    "`tool_call_id`, `name`": [
        (
            chat(*CALLED, {"role": "tool", "content": "1", "tool_call_id": "1", "name": "f"}),
            (*CALLED, {"role": "tool", "content": "1", "tool_call_id": "1", "name": "f"}),
        ),
        (chat(ASK | {"name": 3}, ANSWER), "messages[0].name is a number, not a string"),
    ],
    "`reasoning_content`, `thinking`, `reasoning`": [
        *((turn(**{key: "hm"}), (ASK, ANSWER | {key: "hm"})) for key in REASONING),
        (turn(reasoning_content=["hm"]), "reasoning_content is a list, not a string"),
    ],
    "`refusal`": [(turn(refusal=None), HELLO), (turn(refusal="No."), "refusal cannot be used")],
    "`annotations`": [(turn(annotations=[{"type": "url_citation"}]), HELLO)],
    "`audio`, `images`": [
        (turn(audio=None, images=[]), HELLO),
        (turn(audio={"id": "x"}), "messages[1].audio cannot be used: only text"),
        (chat(ASK | {"images": ["x"]}, ANSWER), "messages[0].images cannot be used: only text"),
    ],
    "`id`, `timestamp`, ..": [(chat(ASK | {"id": b"x", "timestamp": DATE}, ANSWER), HELLO)],
    # The template decides: `test_keys_of_messages_that_the_template_reads`.
    "any other key of a message": [(turn(mood="x"), (ASK, ANSWER | {"mood": "x"}))],
    "`attention_mask`": [
        (tokens(attention_mask=[1, 1, 1, 1, 1]), WHOLE),
        (tokens(attention_mask=[0, 1, 1, 1, 0]), (TokenRow((6, 7, 8), (1.0,) * 3, "f:1"),)),
        (tokens(attention_mask=[1, 1, 1, 2, 2]), CUT),
        (tokens(attention_mask=[1, 1, 2, 2, 0]), split(2, 2)),
        (tokens(attention_mask=[1, 0, 2, 2, 2]), split(1, 3, ids=(5, 7, 8, 9))),
        (tokens(attention_mask=[1, 0, 1, 1, 1]), "token 1 is padding in the middle"),
        (tokens(attention_mask=SQUARE.tolist()), CUT),
        (tokens(attention_mask=SQUARE), CUT),
        (tokens(attention_mask=[[SQUARE.tolist()]]), CUT),
        (tokens(attention_mask=(SQUARE > 0).tolist()), CUT),
        (tokens(attention_mask=np.tril(np.ones((5, 5))).tolist()), WHOLE),
        (
            tokens(attention_mask=np.ones((5, 5)).tolist()),
            "not a block-diagonal causal mask of 5",
        ),
        (
            tokens(attention_mask=(np.tril(SQUARE) - np.eye(5)).tolist()),
            "is not a block-diagonal",
        ),
        (tokens(attention_mask=[[1] * 5]), "of shape [1, 5] is not a block-diagonal causal mask"),
        (tokens(attention_mask=[[1], [1, 1]]), "is not a block-diagonal"),
        (tokens(attention_mask=[1, 2, 1, 1, 1]), "the tokens of sequence 1 are not contiguous"),
        (tokens(attention_mask=[1, 1, 1, 1, -1]), "attention_mask[4] is below 0"),
    ],
    "`position_ids`": [
        (tokens(position_ids=[0, 1, 2, 3, 4]), WHOLE),
        (tokens(position_ids=[0, 1, 2, 0, 1]), CUT),
        (tokens(position_ids=[0, 1, 0, 1, 1], attention_mask=[1, 1, 1, 1, 0]), split(2, 2)),
        (tokens(position_ids=[1, 2, 3, 4, 5]), "'position_ids' has 1 where 0 comes next"),
        (tokens(position_ids=[0, 1, 3, 4, 5]), "'position_ids' has 3 where 0 or 2 comes next"),
        (tokens(position_ids=[[0, 1, 2, 3, 4]]), "position_ids[0] is a list"),
    ],
    "`seq_lengths`": [
        *((tokens(**{key: [3, 2]}), CUT) for key in ("seq_lengths", "seq_lens", "lengths")),
        (tokens(seq_lengths=[5]), WHOLE),
        (tokens(seqlens=[2, 2], attention_mask=[0, 1, 1, 1, 1]), split(2, 2, ids=(6, 7, 8, 9))),
        (tokens(sequence_lengths=[3, 3]), "adds up to 6 tokens, and 'input_ids' has 5"),
        (tokens(seq_lengths=[5, 0]), "'seq_lengths' has a sequence of less than one token"),
    ],
    "`cu_seqlens`": [
        (tokens(cu_seqlens=[0, 3, 5]), CUT),
        (tokens(cu_seq_lens_q=[0, 3, 5], cu_seq_lens_k=[0, 3, 5], max_length_q=3), CUT),
        (tokens(cu_seqlens=[3, 5]), "'cu_seqlens' does not begin with 0"),
    ],
    "`segment_ids`": [
        (tokens(segment_ids=[1, 1, 1, 2, 2]), CUT),
        (tokens(segment_ids=[1, 1, 2, 2, 0]), split(2, 2)),
        (tokens(seq_idx=[0, 0, 0, 1, 1]), CUT),
        (tokens(document_ids=[7, 7, 7, 3, 3]), CUT),
        (tokens(doc_ids=[0, 0, 1, 0, 0]), "not contiguous"),
        (tokens(segment_ids=[2, 2, 1, 0, 1]), "token 3 is padding in the middle"),
    ],
    "any other list of numbers": [
        (tokens(document_id=[0, 0, 0, 1, 1]), "'document_id'. Did you mean 'document_ids'?"),
        (tokens(length=[3, 2], index=np.asarray([0, 1])), "unknown keys: 'length', 'index'"),
        (tokens(length=5, source_id=["a", "b"]), WHOLE),
    ],
    "`token_type_ids`": [
        (tokens(token_type_ids=[0] * 5), WHOLE),
        (tokens(token_type_ids=[0, 0, 0, 1, 1]), "'token_type_ids' is not 0 everywhere"),
    ],
    "`special_tokens_mask`, `max_length_q`": [
        (tokens(special_tokens_mask=[1, 0, 0, 0, 0], offset_mapping=[[0, 1]], max_seqlen=3), WHOLE)
    ],
    "two of these": [
        (
            tokens(position_ids=[0, 1, 2, 0, 1], seq_lengths=[3, 2], segment_ids=[1, 1, 1, 2, 2]),
            CUT,
        ),
        (tokens(position_ids=[0, 1, 2, 0, 1], seq_lengths=[2, 3]), "give different sequences"),
        (tokens(position_ids=[0, 1, 2, 3, 4], seq_lengths=[2, 3]), "give different sequences"),
    ],
}


def lines_of(page: str) -> list[str]:
    # Rows of preferences have forms of their own: `test_preferences`.
    page = re.sub(r"## Preferences\n.*?(?=\n## )", "", page, flags=re.DOTALL)
    cells = re.findall(r"^\| (.+?) \|.*\|$", page, re.MULTILINE)
    return [cell for cell in cells if cell != "key"]


def test_the_page_and_these_lines_are_the_same():
    assert lines_of(PAGE) == list(LINES)
    assert all(LINES.values())


def test_the_page_lists_the_harmless_names():
    _, _, section = PAGE.partition("## Harmless names\n")
    before, _, names = section.partition(":\n")
    assert re.findall(r"`(\w+)`", names) == list(keys.HARMLESS)
    assert tuple(re.findall(r"`(_\w+)`", before)) == keys.HARMLESS_ENDS


def test_columns_of_well_known_data_are_left_out():
    page = {"id": "1", "url": "u", "title": "T", "text": "t"}  # Wikipedia
    crawled = {"text": "t", "dump": "CC", "file_path": "p", "language_score": 0.9, "int_score": 3}
    for record in (page, crawled, {"text": "t", "Unnamed: 0": 3}):
        assert parse_rows(record, "f:1") == (TextRow("t", "f:1"),)


def test_every_key_that_is_not_known_is_named():
    names = [f"a_rather_long_name_{i}" for i in range(30)]
    with pytest.raises(BadRow) as caught:
        parse_rows(PAIR | dict.fromkeys(names, "x"), "f:1")
    assert all(repr(name) in str(caught.value) for name in names)
    with pytest.raises(BadRow, match="'x49', and 5 more"):
        parse_rows(PAIR | {f"x{i}": "x" for i in range(55)}, "f:1")


def test_arguments_of_the_template_have_their_own_place():
    with pytest.raises(BadRow, match="'enable_thinking': an argument of the chat template goes"):
        parse_rows(PAIR | {"enable_thinking": False}, "f:1")


@pytest.mark.parametrize("value", [False, 0])
def test_keys_of_messages_that_say_no_are_no_absent_keys(value):
    (row,) = parse_rows(turn(trainable=value), "f:1")
    with pytest.raises(BadRow, match="never read by the chat template: 'trainable'"):
        keys.check_read(row, "{{ messages }}")
    keys.check_read(row, "{{ messages[0].trainable }}")


def test_arguments_and_keys_that_are_not_read_are_told_apart():
    rows = [
        parse_rows(turn(mood="x"), "f:1")[0],
        parse_rows(PAIR | {"chat_template_kwargs": {"thinking": True}}, "f:2")[0],
    ]
    problems = []
    for row in rows:
        with pytest.raises(BadRow) as caught:
            keys.check_read(row, "{{ messages }}")
        problems.append((row.where, caught.value))
    first, second = keys.describe_problems(problems)
    assert first.startswith("f:1: keys of messages") and "'mood'" in first
    assert second.startswith("f:2: 'chat_template_kwargs'") and "'thinking'" in second
    assert second.endswith("data.ignore_columns=[chat_template_kwargs]")


@pytest.mark.parametrize("line", LINES)
def test_line(line):
    for record, expected in LINES[line]:
        if isinstance(expected, str):
            with pytest.raises(BadRow) as caught:
                parse_rows(record, "f:1")
            assert expected in str(caught.value), record
            continue
        rows = parse_rows(record, "f:1")
        if isinstance(expected, tuple) and isinstance(expected[0], dict):
            assert [row.messages for row in rows] == [expected], record
        else:
            assert rows == (expected if isinstance(expected, tuple) else (expected,)), record
