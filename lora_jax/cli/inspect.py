"""`lora-jax inspect`."""

import argparse
from pathlib import Path

from lora_jax import config as configs
from lora_jax.cli import arguments
from lora_jax.errors import UserError

HELP = "show the examples that a run would train on"
EPILOG = """examples:
  lora-jax inspect --config configs/quickstart.yaml
  lora-jax inspect --config configs/quickstart.yaml data.max_length=256 --examples 1
  lora-jax inspect --config configs/e2e.yaml data.train=mine.jsonl --plot lengths.png

Prints examples as the model sees them, their lengths, dropped rows, overlaps and packing.
Supervised text is green, or between « and » without colours. No weights are loaded. With
data.streaming only the first data.stream_rows records are read.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)
    parser.add_argument(
        "--examples",
        type=int,
        default=3,
        metavar="N",
        help="examples to show from each training source (default: 3)",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="write histograms of the lengths to this image file"
    )
    arguments.add_verbose(parser)
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> None:
    config = configs.load(options.config, options.overrides)
    if options.plot and Path(options.plot).is_dir():
        raise UserError(f"--plot {options.plot} is a directory; give a file in it")
    from rich.console import Console

    from lora_jax.audit import data as inspection
    from lora_jax.report.console import make_console

    report = inspection.inspect(config, make_console(), options.examples)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    inspection.print_report(report, console)
    if options.plot:
        inspection.plot(report, Path(options.plot))
