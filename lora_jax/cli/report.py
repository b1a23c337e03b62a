"""`lora-jax report`."""

import argparse
import os
from pathlib import Path

from lora_jax.cli import arguments
from lora_jax.errors import UserError

HELP = "write a page of a run, a sweep, an eval or a plan, as one HTML file"
EPILOG = """examples:
  lora-jax report runs/quickstart
  lora-jax report runs/sweep --output sweep.html
  lora-jax eval --config C --adapter A --output scores.json --predictions answers.jsonl
  lora-jax report scores.json --predictions answers.jsonl
  lora-jax plan --config C --json > plan.json && lora-jax report plan.json

PATH says which: a directory of a run or of a sweep, which may still be running, or the JSON file of
`eval --output` or `plan --json`. The page has all its data, charts and scripts in it, makes no
request, and can be sent as it is. Needs pip install 'lora_jax[report]'. docs/report.md
"""
_NAME = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="directory, or JSON file")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"the page (default: {_NAME} in the directory, or FILE.html next to FILE.json)",
    )
    parser.add_argument(
        "--predictions", metavar="FILE", help="answers of an eval, from its --predictions"
    )
    arguments.add_verbose(parser)
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> None:
    path = Path(options.path)
    default = path / _NAME if path.is_dir() else path.with_suffix(".html")
    output = Path(options.output) if options.output else default
    if output.is_dir():
        raise UserError(f"--output {output} is a directory; give a file in it")
    if path.exists() and output.exists() and output.samefile(path):
        raise UserError(f"{path} is the page itself; give the JSON file, or another --output")
    if path.exists() and not os.access(output.absolute().parent, os.W_OK):
        raise UserError(f"--output {output}: its directory is missing or not writable")
    from lora_jax.report.page import write_page

    predictions = Path(options.predictions) if options.predictions else None
    write_page(path, output, predictions)
    print(f"written to {output}")
