"""Files that a report page is made of."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lora_jax import config as configs
from lora_jax.config import text
from lora_jax.errors import UserError
from lora_jax.report import journal


def read_json(file: Path) -> Any:
    """Return the value in a JSON file. NaN, which a loss may be, is accepted.

    Raises:
        UserError: the file cannot be read, or is no JSON.
    """
    found = text.read_text(file, limit=text.JSON_LIMIT)
    try:
        return json.loads(found)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: invalid JSON: {error}") from error


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no such file.

    Raises:
        UserError: as `read_json`; the file holds no object.
    """
    content = read_json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{file} cannot be read: it must be a JSON object")
    return content


def read_steps(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a .jsonl file of a run or a sweep; none if it is missing."""
    lines: list[Any] = journal.read_lines(file)
    return [one for one in lines if isinstance(one, dict) and isinstance(one.get("step"), int)]


def read_config(file: Path) -> tuple[dict[str, Any], str]:
    """Return the settings of a config.yaml and its text; both are empty if there is no such file.

    Raises:
        UserError: the file is no config.
    """
    if not file.is_file():
        return {}, ""
    return dataclasses.asdict(configs.load(file)), text.read_text(file, f"config file {file}")
