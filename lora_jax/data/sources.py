"""Rows of conversations from .json and .jsonl files.

    rows = read_rows(Path("train.jsonl"))
    rows[0].messages  # ({"role": "user", "content": ...}, {"role": "assistant", "content": ...})

Accepted rows (other keys are ignored; `messages` wins over `prompt`):

    {"prompt": "...", "completion": "..."}                a user turn and its answer
    {"messages": [message, ...]}                          every assistant turn is trained on
    {"prompt": [message, ...], "completion": [message, ...]}    those of the completion alone are

A message is {"role": ..., "content": ...}; "train": false on an assistant turn takes it out.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.config import UserError, nearest
from lora_jax.data.rows import ROLES, SYSTEM_ROLES, Row

SUFFIXES = (".json", ".jsonl")


def read_rows(path: Path) -> list[Row]:
    """The rows of a .json or .jsonl file, or of all such files directly in a directory (by name).

    Raises:
        UserError: nothing readable there, or malformed rows: the first ten problems, each beginning
            with its file and line, and the number of the others.
    """
    path = Path(path)
    rows: list[Row] = []
    problems: list[str] = []
    for file in _files(path):
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
        read = _lines if file.suffix.lower() == ".jsonl" else _document
        before = len(rows) + len(problems)
        for where, value, problem in read(file.name, data):
            if problem is None:
                try:
                    rows.append(Row(_messages(value), where))
                except _BadRow as error:
                    problem = str(error)
            if problem is not None:
                problems.append(f"{where}: {problem}")
        if len(rows) + len(problems) == before:
            problems.append(f"{file.name}:1: the file holds no rows")
    raise_first(problems)
    return rows


def read_hub_rows(name: str) -> list[Row]:
    """The rows of a hub data set, `org/name` or `org/name:split` (the split is `train` unless
    named).

    Raises:
        UserError: it cannot be fetched; malformed rows, as `read_rows`.
    """
    from datasets import load_dataset  # seconds of imports, for this source only

    repository, _, split = name.partition(":")
    try:
        records = load_dataset(repository, split=split or "train")
    except Exception as error:  # hub, network, parsing and script errors have no common base
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise UserError(
            f"{name!r} is no local file, and not to be had from the Hugging Face hub: {reason}"
        ) from error
    rows, problems = [], []
    for index, record in enumerate(records):
        where = f"{name}[{index}]"
        try:
            rows.append(Row(_messages(record), where))
        except _BadRow as error:
            problems.append(f"{where}: {error}")
    raise_first(problems)
    return rows


def raise_first(problems: Sequence[str], limit: int = 10) -> None:
    """Raise the first `limit` problems, if any, in one `UserError` that counts the others."""
    if problems:
        rest = len(problems) - limit
        more = [f"... and {rest} more problem{'s' * (rest > 1)}"] if rest > 0 else []
        raise UserError("\n".join([*problems[:limit], *more]))


class _BadRow(Exception):
    """What is wrong with one row."""


def _files(path: Path) -> list[Path]:
    endings = " or ".join(SUFFIXES)
    try:
        if path.is_dir():
            inside = sorted(path.iterdir())
            files = [p for p in inside if p.suffix.lower() in SUFFIXES and p.is_file()]
            if not files:
                raise UserError(f"directory {path} holds no {endings} file")
            return files
        if not path.is_file():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"data file {path} does not exist.{nearest(path.name, siblings)}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"data file {path} must end in {endings}, not {path.suffix!r}")
    return [path]


def _lines(name: str, data: bytes):
    """(where, value, problem) of each line that is not blank."""
    # A byte order mark is an invisible gift of some editors; it belongs to no row.
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{name}:{number}", *_parse(line)[:2]


def _document(name: str, data: bytes):
    """(where, value, problem) of each element of the list in a .json file."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        return
    value, problem, line = _parse(data)
    if problem is not None:
        hint = ""
        if "Extra data" in problem:
            hint = " (one object per line? Then the file's name must end in .jsonl)"
        yield f"{name}:{line}", None, problem + hint
        return
    if isinstance(value, dict) and "data" in value:
        value = value["data"]
    if not isinstance(value, list):
        wanted = 'a list of objects or {"data": [...]}'
        yield f"{name}:1", None, f"the file must hold {wanted}, not {_kind(value)}"
        return
    for index, element in enumerate(value):
        yield f"{name}[{index}]", element, None


def _parse(data: bytes) -> tuple[Any, str | None, int]:
    """(value, problem or None, the problem's line from 1); never raises."""
    try:
        return json.loads(data.decode("utf-8")), None, 1
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return None, f"invalid UTF-8 (byte 0x{data[error.start]:02x})", line
    except json.JSONDecodeError as error:
        return None, f"invalid JSON: {error.msg} at column {error.colno}", error.lineno
    except RecursionError:
        return None, "invalid JSON: nested too deeply", 1
    except ValueError as error:  # Python refuses integers of thousands of digits
        return None, f"invalid JSON: {error}", 1


def _messages(row: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(row, dict):
        raise _BadRow(f"a row must be an object, not {_kind(row)}")
    if "messages" in row:
        messages = _message_list(row["messages"], "messages")
    elif "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            asked = _message_list(prompt, "prompt")
            answered = _message_list(completion, "completion", first=False)
            if all(message["role"] != "assistant" for message in answered):
                raise _BadRow("'completion' has no assistant turn: nothing to learn from")
            asked = [m | {"train": False} if m["role"] == "assistant" else m for m in asked]
            messages = asked + answered
        else:
            wanted = "a list of messages" if isinstance(prompt, list) else "a string"
            if not isinstance(prompt, str | list):
                raise _BadRow(f"'prompt' is {_kind(prompt)}, not {wanted}")
            if type(completion) is not type(prompt):
                raise _BadRow(f"'completion' is {_kind(completion)}, not {wanted}")
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": completion},
            ]
    else:
        keys = ", ".join(map(repr, row)) or "none"
        raise _BadRow(
            f"a row needs 'prompt' and 'completion', or 'messages'; its keys: {_printable(keys)}"
        )
    if all(message["role"] != "assistant" for message in messages):
        raise _BadRow("no assistant turn: nothing to learn from")
    try:
        json.dumps(messages, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is JSON but no text: no tokenizer takes it
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise _BadRow(f"a string holds the unpaired surrogate {surrogate}") from error
    except RecursionError as error:
        raise _BadRow("nested too deeply") from error
    return tuple(messages)


def _message_list(value: Any, key: str, first: bool = True) -> list[dict[str, Any]]:
    """Checked messages; `first`: they begin the conversation, where a system turn may be."""
    if not isinstance(value, list):
        raise _BadRow(f"{key!r} is {_kind(value)}, not a list of messages")
    if not value:
        raise _BadRow(f"{key!r} is empty")
    for index, message in enumerate(value):
        _check_message(message, f"{key}[{index}]", first and index == 0)
    return list(value)


def _check_message(message: Any, name: str, first: bool) -> None:
    if not isinstance(message, dict):
        raise _BadRow(f"{name} is {_kind(message)}, not an object with 'role' and 'content'")
    missing = [key for key in ("role", "content") if key not in message]
    # An assistant that calls tools need not say anything.
    calls = message.get("role") == "assistant" and isinstance(message.get("tool_calls"), list)
    if calls and message.get("content") is None:
        missing = []
    if missing:
        keys = _printable(", ".join(map(repr, message)) or "none")
        raise _BadRow(f"{name} has no {missing[0]!r}; its keys: {keys}")
    role, content = message["role"], message.get("content")
    if not isinstance(role, str):
        raise _BadRow(f"{name}.role is {_kind(role)}, not a string")
    if role not in ROLES:
        names = ", ".join(ROLES)
        hint = nearest(role, ROLES)
        raise _BadRow(f"{name}.role is {_printable(repr(role))}, not one of: {names}.{hint}")
    if not isinstance(content, str) and not (calls and content is None):
        raise _BadRow(f"{name}.content is {_kind(content)}, not a string")
    if role in SYSTEM_ROLES and not first:
        raise _BadRow(f"{name} is a {role!r} turn: only the first turn can be one")
    train = message.get("train", False)
    if not isinstance(train, bool):
        raise _BadRow(f"{name}.train is {_kind(train)}, not true or false")
    if train and role != "assistant":
        raise _BadRow(
            f"{name}.train is true on a {role!r} turn: only assistant turns are trained on"
        )


def _kind(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    names = {str: "a string", bool: "a boolean", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), "a number")


def _printable(text: str) -> str:
    """`text` cut to a line's length, without lone surrogates, which no terminal can print."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 200 else text[:197] + "..."
