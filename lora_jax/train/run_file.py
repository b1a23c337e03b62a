"""The file run.json, which marks a directory as that of a run.

    {"run": "9f2c..", "checkpoint_dir": null, "exports": {"adapter": {"files": [..]}}, ..}

It has the ID of the run, the place of its checkpoints and the files that it exported. A
`checkpoint_dir` outside `output_dir` has a run.json with the ID too.
"""

import datetime
import json
import secrets
import socket
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_jax.config import read_json
from lora_jax.errors import UserError
from lora_jax.report.journal import write_whole
from lora_jax.train import checkpoint

MARKER = "run.json"
EXPORTS = ("adapter", "merged")


def new_content(run: str | None) -> dict[str, Any]:
    return {
        "run": run or secrets.token_hex(8),
        "lora_jax": version("lora_jax"),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "checkpoint_dir": None,  # OUTPUT_DIR/checkpoints
        "saved": False,  # a checkpoint
        "exports": {},
    }


def read_marker(output: Path) -> dict[str, Any] | None:
    """Return the content of run.json in an output directory; None without a valid one."""
    content = _read(output / MARKER) if (output / MARKER).is_file() else None
    if content is None or not isinstance(content.get("exports"), dict):
        return None
    for name, export in content["exports"].items():
        files = export.get("files") if isinstance(export, dict) else None
        if name not in EXPORTS or not isinstance(files, list) or not all(map(_is_plain, files)):
            raise UserError(f"{output / MARKER} is damaged: exports.{name}; remove it")
    place = content.get("checkpoint_dir")
    if not isinstance(content.get("saved"), bool) or not (place is None or isinstance(place, str)):
        return None
    return content


def read_place(place: checkpoint.Place) -> dict[str, Any] | None:
    """Return the content of run.json in a directory of checkpoints; None without a valid one."""
    file = place / MARKER
    if isinstance(file, Path):
        return _read(file) if file.is_file() else None
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return content if isinstance(content, dict) and _is_id(content.get("run")) else None


def _read(file: Path) -> dict[str, Any] | None:
    content = read_json(file)
    return content if _is_id(content.get("run")) else None


def write_place(place: checkpoint.Place, content: Mapping[str, Any]) -> None:
    if isinstance(place, Path):
        write_whole(place / MARKER, dump(content))
    else:
        (place / MARKER).write_text(dump(content), encoding="utf-8")


def dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _is_id(text: Any) -> bool:
    return isinstance(text, str) and text.isascii() and text.isalnum() and len(text) <= 64


def _is_plain(file: Any) -> bool:
    """Return True for a relative path that stays below its directory."""
    if not isinstance(file, str) or "\0" in file:
        return False
    parts = file.split("/")
    return all(part not in ("", ".", "..") for part in parts)
