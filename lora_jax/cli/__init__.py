"""The command line: `lora-jax COMMAND`, where a command is one of `COMMANDS`,
and `train.py`, which is `lora-jax train`.

A user error ends with its message and status 2; `--verbose` adds the traceback.
"""

import argparse
import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from lora_jax.cli import (
    advise,
    combine,
    evaluate,
    export,
    generate,
    inspect,
    plan,
    report,
    serve,
    sweep,
    train,
)
from lora_jax.config import shown
from lora_jax.errors import UserError
from lora_jax.train import interrupt
from lora_jax.train.interrupt import Interrupted

# Each module has HELP (one line), EPILOG (examples below the options), `add_arguments` and `run`.
COMMANDS = {
    "train": train,
    "sweep": sweep,
    "eval": evaluate,
    "report": report,
    "inspect": inspect,
    "advise": advise,
    "plan": plan,
    "export": export,
    "combine": combine,
    "generate": generate,
    "serve": serve,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="lora-jax",
        description="LoRA fine-tuning of language models in JAX.",
        epilog="`lora-jax COMMAND --help` shows the options of a command, with examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.HELP, **_page(command))
        command.add_arguments(subparser)
    return _run(_parse(parser, arguments))


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Run `python train.py`, which is `lora-jax train`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="train.py", **_page(train))
    train.add_arguments(parser)
    return _run(_parse(parser, arguments))


def _page(command: ModuleType) -> dict[str, Any]:
    """Return the parts of a command's `--help` that are not options."""
    return {
        "description": f"{command.HELP[:1].upper()}{command.HELP[1:]}.",
        "epilog": command.EPILOG,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments. Overrides may be in several places; argparse alone accepts only the
    first.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for text in given:
        if not _is_text(text):
            parser.error(
                f"the argument {shown(repr(text))} is not {sys.getfilesystemencoding()} text"
            )
    for before, text in zip(["", *given], given, strict=False):
        if text.endswith((".yaml", ".yml")) and "=" not in text and not before.startswith("-"):
            parser.error(f"{text} is a config file; pass it as --config {text}")
    options, rest = parser.parse_known_args(given)
    strange = [text for text in rest if text.startswith("-") or "=" not in text]
    if strange or (rest and not hasattr(options, "overrides")):
        hint = "; settings are given as section.key=value, such as train.steps=10"
        parser.error(
            f"unrecognized arguments: {' '.join(strange or rest)}"
            f"{hint if hasattr(options, 'overrides') else ''}"
        )
    options.overrides = [*getattr(options, "overrides", ()), *rest]
    return options


def _is_text(argument: str) -> bool:
    """Return False for bytes that are no text; Python decodes them to lone surrogates."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in argument


def _run(options: argparse.Namespace) -> int:
    try:
        status = _status(options)
    except Exception:
        if not (hosts := _failed_hosts()):
            raise
        traceback.print_exc()
        hosts.leave(1)
        raise
    if hosts := _failed_hosts():
        hosts.leave(status)
    return status


def _failed_hosts() -> Any:
    """Return the module `hosts` if a run on several hosts has failed here."""
    hosts = sys.modules.get("lora_jax.hosts")  # not loaded: there was no run
    return hosts if hosts and hosts.failed() else None


def _streams_without_reader() -> list[int]:
    """Return those of stdout (1) and stderr (2) whose pipe has no reader any more, as after `|
    head`.
    """
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]


def _status(options: argparse.Namespace) -> int:
    try:
        options.function(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # fails if the reader is gone
    except UserError as error:
        if options.verbose:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not (gone := _streams_without_reader()):
            raise
        for descriptor in gone:  # discard what is still buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            message = f"cannot write: {error}"
        elif isinstance(error.filename, str | bytes):
            message = f"{shown(os.fsdecode(error.filename))}: {error.strerror}"
        else:
            raise
        if options.verbose:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"ended by {stop}", file=sys.stderr)
        if interrupt.leave is not None:
            # All is saved; a normal exit would wait for running XLA programs.
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
            interrupt.leave(stop.status)
        return stop.status
    return 0
