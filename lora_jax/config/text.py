"""Text and JSON files of users, read in one way and within limits.

    read_text(Path("chat.jinja"))      # UTF-8, with or without a byte order mark
    read_json(Path("config.json"))     # the object in it
    parse_json('{"a": [1, 2]}')        # a value of a row, an option or an answer
    is_file(expand("~/a.yaml"))        # as in pathlib; an error where the path cannot be followed

Every error is a `UserError` that names the file first; `parse_json` has no file to name.
"""

import json
import math
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError

# Templates and configs have up to 100 KB.
TEXT_LIMIT = 4 << 20
# The largest JSON that models come with is a tokenizer.json of 35 MB. Python takes up to 25 bytes
# for each byte of JSON.
JSON_LIMIT = 64 << 20
# Levels of lists and objects. Schemas of tools have about ten; at some hundreds Python's own limit
# ends whatever walks through a value.
DEEPEST = 100
_TOO_DEEP = f"nested too deeply: at most {DEEPEST} levels are supported"
BOM = b"\xef\xbb\xbf"  # the byte order mark of UTF-8, which some editors write
_OTHER_BOMS = {
    b"\xff\xfe\x00\x00": "UTF-32",  # before UTF-16, whose mark it begins with
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_KINDS = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
_SPECIAL = {
    stat.S_IFIFO: "it is a pipe; write its text to a file",
    stat.S_IFSOCK: "it is a socket, not a file",
    stat.S_IFCHR: "it is a device, not a file",
    stat.S_IFBLK: "it is a device, not a file",
}
# Integers without their sign. Tokenizers without a limit write 10**30; 10**400 is no float.
_LARGEST = 10**40


class BadJSON(ValueError):
    """Text that is not JSON, or that exceeds a limit. `line` and `column` may be unknown."""

    def __init__(self, problem: str, line: int | None = None, column: int | None = None):
        place = "" if line is None else f" at line {line}, column {column}"
        super().__init__(f"{problem}{place}")
        self.problem, self.line, self.column = problem, line, column


def expand(text: str | Path, name: str = "") -> Path:
    """Return the path that a user gave, with `~` replaced. `name` is the setting in messages.

    Raises:
        UserError: `~NAME` of no user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}{'=' * bool(name)}{shown(repr(str(text)))}: {error}") from error


def is_file(path: str | Path, name: str | None = None) -> bool:
    """Return True for a regular file, False for another kind or none. `name` is that of the path
    in messages.

    Raises:
        UserError: the path cannot be followed: too long, a loop of links, a link to nothing, no
            permission, a null byte.
    """
    return stat.S_ISREG(_mode(path, name))


def is_directory(path: str | Path, name: str | None = None) -> bool:
    """Return True for a directory, False for another kind or none.

    Raises:
        UserError: as `is_file`.
    """
    return stat.S_ISDIR(_mode(path, name))


def exists(path: str | Path, name: str | None = None) -> bool:
    """Return True if the path leads to anything.

    Raises:
        UserError: as `is_file`.
    """
    return _mode(path, name) != 0


def _mode(path: str | Path, name: str | None) -> int:
    """Return the mode of a path, or 0 if nothing is there."""
    path = Path(path)
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise UserError(
                f"{shown(name or path)} cannot be read: it is a link to "
                f"{shown(os.readlink(path))}, which does not exist"
            ) from error
        return 0
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise unreadable(name or path, error) from error


def unreadable(name: str | Path, error: OSError | ValueError) -> UserError:
    """Return the error of a file that the system does not read."""
    reason = getattr(error, "strerror", None) or error
    if isinstance(error, UnicodeError):
        reason = "the name is not UTF-8"
    return UserError(f"{shown(name)} cannot be read: {reason}")


def shown(name: str | Path) -> str:
    """Return a name as it can be printed: in one line, with escapes for what is no text, and with
    its middle cut out if it is long.
    """
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))
    return text if len(text) <= 300 else f"{text[:200]}...{text[-80:]}"


def quoted(value: Any) -> str:
    """Return a value as Python writes it, for messages: in one line, a long one without its end."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_bytes(file: Path, name: str | None = None, limit: int = JSON_LIMIT) -> bytes:
    """Return the bytes of a regular file of up to `limit`. `name` is the file in messages.

    Raises:
        UserError: the file is missing, a directory, a device, a pipe, not readable or too large.
    """
    try:
        mode = file.stat().st_mode  # before it is opened: a pipe would wait for a writer
        if special := _SPECIAL.get(stat.S_IFMT(mode)):
            raise UserError(f"{shown(name or file)} cannot be read: {special}")
        parts, size = [], 0
        with file.open("rb") as opened:  # in parts: one read would take memory for all of `limit`
            while size <= limit and (part := opened.read(1 << 20)):
                parts.append(part)
                size += len(part)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(name or file, error) from error
    if size > limit:
        size = max(size, os.stat(file).st_size)
        raise UserError(
            f"{shown(name or file)} cannot be read: it has {size:,} bytes, and the "
            f"limit for such a file is {limit:,}"
        )
    return b"".join(parts)


def read_text(file: str | Path, name: str | None = None, limit: int = TEXT_LIMIT) -> str:
    """Return the text of a UTF-8 file without its byte order mark; line ends become newlines.
    `name` is the file in messages.

    Raises:
        UserError: as `read_bytes`; the text is not UTF-8.
    """
    file = expand(file)
    data = read_bytes(file, name, limit)
    name = shown(name or file)
    try:
        text = data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        kind = other_encoding(data) or f"not UTF-8 (byte 0x{byte:02x} in line {line})"
        raise UserError(f"{name} cannot be read: the text is {kind}; save it as UTF-8") from error
    if "\0" in text:
        raise UserError(
            f"{name} cannot be read: the text has null bytes, as UTF-16 has; save it as UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(file: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: as `read_text`; the text is not JSON as `parse_json` has it, or not an object.
    """
    text = read_text(file, limit=JSON_LIMIT)
    try:
        content = parse_json(text)
        _check_integers(content)
    except BadJSON as error:
        raise UserError(f"{shown(file)} cannot be read: invalid JSON: {error}") from error
    if not isinstance(content, dict):
        kind = _KINDS.get(type(content), "a number")
        raise UserError(f"{shown(file)} cannot be read: it must be a JSON object, not {kind}")
    return content


def parse_json(text: str) -> Any:
    """Return the value of JSON text.

    Raises:
        BadJSON: it is not JSON; it has NaN, an infinity or a number as large as one, a key twice in
            one object, half of a surrogate pair, or more than `DEEPEST` levels.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite
        )
    except json.JSONDecodeError as error:
        raise BadJSON(error.msg, error.lineno, error.colno) from error
    except RecursionError as error:
        raise BadJSON(_TOO_DEEP) from error
    except BadJSON:
        raise
    except ValueError as error:  # Python refuses integers of thousands of digits
        raise BadJSON(str(error)) from error
    if text.count("[") + text.count("{") > DEEPEST and is_deep(value):
        raise BadJSON(_TOO_DEEP)
    if "\\u" in text:
        _check_surrogates(value)
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise BadJSON(f"an object has the key {shown(repr(twice))} twice")
    return found


def _no_constant(name: str) -> Any:
    raise BadJSON(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise BadJSON(f"{shown(text)} is too large for a number")
    return value


def is_deep(value: Any) -> bool:
    """Return True if lists and objects are nested in more than `DEEPEST` levels."""
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for one in level for inner in _inner(one) if isinstance(inner, dict | list)]
    return bool(level)


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is JSON but no text
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise BadJSON(f"a string has the unpaired surrogate {surrogate}") from error


def _check_integers(value: Any) -> None:
    level = [value]
    while level:
        for one in level:
            if isinstance(one, int) and abs(one) > _LARGEST:
                raise BadJSON(f"{shown(str(one))} is too large for an integer")
        level = [inner for one in level for inner in _inner(one)]


def other_encoding(data: bytes) -> str | None:
    """Return the encoding that a byte order mark names, if it is not UTF-8."""
    return next((name for mark, name in _OTHER_BOMS.items() if data.startswith(mark)), None)
