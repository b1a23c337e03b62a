"""`lora-jax eval`."""

import argparse
import json
import os
from pathlib import Path

from lora_jax import config as configs
from lora_jax.cli import arguments
from lora_jax.config import Config
from lora_jax.errors import UserError

HELP = "compare adapters with their base model on held-out data"
EPILOG = """examples:
  lora-jax eval --config configs/quickstart.yaml --adapter runs/quickstart/adapter
  lora-jax eval --config runs/a/config.yaml --adapter runs/a/adapter --adapter runs/b/adapter
  lora-jax eval --config configs/e2e.yaml data.eval=mine.jsonl eval.metrics=[bleu,rouge_l]
  lora-jax eval --config runs/a/config.yaml --adapter runs/a/adapter --predictions answers.jsonl
  lora-jax eval --config runs/a/config.yaml --adapter runs/a/adapter --scale 0.5 0.75 1.0 \\
      --plot strengths.svg

Prints one table: held-out losses and the metrics of greedy answers, for the base and each adapter.
The config names the model, the data (data.eval, data.regression) and the metrics (eval.metrics).
Without --adapter the base alone is measured; eval.before=false leaves it out.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR",
        help="PEFT adapter directory to measure; may be given several times",
    )
    parser.add_argument(
        "--scale",
        nargs="+",
        default=[],
        metavar="S",
        help="measure each adapter at these multiples of its update",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw the loss of the task against that of general text to this .svg or .png file",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write the table to this file too, as JSON"
    )
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        help="write every answer to this file, one JSON object per line",
    )
    arguments.add_allow_change(parser)
    arguments.add_verbose(parser)
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> None:
    scales, more = arguments.split_numbers("--scale", options.scale)
    config = configs.load(options.config, [*options.overrides, *more])
    files = {"--output": options.output, "--predictions": options.predictions}
    for name, file in (files | {"--plot": options.plot}).items():
        if file and not os.access(Path(file).parent, os.W_OK):
            raise UserError(f"{name} {file}: its directory is missing or not writable")
        if file and Path(file).is_dir():
            raise UserError(f"{name} {file} is a directory; give a file in it")
    if options.predictions and not config.eval.generate:
        raise UserError("--predictions writes answers, and eval.generate=false generates none")
    if scales and not options.adapter:
        raise UserError("--scale measures adapters: give at least one with --adapter")
    if options.plot:
        _check_plot(config, options.plot)
    from rich.console import Console

    from lora_jax import hosts
    from lora_jax.audit.compare import compare, print_table
    from lora_jax.report.console import make_console
    from lora_jax.report.journal import to_text
    from lora_jax.report.plots import plot_tradeoff

    with hosts.joined(config.hosts):
        main = hosts.is_main()
        console = make_console(not main)
        rows, lines = compare(config, options.adapter, console, options.allow_change, scales)
    if main:
        print_table(rows, Console())
    if main and options.output:
        text = json.dumps(rows, indent=2) + "\n"
        Path(options.output).write_text(text, encoding="utf-8")
    if main and options.plot:
        plot_tradeoff(Path(options.plot), rows)
    if main and options.predictions:
        Path(options.predictions).write_text(to_text(lines), encoding="utf-8")


def _check_plot(config: Config, file: str) -> None:
    """Check that a plot can be drawn, before anything slow."""
    if Path(file).suffix not in (".svg", ".png"):
        raise UserError(f"--plot {file}: its name must end with .svg or .png")
    if config.data.regression is None:
        raise UserError("--plot needs data.regression, whose loss is on the other axis")
    if not config.eval.before:
        raise UserError("--plot draws lines from the base, which eval.before=false leaves out")
