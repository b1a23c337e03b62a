"""What to do with a row that a chat template refuses: changes to the row, each of them tried.

A change is advised only where the template takes the row changed so; another template is the
remedy of every row.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from lora_jax.data.probe import REASONING, has_thought
from lora_jax.data.rows import SYSTEM_ROLES, Row

_ANOTHER = "use another data.chat_template"
_MOST = 2  # changes that are told

Message = dict[str, Any]


def advice(row: Row, works: Callable[[Row], bool]) -> str:
    """Up to two changes after which the row `works`, and another template."""
    found = []
    for words, rows in _changes(row):
        if len(found) == _MOST or any(words.startswith(simpler) for simpler in found):
            continue
        if all(one != row and works(one) for one in rows):
            found.append(words)
    return ", or ".join([*found, _ANOTHER])


def _changes(row: Row) -> Iterator[tuple[str, list[Row]]]:
    trained = [i for i, message in enumerate(row.messages) if _is_trained(message)]
    if len(trained) > 1:
        yield (
            "split the conversation into one row per answer",
            [_train_only(row, {i}) for i in trained],
        )
        for i in trained:
            rest = {*trained} - {i}
            yield f'mark turn {i} "train": false', [_train_only(row, rest)]
    for words, change in _EACH:
        messages = [change(message) for message in row.messages]
        yield words, [replace(row, messages=tuple(messages))]
    yield "join the turns of one role that follow each other", [_joined(row)]
    if row.messages[0]["role"] in SYSTEM_ROLES:
        yield "put the system turn into the user turn", [_without_system(row)]
    if row.messages[0]["role"] == "assistant":
        first: Message = {"role": "user", "content": "Hello"}
        yield (
            "begin the conversation with a user turn",
            [replace(row, messages=(first, *row.messages))],
        )
    yield "leave out the tools", [replace(row, tools=())]
    text = replace(row, messages=tuple(map(_as_text, row.messages)), tools=())
    yield "write tools, calls and results into the contents as text", [text]
    yield (
        "write tools, calls and results into the contents as text and join the turns of one role "
        "that follow each other",
        [_joined(text)],
    )


def _is_trained(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("train", True)


def _train_only(row: Row, kept: set[int]) -> Row:
    messages = [
        message | {"train": i in kept} if message["role"] == "assistant" else message
        for i, message in enumerate(row.messages)
    ]
    return replace(row, messages=tuple(messages))


def _thought_of(message: Message) -> str:
    return next((message[key] for key in REASONING if message.get(key)), "")


def _thought_in_content(message: Message) -> Message:
    thought = _thought_of(message)
    rest = {key: value for key, value in message.items() if key not in REASONING}
    said = message.get("content") or ""
    return rest | {"content": f"<think>\n{thought}\n</think>\n\n{said}"} if thought else message


def _thought_under(key: str) -> Callable[[Message], Message]:
    def change(message: Message) -> Message:
        thought, said = _thought_of(message), message.get("content") or ""
        if message["role"] == "assistant" and has_thought(said):
            inner, _, said = said.partition("</think>")
            thought = inner.replace("<think>", "").strip() or thought
        rest = {name: value for name, value in message.items() if name not in REASONING}
        return rest | {"content": said.strip(), key: thought} if thought else message

    return change


def _with_thought(message: Message) -> Message:
    if not _is_trained(message) or _thought_of(message) or has_thought(message.get("content", "")):
        return message
    return message | {"content": f"<think>\nso\n</think>\n\n{message.get('content') or ''}"}


def _without_thought(message: Message) -> Message:
    said = message.get("content") or ""
    if message["role"] == "assistant" and has_thought(said):
        said = said.rpartition("</think>")[2].strip()
    rest = {key: value for key, value in message.items() if key not in REASONING}
    return rest | {"content": said}


def _as_system(message: Message) -> Message:
    return message | {"role": "system"} if message["role"] == "developer" else message


def _as_text(message: Message) -> Message:
    said = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": said}
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    calls = map(json.dumps, message.get("tool_calls") or ())
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
