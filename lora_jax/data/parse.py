"""Records of data to rows.

    (row,) = parse_rows({"prompt": "2+2?", "completion": "4"}, where="train.jsonl:1")

The keys of a record decide its form: the first of these whose keys are all present and not null.
docs/data.md lists every key and the tools that write it.

    columns named in data.prompt or data.completion     a user turn and its answer
    {"input_ids": [5, 7, ..]}                           tokens: `lora_jax.data.token_rows`
    {"messages": [{"role": .., "content": ..}, ..]}     every assistant turn is trained on
    {"conversations": [{"from": .., "value": ..}, ..]}  the format of ShareGPT; or messages
    {"prompt": "..", "completion": ".."}                a user turn and its answer
    {"prompt": [message, ..], "completion": [message, ..]}  the completion's turns are trained on
    {"instruction": "..", "output": ".."}               Alpaca; "input" follows the instruction
                                                        after an empty line, and "history",
                                                        [[question, answer], ..], comes before it
    {"text": ".."}                                      a plain text, all of it trained on; refused
                                                        next to a prompt, completion, instruction or
                                                        output, because it could be the other half

Every form of a conversation may have "system" (or "system_prompt", "system_message"), a string that
becomes the first turn; "tools", a list of JSON schemas or that list as a JSON string, or OpenAI's
older "functions"; and "chat_template_kwargs", an object of arguments for the chat template. null
and "" count as absent. `lora_jax.data.messages` defines messages.

Other keys are left out if they are harmless, and refused by name otherwise (`lora_jax.data.keys`).
`ignore_columns` (data.ignore_columns) are always left out, also of messages. If columns are named
by `prompt` or `completion`, all others are left out.

`prompt` and `completion` (data.prompt, data.completion) are format strings with {column} in them
(`lora_jax.data.named_columns`): "{question}\\nContext: {context}". If only one is given, the other
is the string column 'prompt' or 'completion' of the record. A null in the completion is refused:
there is no answer.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_jax.config.text import is_deep
from lora_jax.data.keys import RESERVED, check_keys
from lora_jax.data.messages import from_sharegpt, messages_of, parse_json, tools_of
from lora_jax.data.named_columns import columns, fill
from lora_jax.data.rows import (
    SYSTEM_ROLES,
    AnyRow,
    BadRow,
    Row,
    TextRow,
    kind,
    listed,
)
from lora_jax.data.token_rows import KEYS as TOKEN_KEYS
from lora_jax.data.token_rows import token_rows

_HALVES = ("prompt", "completion", "instruction", "output")
_SYSTEM = ("system", "system_prompt", "system_message")
CONTEXT = (*_SYSTEM, "tools", "functions", "chat_template_kwargs")
CONVERSATION = (*CONTEXT, "tool_choice", "function_call", "response_format")
# Columns from which the tokens or turns of a form may have been made; they are left out.
_ORIGINS = ("messages", "conversations", "text", "prompt", "completion", "instruction", "input")
_KNOWN = {
    "input_ids": (*TOKEN_KEYS, *_ORIGINS, "output", *CONTEXT),
    "messages": ("messages", *CONVERSATION, "conversations", "prompt", "text"),
    "conversations": ("conversations", *CONVERSATION, "prompt", "text"),
    "prompt": ("prompt", "completion", *CONVERSATION, "text"),
    "instruction": ("instruction", "input", "output", "history", *CONVERSATION, "text"),
    "text": ("text", "label"),
}


def parse_rows(
    record: Any,
    where: str,
    prompt: str | None = None,
    completion: str | None = None,
    ignore_columns: Collection[str] = (),
) -> tuple[AnyRow, ...]:
    """Return the row of a record, or the several rows of packed tokens.

    where: the place of the record, for errors
    prompt, completion, ignore_columns: see the docstring of the module

    Raises:
        BadRow: the record has no known form, or an error in it.
        UserError: `prompt` or `completion` is malformed.
    """
    if not isinstance(record, dict):
        raise BadRow(f"a row must be an object, not {kind(record)}")
    record = {key: value for key, value in record.items() if key not in ignore_columns}
    given = {key: value for key, value in record.items() if value is not None}
    if prompt is not None or completion is not None:
        messages = _turns((fill(record, "prompt", prompt), fill(record, "completion", completion)))
        named = {*columns(prompt or "", "data.prompt")}
        named |= {*columns(completion or "", "data.completion")}
        context = {key: given[key] for key in CONTEXT if key in given and key not in named}
        return (make_row(messages, context, where),)
    if "input_ids" in given:
        form, rows = "input_ids", token_rows(given, where)
    elif "messages" in given:
        form = "messages"
        rows = (make_row(messages_of(given[form], form, True, ignore_columns), given, where),)
    elif "conversations" in given:
        form, turns = "conversations", from_sharegpt(given["conversations"])
        rows = (make_row(messages_of(turns, form, True, ignore_columns), given, where),)
    elif "prompt" in given and "completion" in given:
        form, messages = "prompt", _prompt_completion(given, ignore_columns)
        rows = (make_row(messages, given, where),)
    elif "instruction" in given and "output" in given:
        form, rows = "instruction", (make_row(_alpaca(given), given, where),)
    elif "text" in given:
        form, rows = "text", (_text_row(given, where),)
    else:
        raise BadRow(_needed(record))
    check_keys(given, _KNOWN[form])
    return rows


def parse_row(
    record: Any,
    where: str,
    prompt: str | None = None,
    completion: str | None = None,
    ignore_columns: Collection[str] = (),
) -> AnyRow:
    """Return the only row of a record; see `parse_rows`.

    Raises:
        BadRow: see `parse_rows`; packed tokens, which become several rows.
        UserError: see `parse_rows`.
    """
    first, *others = parse_rows(record, where, prompt, completion, ignore_columns)
    if others:
        raise BadRow(f"a record of {1 + len(others)} packed sequences, where one row is expected")
    return first


def _needed(record: dict) -> str:
    keys = [f"{key!r} (null)" if value is None else repr(key) for key, value in record.items()]
    pair = "chosen" in record and "rejected" in record
    return (
        (
            "'chosen' and 'rejected' are a preference pair, and a row has one answer "
            "(train.objective=dpo trains on pairs); "
            if pair
            else ""
        )
        + "a row needs 'messages', 'conversations', 'prompt' and 'completion', 'instruction' and "
        "'output', 'text', or 'input_ids' (or name its columns in data.prompt and "
        f"data.completion); its keys: {listed(keys)}"
    )


# Records that become conversations


def make_row(messages: list[dict], given: Mapping[str, Any], where: str) -> Row:
    """Return a checked row of messages, with the system turn and tools of the record."""
    _check_requests(given)
    system = _system(given)
    if system and messages[0]["role"] not in SYSTEM_ROLES:
        messages = [{"role": "system", "content": system}, *messages]
    elif system and messages[0]["content"] != system:
        raise BadRow("'system' differs from the system turn that the conversation begins with")
    tools = tools_of(given)
    if tools and _lists_tools(messages[0], tools):
        tools = ()
    options = _template_kwargs(given.get("chat_template_kwargs"))
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow("no assistant turn: nothing to learn from")
    if not any(message.get("train", True) for message in answers):
        raise BadRow("every assistant turn has 'train': false: nothing to learn from")
    check_text([messages, tools, options])
    return Row(tuple(messages), where, tools, options)


def _system(given: Mapping[str, Any]) -> str:
    found = {key: given[key] for key in _SYSTEM if key in given}
    for key, value in found.items():
        if not isinstance(value, str):
            raise BadRow(f"{key!r} is {kind(value)}, not a string")
    texts = sorted({text for text in found.values() if text})
    if len(texts) > 1:
        raise BadRow(f"{' and '.join(map(repr, found))} differ: keep one system turn")
    return texts[0] if texts else ""


def _lists_tools(first: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if a system turn already lists the tools, as in data of Hermes."""
    text = first["content"] if first["role"] in SYSTEM_ROLES else ""
    names = [tool.get("function", tool).get("name") for tool in tools]
    return "<tools>" in text and all(isinstance(name, str) and name in text for name in names)


def _template_kwargs(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = parse_json(value, "'chat_template_kwargs'") if value else None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadRow(f"'chat_template_kwargs' is {kind(value)}, not an object of arguments")
    if reserved := sorted(RESERVED & {*value}):
        raise BadRow(f"'chat_template_kwargs' cannot hold {listed([*map(repr, reserved)])}")
    return value


def _check_requests(given: Mapping[str, Any]) -> None:
    """Refuse settings of a request that would change the form of the answer."""
    for key in ("tool_choice", "function_call", "response_format"):
        value = given.get(key, "")
        kept = value.get("type") if isinstance(value, dict) else value
        wanted = "text" if key == "response_format" else "auto"
        if not isinstance(kept, str) or kept not in ("", wanted):
            raise BadRow(f"{key!r} is set: no chat template reads it; leave it out of the row")


def _prompt_completion(given: Mapping[str, Any], ignore: Collection[str]) -> list[dict[str, Any]]:
    prompt, completion = given["prompt"], given["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = messages_of(prompt, "prompt", True, ignore)
        answered = messages_of(completion, "completion", False, ignore)
        if all(message["role"] != "assistant" for message in answered):
            raise BadRow("'completion' has no assistant turn: nothing to learn from")
        asked = [m | {"train": False} if m["role"] == "assistant" else m for m in asked]
        return asked + answered
    if isinstance(prompt, str) and isinstance(completion, str):
        return _turns((prompt, completion))
    if not isinstance(prompt, str | list):
        raise BadRow(f"'prompt' is {kind(prompt)}, not a string")
    wanted = "a list of messages" if isinstance(prompt, list) else "a string"
    raise BadRow(f"'completion' is {kind(completion)}, not {wanted}")


def _alpaca(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked = {key: given.get(key, "") for key in ("instruction", "input", "output")}
    for key, value in asked.items():
        if not isinstance(value, str):
            raise BadRow(f"{key!r} is {kind(value)}, not a string")
    history = given.get("history", [])
    if not isinstance(history, list):
        raise BadRow(f"'history' is {kind(history)}, not a list of [question, answer]")
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise BadRow(f"history[{index}] is not a list of a question and an answer")
    question = "\n\n".join(filter(None, (asked["instruction"], asked["input"])))
    return _turns(*history, (question, asked["output"]))


def _turns(*pairs: Sequence[str]) -> list[dict[str, Any]]:
    """Return the messages of (question, answer) pairs."""
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


# Plain texts


def _text_row(given: Mapping[str, Any], where: str) -> TextRow:
    others = [key for key in _HALVES if key in given]
    if others:
        raise BadRow(f"'text' next to {others[0]!r} is ambiguous; {_needed(dict(given))}")
    text = given["text"]
    if not isinstance(text, str):
        raise BadRow(f"'text' is {kind(text)}, not a string")
    if not text.strip():
        raise BadRow("'text' is empty: nothing to learn from")
    check_text(text)
    return TextRow(text, where)


def check_text(value: Any) -> None:
    """Refuse unpaired surrogates and values outside JSON: no tokenizer or template accepts them."""
    if is_deep(value):
        raise BadRow("nested too deeply")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is JSON but no text
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise BadRow(f"a string has the unpaired surrogate {surrogate}") from error
    except (TypeError, ValueError) as error:
        raise BadRow(
            f"a message, a tool or an argument has a value outside JSON: {error}; write it as text"
        ) from error
