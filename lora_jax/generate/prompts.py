"""Prompts from a file or stdin, and their answers as lines of JSON.

    prompts.txt     a prompt per line; empty lines are skipped
    prompts.jsonl   {"prompt": ..}, {"messages": [..]} or another form of a training row; a last
                    assistant turn, a completion or an output is the answer, and is not read
    prompts.csv     the same in columns; also .json, .tsv, .parquet and .arrow

A `prompt_format` such as "{question}" makes the user turn from columns, like `data.prompt` in
training. Stdin, and files with another extension, are JSON lines if the first line is an object.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from lora_jax import data
from lora_jax.config import expand, read_text
from lora_jax.config.text import BadJSON, parse_json
from lora_jax.data.named_columns import fill
from lora_jax.data.rows import kind, listed
from lora_jax.errors import UserError, raise_all
from lora_jax.generate.answer import Reader, Writer, Written
from lora_jax.report.progress import Phase

_FORMS = ("messages", "conversations", "prompt", "instruction", "text", "input_ids")
_SHOWN = 10  # problems


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer, and its form in the input."""

    row: data.Row
    given: Any  # text, or messages
    id: Any = None


@dataclass(frozen=True)
class Answered:
    """A prompt with its answer; `finish_reason` is stop or length."""

    prompt: Prompt
    answer: str
    finish_reason: str
    tokens: int

    def line(self) -> str:
        """Return the line of output, as JSON."""
        content = {} if self.prompt.id is None else {"id": self.prompt.id}
        content |= {
            "prompt": self.prompt.given,
            "answer": self.answer,
            "finish_reason": self.finish_reason,
            "tokens": self.tokens,
        }
        text = json.dumps(content, ensure_ascii=False)
        return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def of_text(text: str, where: str) -> Prompt:
    """Return a prompt of one user turn."""
    turns = ({"role": "user", "content": text}, {"role": "assistant", "content": ""})
    return Prompt(data.Row(turns, where), text)


def read_prompts(
    name: str, prompt_format: str | None = None, stdin: TextIO | None = None
) -> list[Prompt]:
    """Read the prompts of a file, or of stdin for "-".

    Raises:
        UserError: the file cannot be read or has no prompt; `prompt_format` is malformed, or given
            with lines of text; records that are not prompts, the first ten with their line.
    """
    prompts: list[Prompt] = []
    problems: list[tuple[str, str | data.BadRow]] = []
    for where, record, problem in _records(name, prompt_format, stdin or sys.stdin):
        try:
            if problem is not None:
                raise data.BadRow(problem)
            is_prompt = isinstance(record, Prompt)
            prompts.append(record if is_prompt else _parse(record, where, prompt_format))
        except data.BadRow as error:
            problems.append((where, error))
    data.raise_first(data.describe_problems(problems), _SHOWN)
    return prompts


def _records(name: str, prompt_format: str | None, stdin: TextIO) -> Iterator[data.Record]:
    """Yield the records of a data file, or of lines; a line of plain text as a `Prompt`."""
    if prompt_format is not None:
        data.columns(prompt_format, "--prompt-format")
    file = None if name == "-" else expand(name, "--prompts")
    if file is not None and data.is_data_file(file):
        yield from data.records(file)
        return
    if file is None:
        where, ending = "stdin", ""
        try:
            text = stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"stdin is not UTF-8: {error}") from error
    else:
        where, ending, text = name, file.suffix, read_text(file)
    lines = [(f"{where}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts {where} has no prompt")
    if ending == ".txt" or not lines[0][1].lstrip().startswith("{"):
        if prompt_format is not None:
            raise UserError(f"--prompt-format is for columns, and {where} has lines of text")
        yield from ((place, of_text(line.strip("\r"), place), None) for place, line in lines)
        return
    for place, line in lines:
        try:
            yield place, parse_json(line), None
        except BadJSON as error:
            yield place, None, f"invalid JSON: {error.problem}"


def _parse(record: Any, where: str, prompt_format: str | None) -> Prompt:
    if not isinstance(record, dict):
        raise data.BadRow(f"a prompt must be an object, not {kind(record)}")
    if prompt_format is not None:
        fill(record, "prompt", prompt_format, "--prompt-format")  # its errors name the option
        row = data.parse_row(record, where, prompt=prompt_format, completion="the answer")
    elif not any(record.get(key) is not None for key in _FORMS):
        example = f"{{{next(iter(record), 'question')}}}"
        raise data.BadRow(
            "a prompt needs 'prompt', 'messages', 'conversations' or 'instruction', or name its "
            f"columns: --prompt-format {example!r}; its keys: {listed([*map(repr, record)])}"
        )
    else:
        row = data.parse_row(_with_answer(record), where)
    if not isinstance(row, data.Row):
        raise data.BadRow("a text has no answer; give 'prompt' or 'messages'")
    if not row.prompt:
        raise data.BadRow("the conversation begins with its answer, and there is no prompt")
    turns = (*row.prompt, {"role": "assistant", "content": ""})
    asked = data.Row(turns, where, row.tools, row.chat_template_kwargs)
    given = [dict(turn) for turn in row.prompt]
    if prompt_format is not None or isinstance(record.get("prompt"), str):
        given = str(given[-1]["content"])
    return Prompt(asked, given, record.get("id"))


def _with_answer(record: dict) -> dict:
    """Return the record as a training row, with a placeholder answer if it has none."""
    if "prompt" in record and record.get("completion") is None:
        some = "x" if isinstance(record["prompt"], str) else [{"role": "assistant", "content": "x"}]
        return record | {"completion": some}
    if "instruction" in record and record.get("output") is None:
        return record | {"output": "x"}
    for name, key, role, text in (
        ("messages", "role", "assistant", "content"),
        ("conversations", "from", "gpt", "value"),
    ):
        turns = record.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            if turns[-1].get(key) not in (role, "assistant"):
                return record | {name: [*turns, {key: role, text: "x"}]}
    return record


def encode(prompts: Sequence[Prompt], reader: Reader) -> list[list[int]]:
    """Return the tokens of all prompts.

    Raises:
        UserError: prompts that cannot be encoded, the first ten with their line.
    """
    found, problems = [], []
    for prompt in prompts:
        try:
            found.append(reader.encode_row(prompt.row))
        except UserError as error:
            text, where = str(error), prompt.row.where
            problems.append(text if text.startswith(where) else f"{where}: {text}")
        if len(problems) == _SHOWN:
            break
    raise_all(problems)
    reader.note_positions(max(map(len, found)))
    return found


def answer_all(
    writer: Writer,
    prompts: Sequence[Prompt],
    tokens: Sequence[list[int]],
    rows: int,
    phase: Phase,
) -> Iterator[Answered]:
    """Yield answers in the order of the prompts, while `phase` counts them as they end; `rows` are
    generated at once. An answer depends on the seed and the number of its prompt only.
    """

    def count(tokens: int) -> None:
        phase.tokens += tokens

    found: dict[int, Written] = {}
    first = 0
    for number, written in writer.answers(tokens, rows, count):
        phase.advance()
        found[number] = written
        while first in found:
            yield finish(prompts[first], found.pop(first))
            first += 1


def finish(prompt: Prompt, written: Written) -> Answered:
    """Return a prompt with its answer."""
    return Answered(prompt, written.text, written.finish_reason, written.tokens)
