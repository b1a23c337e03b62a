"""The command line: `lora-jax train|eval|inspect|plan|export|combine|generate`, and `train.py`,
which is `lora-jax train`.

A user's mistake ends with status 2 and its message; `--verbose` adds the traceback.
"""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from lora_jax import programs
from lora_jax.commands import COMMANDS, Command
from lora_jax.config import UserError
from lora_jax.train import interrupt
from lora_jax.train.interrupt import Interrupted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="lora-jax", description="LoRA fine-tuning of language models in JAX."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        command.add(commands.add_parser(name, help=command.help, **_style(command)))
    return _run(_parse(parser, arguments))


def train_main(arguments: Sequence[str] | None = None) -> int:
    """`python train.py`: the same as `lora-jax train`."""
    train = COMMANDS["train"]
    parser = argparse.ArgumentParser(
        prog="train.py", description="Fine-tune as a YAML file says.", **_style(train)
    )
    train.add(parser)
    return _run(_parse(parser, arguments))


def _style(command: Command) -> dict[str, Any]:
    return {
        "epilog": command.epilog,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """As `parse_args`, with overrides in several places; argparse takes those of the first only."""
    options, rest = parser.parse_known_args(arguments)
    strange = [text for text in rest if text.startswith("-") or "=" not in text]
    if strange or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    options.overrides = [*getattr(options, "overrides", ()), *rest]
    return options


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
    """The module `hosts`, if a run on several of them has failed here."""
    hosts = sys.modules.get("lora_jax.hosts")  # not loaded: there was no run
    return hosts if hosts and hosts.failed() else None


def _status(options: argparse.Namespace) -> int:
    try:
        options.function(options)
    except UserError as error:
        if options.verbose:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        print(f"error: cannot write: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"ended by {stop}", file=sys.stderr)
        if interrupt.leave is not None:
            # All is saved, and the end of the interpreter waits for programs that still run.
            sys.stdout.flush()
            sys.stderr.flush()
            interrupt.leave(stop.status)
        return stop.status
    return 0


def own_process() -> None:
    """Prepare a process that belongs to one command: memory, kept programs, and how signals end
    it.
    """
    use_huge_pages()
    programs.keep()
    interrupt.leave = os._exit


def use_huge_pages() -> None:
    """Restart this process, once, with glibc backing its memory by transparent huge pages.

    XLA on a CPU takes its buffers anew at every step, and touching gigabytes of fresh 4 KiB pages
    costs a good part of the step. glibc reads the setting at the start of a process only, so this
    comes before the imports that take time. Without effect outside Linux, or where it is set.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def console_script() -> None:
    """The `lora-jax` command."""
    own_process()
    sys.exit(main())
