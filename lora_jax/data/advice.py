"""Remedies for a row that a chat template refuses: changes to the row that were tried.

A change is advised only if the template accepts the changed row. "Use another template" is always
advised.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from lora_jax.data.rows import REASONING, SYSTEM_ROLES, THOUGHTS, Row

_ANOTHER = "use another data.chat_template"
_MOST = 2  # changes named in an error

Message = dict[str, Any]


def advice(row: Row, works: Callable[[Row], bool]) -> str:
    """Return up to two changes after which the row `works`, and "use another template"."""
    found = []
    for words, rows in _changes(row):
        if len(found) == _MOST or any(simpler in words for simpler in found):
            continue
        if all(one != row and works(one) for one in rows):
            found.append(words)
    return ", or ".join([*found, _ANOTHER])


def _changes(row: Row) -> Iterator[tuple[str, list[Row]]]:
    trained = [i for i, message in enumerate(row.messages) if _is_trained(message)]
    alone = [_train_only(row, {i}) for i in trained]
    if len(trained) > 1:
        yield "split the conversation into one row per answer", alone
        for i in trained:
            yield f'mark turn {i} "train": false', [_train_only(row, {*trained} - {i})]
    for words, change in _EACH:
        yield words, [_each(row, change)]
    if len(trained) > 1:
        yield (
            "split the conversation into one row per answer and begin the answers with a thought",
            [_each(one, _with_thought) for one in alone],
        )
    yield "join the turns of one role that follow each other", [_joined(row)]
    first = row.messages[0]
    if first["role"] in SYSTEM_ROLES:
        yield "put the system turn into the user turn", [_without_system(row)]
    if first["role"] == "assistant":
        user: Message = {"role": "user", "content": "Hello"}
        system: Message = {"role": "system", "content": "Answer."}
        yield "begin the conversation with a user turn", [_with_first(row, user)]
        yield "set data.system_prompt", [_with_first(row, system)]
    if row.tools:
        yield "leave out the tools", [replace(row, tools=())]
    if row.tools or any(_as_text(message) != message for message in row.messages):
        text = replace(_each(row, _as_text), tools=())
        yield "write tools, calls and results into the contents as text", [text]
        yield (
            "write tools, calls and results into the contents as text and join the turns of one "
            "role that follow each other",
            [_joined(text)],
        )


def _each(row: Row, change: Callable[[Message], Message]) -> Row:
    return replace(row, messages=tuple(map(change, row.messages)))


def _with_first(row: Row, message: Message) -> Row:
    return replace(row, messages=(message, *row.messages))


def _is_trained(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("train", True)


def _train_only(row: Row, kept: set[int]) -> Row:
    messages = [
        message | {"train": i in kept} if message["role"] == "assistant" else message
        for i, message in enumerate(row.messages)
    ]
    return replace(row, messages=tuple(messages))


def _split(message: Message) -> tuple[str, str]:
    """Return the thought of a message ("" if there is none) and the rest of its content."""
    said = message.get("content") or ""
    thought = next((message[key] for key in REASONING if message.get(key)), "")
    for opening, closing in THOUGHTS if message["role"] == "assistant" else ():
        if closing in said:
            inner, _, said = said.rpartition(closing)
            thought = thought or inner.replace(opening, "").strip()
    return thought, said.strip()


def _without_thought(message: Message) -> Message:
    rest = {key: value for key, value in message.items() if key not in REASONING}
    return rest | {"content": _split(message)[1]}


def _thought_in_content(message: Message) -> Message:
    thought, said = _split(message)
    content = f"<think>\n{thought}\n</think>\n\n{said}"
    return _without_thought(message) | {"content": content} if thought else message


def _thought_under(key: str) -> Callable[[Message], Message]:
    def change(message: Message) -> Message:
        thought, _ = _split(message)
        return _without_thought(message) | {key: thought} if thought else message

    return change


def _with_thought(message: Message) -> Message:
    if not _is_trained(message) or _split(message)[0]:
        return message
    return message | {"content": f"<think>\nso\n</think>\n\n{message.get('content') or ''}"}


def _as_system(message: Message) -> Message:
    return message | {"role": "system"} if message["role"] == "developer" else message


def _as_text(message: Message) -> Message:
    said = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": said}
    if not message.get("tool_calls"):
        return message
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    calls = map(json.dumps, message["tool_calls"])
    return rest | {"content": "\n".join(filter(None, [said, *calls]))}


def _joined(row: Row) -> Row:
    messages: list[Message] = []
    for message in row.messages:
        last = messages[-1] if messages else {"role": None}
        if message["role"] == last["role"] and message["role"] != "tool":
            both = [last.get("content") or "", message.get("content") or ""]
            messages[-1] = last | message | {"content": "\n\n".join(filter(None, both))}
        else:
            messages.append(message)
    return replace(row, messages=tuple(messages))


def _without_system(row: Row) -> Row:
    system, *rest = row.messages
    if not rest or rest[0]["role"] != "user":
        return row
    said = f"{system.get('content') or ''}\n\n{rest[0].get('content') or ''}"
    return replace(row, messages=(rest[0] | {"content": said}, *rest[1:]))


_EACH: tuple[tuple[str, Callable[[Message], Message]], ...] = (
    ("give the developer turn the role system", _as_system),
    ("write the thoughts into the contents, as <think>..</think>", _thought_in_content),
    *((f"give the thoughts as {key!r}", _thought_under(key)) for key in REASONING),
    ("begin the answers with a thought", _with_thought),
    ("leave out the thoughts", _without_thought),
)
