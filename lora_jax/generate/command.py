"""Implementation of `lora-jax generate`."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.text import Text

from lora_jax.config import expand
from lora_jax.errors import UserError
from lora_jax.generate import Sampling, chat, prompts
from lora_jax.generate.answer import open_reader, open_writer
from lora_jax.generate.prompts import Answered, Prompt
from lora_jax.generate.text import check_stop_strings
from lora_jax.report.console import make_console
from lora_jax.report.progress import SILENT, Display

_PAUSE = 10.0  # seconds between lines on the progress, without a terminal


def run(options: argparse.Namespace) -> None:
    """Answer the prompts of the command line, of a file or of stdin, or chat.

    Raises:
        UserError: options that contradict each other; an output that exists; as `read_prompts`,
            `open_reader`, `encode` and `open_writer`.
    """
    output = _check_output(options)
    check_stop_strings(options.stop)
    sampling = _sampling(options)
    asked: list[Prompt] = []
    if options.prompts is not None:
        asked = prompts.read_prompts(options.prompts, options.prompt_format)
    elif options.prompt_format is not None:
        raise UserError("--prompt-format is for the columns of --prompts, which is not given")
    elif not options.chat:
        asked = [prompts.of_text(text, "--prompt") for text in options.prompt]
    reader = open_reader(
        options.model,
        adapter=options.adapter,
        system_prompt=options.system_prompt,
        chat_template=options.chat_template,
        chat_template_kwargs=options.chat_template_kwargs,
        max_new_tokens=options.max_new_tokens,
        allow_change=options.allow_change,
        ignore=options.ignore_config_fields,
    )
    tokens = prompts.encode(asked, reader) if asked else []
    writer = open_writer(
        reader,
        sampling,
        stop=options.stop,
        compute_dtype=options.compute_dtype,
        base_dtype=options.base_dtype,
        ignore=options.ignore_config_fields,
    )
    if options.chat:
        return chat.run(writer)
    shows_text = output is None and (options.prompts is None or sys.stdout.isatty())
    display = SILENT if shows_text else Display(make_console())
    with display.phase("answers", len(asked), every=_PAUSE) as phase:
        answers = prompts.answer_all(writer, asked, tokens, options.batch_size, phase)
        if output is not None:
            _write(output, answers, len(asked))
        elif shows_text:
            _print(answers, options.max_new_tokens)
        else:
            _print_lines(answers)


def _sampling(options: argparse.Namespace) -> Sampling:
    names = [field.name for field in dataclasses.fields(Sampling) if field.name in options]
    return Sampling(**{name: getattr(options, name) for name in names})


def _check_output(options: argparse.Namespace) -> Path | None:
    if options.output is None:
        return None
    if options.chat:
        raise UserError("--output does not go with --chat, which writes to the terminal")
    file = expand(options.output, "--output")
    if file.suffix not in (".jsonl", ".json", ".txt", ""):
        raise UserError(f"--output {options.output}: lines of JSON are written; name it .jsonl")
    if file.exists():
        raise UserError(f"--output {options.output} already exists; remove it, or name another")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {options.output}: its directory is missing or not writable")
    return file


def _write(file: Path, answers: Iterable[Answered], count: int) -> None:
    """Write lines as they come, each whole: what a long job has done is there if it ends early."""
    done = 0
    try:
        with file.open("x", encoding="utf-8") as opened:
            for one in answers:
                opened.write(one.line())
                opened.flush()
                done += 1
    finally:
        print(f"{done} of {count} answers are in {file}", file=sys.stderr)


def _print_lines(answers: Iterable[Answered]) -> None:
    try:
        for one in answers:
            print(one.line(), end="", flush=True)
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print(answers: Iterable[Answered], max_new_tokens: int) -> None:
    """Print each prompt on stderr, and its answer on stdout, which has nothing else."""
    console = make_console()
    for number, one in enumerate(answers):
        if number:
            print(flush=True)
        console.print(Text(f"> {_last_turn(one.prompt)}", style="bold"))
        print(one.answer, flush=True)
        if one.finish_reason == "length":
            console.print(f"(cut off: --max-new-tokens {max_new_tokens})")


def _last_turn(prompt: Prompt) -> str:
    if isinstance(prompt.given, str):
        return prompt.given
    return str(prompt.given[-1].get("content") or "")
