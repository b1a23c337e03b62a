"""`lora-jax advise`."""

import argparse
import json
from pathlib import Path

from lora_jax import config as configs
from lora_jax.cli import arguments
from lora_jax.errors import UserError

CHECKS = ("rate", "rank", "alpha", "rslora", "plus", "targets", "batch", "objective")
HELP = "suggest rate, rank, alpha, targets, batch and objective, with sources"
EPILOG = """examples:
  lora-jax advise --config configs/quickstart.yaml
  lora-jax advise --config configs/quickstart.yaml --space space.yaml
  lora-jax advise --config configs/quickstart.yaml --space targets.yaml --check targets
  lora-jax sweep --config configs/quickstart.yaml --space space.yaml output_dir=runs/sweep

For each setting: your value, the advised one, the range that the sources leave, the reason, and the
axis of a sweep that checks it. The rate follows from the hidden size, the rank from the number of
supervised tokens, the batch from the number of examples. The sources measured models of 1B
parameters and more on general instructions, so take the advice as a start, and decide by a sweep.
config.json, the tokenizer and the data are read, and no weights. docs/sweeps.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)
    parser.add_argument(
        "--space", metavar="FILE", help="write a space file for `lora-jax sweep` that checks it"
    )
    parser.add_argument(
        "--check",
        action="append",
        default=[],
        choices=CHECKS,
        help="advice that the space checks (default: rate and rank); may be given several times",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    arguments.add_verbose(parser)
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> None:
    config = configs.load(options.config, options.overrides)
    file = Path(options.space) if options.space else None
    if file is not None and file.is_dir():
        raise UserError(f"--space {file} is a directory; give a file in it")
    if file is not None and file.exists():
        raise UserError(f"--space {file} exists; choose another file, or delete it")
    from lora_jax.audit import advice_text as texts
    from lora_jax.audit.advise import advise
    from lora_jax.report.console import make_console

    advice = advise(config, make_console(options.json))
    space = texts.space_text(advice, options.check)
    if file is not None:
        file.write_text(space, encoding="utf-8")
    if options.json:
        print(json.dumps(texts.as_json(advice, space)))
    else:
        print(texts.advice_text(advice))
    if file is not None and not options.json:
        print(f"wrote {file}")
