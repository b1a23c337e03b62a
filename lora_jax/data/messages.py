"""Messages and tools of a record, checked and converted to one form.

A message is {"role": .., "content": ..}. Other known keys:

    train, training, loss, weight    true or 1 trains an assistant turn, false or 0 does not;
      loss_weight, loss_scale        kept as "train"
    tool_calls                       [{"function": {"name": .., "arguments": {..}}}, ..], or without
                                     "function"; arguments as JSON text become objects
    function_call                    OpenAI's older form of one call
    reasoning_content, thinking,     strings, for the chat template
      reasoning, name, tool_call_id

The content is a string, or a list of {"type": "text", "text": ..} parts, which are joined. The
content of a tool may be any object or list, and becomes JSON. Harmless keys are left out; others
are passed to the chat template, which must read them.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_jax.config import text
from lora_jax.data.keys import MESSAGE_KEYS, is_empty, is_harmless
from lora_jax.data.rows import REASONING, ROLES, SYSTEM_ROLES, BadRow, kind, listed, printable
from lora_jax.errors import nearest

_SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
_SPEAKERS |= {role: role for role in ROLES}
_TRAIN = ("train", "training", "loss", "weight", "loss_weight", "loss_scale")
_OF_CALLS = ("function", "name", "arguments", "id", "type", "index")
_REFUSED = {
    "train_detail": "parts of a turn cannot be left out of the training",
    "refusal": "the answer belongs in 'content'",
    **dict.fromkeys(
        ("audio", "image", "images", "video", "videos", "files"), "only text can be read"
    ),
}


def messages_of(
    value: Any, key: str, first: bool = True, ignore: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return checked messages of the column `key`.

    first: they begin the conversation, so the first may be a system turn
    ignore: keys of messages to leave out

    Raises:
        BadRow: names the problem and its position in `key`.
    """
    if not isinstance(value, list):
        raise BadRow(f"{key!r} is {kind(value)}, not a list of messages")
    if not value:
        raise BadRow(f"{key!r} is empty")
    return [
        _message(message, f"{key}[{index}]", first and index == 0, ignore)
        for index, message in enumerate(value)
    ]


def _message(message: Any, name: str, first: bool, ignore: Collection[str]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"{name} is {kind(message)}, not an object with 'role' and 'content'")
    checked = {
        key: value
        for key, value in message.items()
        if key == "content" or (value is not None and key not in ignore)
    }
    role = checked.get("role")
    if role is not None and not isinstance(role, str):
        raise BadRow(f"{name}.role is {kind(role)}, not a string")
    if role == "function":  # OpenAI's older name
        role = checked["role"] = "tool"
    calls = _calls(checked, name) if role == "assistant" else []
    # An assistant turn with calls needs no content.
    if role is None or not (calls or "content" in checked):
        missing = "role" if role is None else "content"
        raise BadRow(f"{name} has no {missing!r}; its keys: {listed([*map(repr, checked)])}")
    if role not in ROLES:
        raise BadRow(f"{name}.role is {_not_one_of(role, ROLES)}")
    content = checked.get("content")
    if role == "tool" and isinstance(content, dict | list) and not _are_parts(content):
        checked["content"] = _as_json(content, f"{name}.content")
    elif isinstance(content, list):
        checked["content"] = _joined(content, f"{name}.content")
    elif not isinstance(content, str) and not (calls and content is None):
        raise BadRow(f"{name}.content is {kind(content)}, not a string")
    if role in SYSTEM_ROLES and not first:
        raise BadRow(f"{name} is a {role!r} turn: only the first turn can be one")
    _set_train(checked, name)
    return _without_harmless(checked, name)


def _without_harmless(checked: dict[str, Any], name: str) -> dict[str, Any]:
    for key in ("name", *REASONING):
        if not isinstance(checked.get(key, ""), str):
            raise BadRow(f"{name}.{key} is {kind(checked[key])}, not a string")
    kept = {}
    for key, value in checked.items():
        empty = is_empty(value)
        if key == "tool_calls" and checked["role"] != "assistant":
            if not empty:
                role = checked["role"]
                raise BadRow(f"{name}.tool_calls on a {role!r} turn: only assistants call tools")
        elif key in MESSAGE_KEYS:
            kept[key] = value
        elif empty or is_harmless(str(key), value):
            continue
        elif key in _REFUSED or str(key).startswith("train_"):
            reason = _REFUSED.get(key, 'a turn has "train": true or false')
            raise BadRow(f"{name}.{printable(str(key))} cannot be used: {reason}")
        else:
            kept[key] = value
    return kept


def _set_train(checked: dict[str, Any], name: str) -> None:
    """Move the key that says if a turn is trained on to `train`."""
    found = {key: checked.pop(key) for key in _TRAIN if key in checked}
    for key, value in found.items():
        if key == "train" and not isinstance(value, bool):
            raise BadRow(f"{name}.train is {kind(value)}, not true or false")
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            given = kind(value) if isinstance(value, list | dict) else printable(repr(value))
            raise BadRow(f"{name}.{key} is {given}: a turn is trained on (1) or not (0)")
        if value and checked["role"] != "assistant":
            shown = "true" if isinstance(value, bool) else "1"
            raise BadRow(
                f"{name}.{key} is {shown} on a {checked['role']!r} turn: only assistant turns are "
                "trained on"
            )
    if len(set(map(bool, found.values()))) > 1:
        raise BadRow(f"{name}: {' and '.join(map(repr, found))} differ: keep one")
    if found:
        checked["train"] = bool(next(iter(found.values())))


# Content


def _are_parts(content: Any) -> bool:
    """Return True if a content is a list of parts, not the result of a tool."""
    return isinstance(content, list) and any(
        isinstance(part, dict)
        and isinstance(part.get("type"), str)
        and part["type"].startswith(("text", "image", "audio", "video", "file", "input_"))
        for part in content
    )


def _joined(parts: list, name: str) -> str:
    if not parts:
        raise BadRow(f"{name} is an empty list")
    for index, part in enumerate(parts):
        found = [part.get("type"), part.get("text")] if isinstance(part, dict) else []
        if list(map(type, found)) != [str, str] or found[0] != "text":
            raise BadRow(
                f'{name}[{index}] is no {{"type": "text", "text": ".."}}: only text can be read'
            )
    return "".join(part["text"] for part in parts)


def _as_json(value: Any, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"{name} cannot be written as JSON: {error}") from error


# Tools and calls of them


def _calls(checked: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Check the calls of an assistant turn, store them in it as `tool_calls`, and return them."""
    calls, older = checked.get("tool_calls", []), checked.pop("function_call", None)
    calls_name = f"{name}.tool_calls"
    if older is not None:
        if not is_empty(calls):
            raise BadRow(f"{name} has both 'tool_calls' and 'function_call': keep one")
        calls = [{"type": "function", "function": older}]
        calls_name = f"{name}.function_call"
    if not isinstance(calls, list):
        raise BadRow(f"{calls_name} is {kind(calls)}, not a list of calls")
    if older is not None:
        calls = [_call(calls[0], calls_name)]
    else:
        calls = [_call(call, f"{calls_name}[{index}]") for index, call in enumerate(calls)]
    checked.pop("tool_calls", None)
    if calls:
        checked["tool_calls"] = calls
    return calls


def _call(call: Any, name: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise BadRow(f"{name} is {kind(call)}, not an object with a function and its arguments")
    call = {k: v for k, v in call.items() if v is not None or k == "arguments"}
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise BadRow(f"{name}.function is {kind(function)}, not an object")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(f"{name} has no function with a 'name' that is a string")
    keys = {*call, *function}
    if unknown := sorted(str(key) for key in keys if not _is_of_call(key, call, function)):
        raise BadRow(
            f"{name} has {listed([*map(repr, unknown)])}, not known in a call: it has a 'name' and "
            "'arguments'"
        )
    if "arguments" in function:
        function = function | {"arguments": _arguments(function["arguments"], name)}
    return call | {"function": function} if "function" in call else function


def _is_of_call(key: Any, call: Mapping[str, Any], function: Mapping[str, Any]) -> bool:
    """Return True if a key belongs to a call, is empty or is harmless."""
    value = function.get(key, call.get(key))
    return key in _OF_CALLS or is_empty(value) or is_harmless(str(key), value)


def _arguments(value: Any, name: str) -> dict[str, Any]:
    """Return the arguments of a call as an object; those of OpenAI are JSON text."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        value = parse_json(value, f"{name}.arguments")
    if not isinstance(value, dict):
        raise BadRow(f"{name}.arguments is {kind(value)}, not an object, nor JSON text of one")
    return value


def parse_json(value: str, name: str) -> Any:
    """Parse JSON text of a record; `name` names it in errors.

    Raises:
        BadRow: it is not valid JSON.
    """
    try:
        return text.parse_json(value)
    except text.BadJSON as error:
        raise BadRow(f"{name} is a string that is no JSON: {printable(str(error))}") from error


def tools_of(given: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the tools of a record, from `tools` or OpenAI's older `functions`.

    Raises:
        BadRow: names the problem.
    """
    key = "tools" if is_empty(given.get("functions")) else "functions"
    value = given.get(key, "")
    if key == "functions" and not is_empty(given.get("tools")):
        raise BadRow("'tools' and 'functions' are both there: keep one")
    if isinstance(value, str):
        value = parse_json(value, repr(key)) if value else None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadRow(f"{key!r} is {kind(value)}, not a list of JSON schemas")
    return tuple(_tool(tool, f"{key}[{index}]") for index, tool in enumerate(value))


def _tool(tool: Any, name: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise BadRow(f"{name} is {kind(tool)}, not an object")
    tool = {key: value for key, value in tool.items() if value is not None}
    function = tool.get("function", tool)
    if not isinstance(function, dict):
        raise BadRow(f"{name}.function is {kind(function)}, not an object")
    function = {key: value for key, value in function.items() if value is not None}
    if not isinstance(function.get("name", ""), str) or ("function" in tool and not function):
        raise BadRow(f"{name} has no function with a 'name' that is a string")
    if isinstance(function.get("parameters"), str):
        function["parameters"] = parse_json(function["parameters"], f"{name}.parameters")
    if not isinstance(function.get("parameters", {}), dict):
        raise BadRow(f"{name}.parameters is {kind(function['parameters'])}, not an object")
    return tool | {"function": function} if "function" in tool else function


# ShareGPT's turns


def from_sharegpt(value: Any) -> Any:
    """Return the turns with "from" as messages, the others as they are, for `messages_of`.

    Raises:
        BadRow: a turn of an unknown speaker, or without a text.
    """
    if not isinstance(value, list):
        return value
    turns = []
    for index, turn in enumerate(value):
        if isinstance(turn, dict) and "from" in turn and turn.get("role") is None:
            name, speaker, said = f"conversations[{index}]", turn["from"], turn.get("value")
            others = {k: v for k, v in turn.items() if k not in ("from", "value", "role")}
            if not isinstance(speaker, str):
                raise BadRow(f"{name}.from is {kind(speaker)}, not a string")
            if speaker in ("function_call", "tool_call"):
                said = parse_json(said, f"{name}.value") if isinstance(said, str) else said
                calls = said if isinstance(said, list) else [said]
                turn = others | {"role": "assistant", "content": "", "tool_calls": calls}
            elif speaker not in _SPEAKERS:
                raise BadRow(f"{name}.from is {_not_one_of(speaker, _SPEAKERS)}")
            elif not isinstance(said, str):
                raise BadRow(f"{name}.value is {kind(said)}, not a string")
            else:
                turn = others | {"role": _SPEAKERS[speaker], "content": said}
        turns.append(turn)
    return turns


def _not_one_of(name: str, names: Sequence[str] | dict[str, str]) -> str:
    hint = nearest(name[:100], names)
    return f"{printable(repr(name[:100]))}, not one of: {', '.join(names)}.{hint}"
