"""Text and JSON files that a user names, all read in one way.

    read_text(Path("chat.jinja"))      # UTF-8, with or without a byte order mark
    read_json(Path("config.json"))     # the object in it

Every error is a `UserError` that names the file first.
"""

import json
from pathlib import Path
from typing import Any

from lora_jax.config.errors import UserError

BOM = b"\xef\xbb\xbf"  # the byte order mark of UTF-8, which some editors write
_OTHER_BOMS = {
    b"\xff\xfe\x00\x00": "UTF-32",  # before UTF-16, whose mark it begins with
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_KINDS = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}


def read_text(file: str | Path, name: str | None = None) -> str:
    """The text of a UTF-8 file without its byte order mark; line ends become newlines. `name` is
    that of the file in messages.

    Raises:
        UserError: the file is missing, a directory or not readable; its text is not UTF-8.
    """
    name, file = name or str(file), Path(file).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        data = error.object
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        kind = other_encoding(data) or f"not UTF-8 (byte 0x{byte:02x} in line {line})"
        raise UserError(f"{name} cannot be read: the text is {kind}; save it as UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be read: {reason}") from error
    if "\0" in text:
        raise UserError(
            f"{name} cannot be read: the text has null bytes, as UTF-16 has; save it as UTF-8"
        )
    return text


def read_json(file: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: as `read_text`; the text is not JSON, or not an object.
    """
    text = read_text(file)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{file} cannot be read: invalid JSON: {error.msg} at {place}") from error
    except (ValueError, RecursionError) as error:  # integers of thousands of digits; deep nesting
        raise UserError(f"{file} cannot be read: invalid JSON: {error}") from error
    if not isinstance(content, dict):
        kind = _KINDS.get(type(content), "a number")
        raise UserError(f"{file} cannot be read: it must hold a JSON object, not {kind}")
    return content


def other_encoding(data: bytes) -> str | None:
    """The encoding that a byte order mark names, if it is not UTF-8."""
    return next((name for mark, name in _OTHER_BOMS.items() if data.startswith(mark)), None)
