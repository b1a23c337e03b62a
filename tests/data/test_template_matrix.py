"""Every chat template that trl ships, with every odd conversation: supervised exactly, or refused
with what to do.

Each text of a conversation is a word of its own, so that the words of an example tell which parts
are supervised, which are context, and which are missing.
"""

import copy
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest

from lora_jax.data import Row, encode, stop_tokens
from lora_jax.data.parse import parse_row
from lora_jax.errors import UserError

from .test_real_templates import FILES, TOKENIZERS, WEATHER

WORD = re.compile(r"x\d\dx")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text, **more):
    return {"role": "tool", "content": text, **more}


def calls(*words):
    """One call for each word: its name ends in it, and so do its key and its argument."""
    return [
        {
            "type": "function",
            "id": f"call0000{n}",
            "function": {
                "name": f"f_x{n}0x",
                "arguments": {f"k_x{n}1x": f"v x{n}2x", "count": 7, "deep": {"list": [word]}},
            },
        }
        for n, word in words
    ]


def system(text, role="system"):
    return {"role": role, "content": text}


ONE, OTHER = calls((1, "x13x")), calls((2, "x23x"))
BOTH = [*ONE, *OTHER]
THOUGHT = "<think>\nx60x\n</think>\n\nx61x"
MESSAGES = {
    "one": [user("x50x"), answer("x51x")],
    "three": [m for n in (5, 6, 7) for m in (user(f"x{n}0x"), answer(f"x{n}1x"))],
    "call": [user("x50x"), answer("", tool_calls=ONE)],
    "call, null": [user("x50x"), answer(None, tool_calls=ONE)],
    "call, no content": [user("x50x"), {"role": "assistant", "tool_calls": ONE}],
    "call after text": [user("x50x"), answer("x51x", tool_calls=ONE)],
    "call and result": [
        user("x50x"),
        answer("", tool_calls=ONE),
        tool("x52x", tool_call_id="call00001"),
        answer("x53x"),
    ],
    "call after text, and result": [
        user("x50x"),
        answer("x51x", tool_calls=ONE),
        tool("x52x", tool_call_id="call00001"),
        answer("x53x"),
    ],
    "parallel": [
        user("x50x"),
        answer("", tool_calls=BOTH),
        tool("x52x", tool_call_id="call00001"),
        tool("x53x", tool_call_id="call00002"),
        answer("x54x"),
    ],
    "two rounds": [
        user("x50x"),
        answer("", tool_calls=ONE),
        tool("x51x", tool_call_id="call00001"),
        answer("", tool_calls=OTHER),
        tool("x52x", tool_call_id="call00002"),
        answer("x53x"),
        user("x54x"),
        answer("x55x"),
    ],
    "call and thought": [
        user("x50x"),
        answer("", reasoning_content="x51x", tool_calls=ONE),
        tool("x52x"),
        answer("x53x", reasoning_content="x54x"),
    ],
    "result without a call": [user("x50x"), tool("x51x"), answer("x52x")],
    "result of lines": [
        user("x50x"),
        answer("", tool_calls=ONE),
        tool('{"a": "x52x",\n "ü": [1]}'),
        answer("x53x"),
    ],
    "thought": [user("x50x"), answer(THOUGHT)],
    **{f"thought as {key}": [user("x50x"), answer("x61x", **{key: "x60x"})] for key in THOUGHTS},
    "two keys": [user("x50x"), answer("x61x", reasoning_content="x60x", reasoning="x60x")],
    "two thoughts": [user("x50x"), answer(THOUGHT, reasoning_content="x62x")],
    "thought without a beginning": [user("x50x"), answer("x60x\n</think>\n\nx61x")],
    "empty thought": [user("x50x"), answer("x51x", reasoning_content="")],
    "thought in content, empty key": [user("x50x"), answer(THOUGHT, reasoning_content="")],
    "earlier thought": [user("x50x"), answer(THOUGHT), user("x51x"), answer("x52x")],
    "earlier reasoning": [
        user("x50x"),
        answer("x51x", reasoning_content="x52x"),
        user("x53x"),
        answer("x54x", reasoning_content="x55x"),
    ],
    "empty answer": [user("x50x"), answer("")],
    "empty answer first": [user("x50x"), answer(""), user("x51x"), answer("x52x")],
    "empty user": [user(""), answer("x50x")],
    "parts": [
        user([{"type": "text", "text": "x50x "}, {"type": "text", "text": "x51x"}]),
        answer([{"type": "text", "text": "x52x"}]),
    ],
    "system": [system("x50x"), user("x51x"), answer("x52x")],
    "developer": [system("x50x", "developer"), user("x51x"), answer("x52x")],
    "system alone": [system("x50x"), answer("x51x")],
    "assistant first": [answer("x50x"), user("x51x"), answer("x52x")],
    "two answers": [user("x50x"), answer("x51x"), answer("x52x")],
    "two users": [user("x50x"), user("x51x"), answer("x52x")],
    "whitespace": [user("  x50x\n\n\tx51x "), answer("\n\n  x52x \t\n x53x  \n"), user("\nx54x")],
    "unicode": [user("ü x50x 😀"), answer("\u200bx51x é {{ x }} {% y %} \\n \"'")],
    "markup": [user("<|im_end|> x50x </s>"), answer("[INST] x51x <|eot_id|><end_of_turn> x52x")],
}
TOOLS = {"call", "call and result", "parallel", "two rounds", "call, null", "call and thought"}


def rows():
    """Each conversation, and again with each of its answers unsupervised but one at least."""
    for kind, messages in MESSAGES.items():
        record = {"messages": messages}
        yield kind, parse_row(record, "f.jsonl:1")
        if kind in TOOLS:
            yield f"{kind}, tools", parse_row(record | {"tools": [WEATHER]}, "f.jsonl:1")
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in answers if len(answers) > 1 else ():
            changed = [m | {"train": False} if m is messages[i] else m for m in messages]
            yield f"{kind}, not {i}", parse_row({"messages": changed}, "f.jsonl:1")


ROWS = dict(rows())


def words(value) -> list[str]:
    return WORD.findall(value if isinstance(value, str) else json.dumps(value))


def parts(message) -> tuple[list[str], list[str]]:
    """The words of a message: those of its thought, and the others."""
    thought = {word for key in THOUGHTS for word in words(message.get(key, ""))}
    content = message.get("content") or ""
    before, tag, content = content.rpartition("</think>")
    thought |= set(words(before)) if tag else set()
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return sorted(thought), words(content) + words(functions)


def trained(row: Row) -> list[int]:
    return [
        i for i, m in enumerate(row.messages) if m["role"] == "assistant" and m.get("train", True)
    ]


def rendered(row: Row, tokenizer, count: int, prompt: bool) -> str:
    """The first messages of a row by the template itself; a content that is null is empty, and
    arguments of calls are JSON text for templates that join them to text.
    """
    messages = [
        {key: value for key, value in m.items() if key != "train" and value not in (None, "")}
        | {"content": m.get("content") or ""}
        for m in row.messages[:count]
    ]
    options = dict(tools=list(row.tools) or None, tokenize=False, add_generation_prompt=prompt)
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TypeError:
        messages = copy.deepcopy(messages)
        for call in (call for m in messages for call in m.get("tool_calls", ())):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        return tokenizer.apply_chat_template(messages, **options)


def check_example(row: Row, example, tokenizer, name: str, stops: set[int]) -> None:
    supervised = example.loss_weights > 0
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1), len(supervised)]
    texts = [
        (bool(supervised[a]), tokenizer.decode(example.tokens[a:b]), int(example.tokens[b - 1]))
        for a, b in itertools.pairwise(edges)
    ]
    whole = "".join(text for _, text, _ in texts)
    last = trained(row)[-1]

    # All of each supervised answer is supervised, once, and nothing else is.
    expected = Counter(
        word for i in trained(row) for group in parts(row.messages[i]) for word in group
    )
    found = Counter(w for learnt, text, _ in texts if learnt for w in words(text))
    # The name of a call may be part of its id as well.
    assert {w: 1 if w.endswith("0x") and w < "x50x" else n for w, n in found.items()} == expected

    # All that comes before is there, in order; thoughts of the context may be missing.
    reached = -1
    for message in row.messages[: last + 1]:
        _, needed = parts(message)
        places = [whole.find(word) for word in needed]
        assert -1 not in places, "a turn is lost"
        if message["role"] != "assistant" and places:
            assert min(places) > reached, "a turn is moved"
            reached = max(places)

    # It begins where a generation begins, and ends where one stops.
    prompt = rendered(row, tokenizer, last, prompt=True)
    before = "".join(text for _, text, _ in texts[:-1])
    if name.endswith("_training"):
        assert before.startswith(prompt) or not whole.startswith(prompt)
    else:
        assert before == prompt or row.messages[last - 1]["role"] == "assistant"
    full = rendered(row, tokenizer, last + 1, prompt=False).rstrip()
    cut = whole.removesuffix(tokenizer.eos_token)
    assert full.startswith(cut) and not words(full[len(cut) :])
    assert {end for learnt, _, end in texts if learnt} <= stops


def accepts(row: Row, tokenizer) -> bool:
    try:
        encode(row, tokenizer, max_length=1_000_000)
    except UserError:
        return False
    return True


def changed(row: Row, change) -> Row:
    record = {"messages": [change(dict(m), i) for i, m in enumerate(row.messages)]}
    return parse_row(record | ({"tools": list(row.tools)} if row.tools else {}), "f.jsonl:1")


def alone(row: Row) -> list[Row]:
    def only(i):
        def change(message, place):
            if message["role"] == "assistant":
                message["train"] = place == i
            return message

        return change

    return [changed(row, only(i)) for i in trained(row)]


def without_thoughts(message, _):
    if message["role"] == "assistant":
        message["content"] = (message.get("content") or "").rpartition("</think>")[2]
    return {key: value for key, value in message.items() if key not in THOUGHTS}


def follow(remedy: str, row: Row) -> list[Row] | None:
    """The rows after a remedy, done by hand; None for those that need a person."""
    if remedy == "split the conversation into one row per answer":
        return alone(row)
    if match := re.fullmatch(r'mark turn (\d+) "train": false', remedy):
        turn = int(match[1])
        return [changed(row, lambda m, i: m | {"train": False} if i == turn else m)]
    if remedy == "leave out the thoughts":
        return [changed(row, without_thoughts)]
    if remedy == "give the developer turn the role system":
        return [changed(row, lambda m, i: m | {"role": "system"} if i == 0 else m)]
    if remedy == "begin the conversation with a user turn":
        return [Row((user("hello"), *row.messages), row.where, row.tools)]
    if remedy == "leave out the tools":
        return [Row(row.messages, row.where)]
    assert remedy in {
        *(f"give the thoughts as {key!r}" for key in THOUGHTS),
        "write the thoughts into the contents, as <think>..</think>",
        "begin the answers with a thought",
        "split the conversation into one row per answer and begin the answers with a thought",
        "join the turns of one role that follow each other",
        "put the system turn into the user turn",
        "set data.system_prompt",
        "write tools, calls and results into the contents as text",
        "write tools, calls and results into the contents as text and join the turns of one role "
        "that follow each other",
    }
    return None


def check_refusal(row: Row, error: UserError, tokenizer) -> None:
    text = str(error)
    assert text.startswith("f.jsonl:1: ")
    assert re.search(
        r"turn \d|system turn|developer turn|earlier turns|the tools? |this conversation|"
        r"conversation begins",
        text,
    )
    cause, _, advice = text.rpartition("; ")
    assert cause
    *remedies, another = advice.split(", or ")
    assert another == "use another data.chat_template"
    for remedy in remedies:
        for after in follow(remedy, row) or ():
            assert accepts(after, tokenizer), remedy


@pytest.mark.long_table(8)
@pytest.mark.parametrize("name", sorted(FILES))
def test_each_conversation_is_supervised_exactly_or_refused_with_what_to_do(name):
    tokenizer, accepted = TOKENIZERS[name], set()
    try:
        stops = {*stop_tokens(tokenizer)}
    except UserError:  # it takes lists of parts alone
        stops = set()
    if name == "gptoss_training":  # it ends earlier answers in the token that ends a thought too
        stops.add(tokenizer.convert_tokens_to_ids("<|end|>"))
    for kind, row in ROWS.items():
        try:
            example = encode(row, tokenizer, max_length=1_000_000)
        except UserError as error:
            check_refusal(row, error, tokenizer)
            continue
        accepted.add(kind)
        check_example(row, example, tokenizer, name, stops)
    if name.startswith(("idefics3", "smolvlm", "llava_next")):
        assert not accepted  # contents must be lists of parts
    elif not name.startswith(("deepseek", "nemotron")):  # their prompts open a thought
        assert {"one", "parts", "unicode", "empty answer"} <= accepted
    if name.startswith(("qwen", "glm", "lfm2_2_5", "gemma4", "muse")) and "_vl" not in name:
        assert {"call", "call, null", "call, no content", "call and result", "parallel"} <= accepted
