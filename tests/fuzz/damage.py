"""Damage to JSON, bytes, tensors and files."""

import json
import os
import shutil
import socket
import struct
from pathlib import Path
from random import Random
from typing import Any

DEEP = "[" * 500 + "]" * 500
VERY_DEEP = '{"a":' * 100_000
# Values as JSON text, as some of them are none.
HOSTILE = (
    *("null", "true", "false", "0", "-1", "1", "2", "7", "8.5", "1e-9", "-0.0", "1e308", "1e999"),
    *("NaN", "-Infinity", str(2**31), str(2**63), str(10**12), str(10**400), "9" * 5000),
    *('""', '"x"', '"8"', '"true"', '"\\ud800"', '"\\u0000"', '"é\\n"', '"' + "a" * 100_000 + '"'),
    *("[]", "[1]", "[[]]", "[[1]]", "[null]", '["x"]', '[1, "x"]', "[true]", "[-1]", "[1e400]"),
    *("{}", '{"a": 1}', '{"a": {}}', '{"": []}', '{"a": 1, "a": 2}', '{"q_proj": "x"}', DEEP),
    *(VERY_DEEP, json.dumps(list(range(20_000))), json.dumps(["q_proj"] * 200_000)),
    *('"(a+)+$"', '"(.*)*(.*)*(.*)*x"', '"("', '"*"', '".*"', '"(?P<a>"', '"[\\\\"', '"\\\\1"'),
    *('"../../etc/passwd"', '"/etc/passwd"', '"/dev/zero"', '"~nobody/x"', '"float8_e4m3fn"'),
    *('{"auto_map": {"AutoTokenizer": ["a.B", null]}}', '"q_proj"', '["q_proj", 5]', "1000000000"),
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON value."""
    found = [path] if path else []
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        found += places(value[key], (*path, key)) if len(path) < 4 else []
    return found


def damage_json(random: Random, text: str, more: tuple[str, ...] = ()) -> tuple[str, str]:
    """A JSON object with one value replaced, removed, added or given twice; `more` are keys that
    might be added. Returns what was done, and the text.
    """
    mark = "<<here>>"
    value = random.choice(HOSTILE)
    try:
        content = json.loads(text)
    except RecursionError:  # damaged before, and nested too deeply to be read again
        return f"is {value[:40]}", value
    found = places(content)
    if not isinstance(content, dict) or not found:
        return f"is {value[:40]}", value
    kind = random.choice(("replace", "replace", "replace", "remove", "add", "twice", "whole"))
    if kind == "whole":
        return f"is {value[:40]}", value
    if kind == "add" or kind == "twice":
        key = random.choice(more or ("x",)) if kind == "add" else random.choice(list(content))
        body = text.strip().removeprefix("{")
        return f"{kind} {key}={value[:40]}", "{" + json.dumps(key) + ": " + value + "," + body
    # Near the top there are as many fields as below it, but they decide more.
    top = [path for path in found if len(path) == 1]
    path = random.choice(random.choice((top, found)))
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if kind == "remove":
        del parent[path[-1]]
        return f"removed {path}", json.dumps(content)
    parent[path[-1]] = mark
    return f"{path}={value[:40]}", json.dumps(content).replace(json.dumps(mark), value)


def damage_bytes(random: Random, data: bytes) -> tuple[str, bytes]:
    """Bytes cut, flipped, inserted, repeated, or in another encoding."""
    at = random.randrange(len(data) + 1)
    kind = random.choice(("cut", "flip", "insert", "empty", "twice", "encoding", "mark", "head"))
    match kind:
        case "cut":
            data = data[:at]
        case "flip" if data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        case "insert":
            data = data[:at] + random.randbytes(random.choice((1, 8, 1000))) + data[at:]
        case "empty":
            data = b""
        case "twice":
            data += data
        case "encoding":
            data = data.decode("utf-8", "replace").encode(random.choice(("utf-16", "utf-32-le")))
        case "mark":
            data = random.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0")) + data
        case "head":
            data = random.randbytes(16) + data[16:]
    return f"{kind} at {at}", data


def damage_tensors(random: Random, data: bytes) -> tuple[str, bytes]:
    """A safetensors file whose header lies or whose values are strange."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry = header[name]
    kind = random.choice(
        "length dtype shape offsets rename remove again values metadata json huge".split()
    )
    what = ""
    match kind:
        case "length":
            length = random.choice((0, 1, length + 1, 2**31, 2**63, 2**64 - 1, length * 2))
            return f"header of {length}", struct.pack("<Q", length) + data[8:]
        case "dtype":
            entry["dtype"] = what = random.choice(
                "I64 I32 U8 BOOL F64 F16 BF16 F8_E4M3 X C64".split()
            )
        case "shape":
            shape = entry["shape"]
            entry["shape"] = what = random.choice(
                (
                    [],
                    shape[::-1],
                    [*shape, 1],
                    [0],
                    [-1],
                    [2**40, 2**40],
                    [2**62, 4],
                    shape + [0],
                    "x",
                )
            )
        case "offsets":
            start, end = entry["data_offsets"]
            entry["data_offsets"] = what = random.choice(
                ([0, 0], [end, start], [start, end + 4], [2**63, 2**63 + 4], [-8, 8], [start], None)
            )
        case "rename":
            what = random.choice(("x", "", "é" * 300, f"{name}.weight", f"base_model.{name}", "\0"))
            header[what] = header.pop(name)
        case "remove":
            del header[name]
        case "again":
            header[random.choice((f"_orig_mod.{name}", "lm_head.weight", "x.lora_A.weight"))] = (
                entry
            )
        case "values":
            start, end = entry["data_offsets"]
            bits = random.choice((0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0))
            what = hex(bits)
            for at in {start, random.randrange(start, max(start + 1, end - 3), 4)}:
                body[at : at + 4] = struct.pack("<I", bits)
        case "metadata":
            header["__metadata__"] = what = random.choice(
                ({}, {"format": "tf"}, {"format": 5}, None, [], {"x": "y" * 10**6})
            )
        case "json":
            text = damage_json(random, json.dumps(header))
            raw = text[1].encode("utf-8", "replace")
            return f"header {text[0]}", struct.pack("<Q", len(raw)) + raw + body
        case "huge":
            entry["shape"], entry["data_offsets"] = [2**50], [0, 2**52]
    raw = json.dumps(header).encode()
    return f"{kind} {name} {what}"[:200], struct.pack("<Q", len(raw)) + raw + bytes(body)


def damage_kind(random: Random, file: Path) -> str:
    """Put something else where a file was."""
    kind = random.choice(
        "missing directory pipe socket loop nothing zero null outside self large".split()
    )
    data = file.read_bytes() if file.is_file() else b""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink()
    match kind:
        case "directory":
            (file / "inner").mkdir(parents=True)
        case "pipe":
            os.mkfifo(file)
        case "socket":
            here = os.getcwd()
            os.chdir(file.parent)  # names of sockets are short
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind(file.name)
            os.chdir(here)
        case "loop":
            file.symlink_to(file.name + "-2")
            (file.parent / (file.name + "-2")).symlink_to(file.name)
        case "nothing":
            file.symlink_to("/nowhere/at/all")
        case "zero":
            file.symlink_to("/dev/zero")
        case "null":
            file.symlink_to("/dev/null")
        case "outside":
            file.symlink_to("/etc/hostname")
        case "self":
            file.symlink_to(".")
        case "large":
            with file.open("wb") as opened:
                opened.write(data)
                opened.truncate(1 << 30)  # takes no room
    return f"{kind} in place of {file.name}"
