"""Implementation of `lora-jax generate`."""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from lora_jax.config import expand
from lora_jax.errors import UserError
from lora_jax.generate import Sampling, chat, prompts
from lora_jax.generate.answer import open_reader, open_writer
from lora_jax.generate.prompts import Answered, Prompt

_PAUSE = 10.0  # seconds between lines on the progress, without a terminal


def run(options: argparse.Namespace) -> None:
    """Answer the prompts of the command line, of a file or of stdin, or chat.

    Raises:
        UserError: options that contradict each other; an output that exists; as `read_prompts`,
            `open_reader`, `encode` and `open_writer`.
    """
    output = _check_output(options)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
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
        compute_dtype=options.compute_dtype,
        base_dtype=options.base_dtype,
        ignore=options.ignore_config_fields,
    )
    if options.chat:
        return chat.run(writer)
    answers = prompts.answer_all(writer, asked, tokens, options.batch_size)
    if output is not None:
        return _write(output, _shown(answers, len(asked)), len(asked))
    if options.prompts is not None and not sys.stdout.isatty():
        return _print_lines(_shown(answers, len(asked)))
    _print(answers, options.max_new_tokens)


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
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
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


def _shown(answers: Iterable[Answered], count: int) -> Iterator[Answered]:
    """Pass answers on, with a bar on stderr, or a line now and then without a terminal."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    after = time.monotonic() + _PAUSE
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("answers", total=count)
        for done, one in enumerate(answers, 1):
            bar.update(task, completed=done)
            if not console.is_terminal and time.monotonic() >= after:
                console.print(f"answers {done}/{count}")
                after = time.monotonic() + _PAUSE
            yield one
