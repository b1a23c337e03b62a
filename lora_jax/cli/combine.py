"""`lora-jax combine`."""

import argparse
import json
from pathlib import Path

from lora_jax.cli import arguments
from lora_jax.errors import UserError, raise_all

HELP = "combine adapters into one, or extract one from a fine-tuned model"
EPILOG = """examples:
  lora-jax combine --model org/name --adapter runs/a/adapter=0.7 --adapter runs/b/adapter=0.3 \\
      --output both                                       # exact: ranks add up
  lora-jax combine --model org/name --adapter runs/a/adapter --adapter runs/b/adapter=-1 \\
      --output a-without-b
  lora-jax combine --model org/name --adapter runs/a/adapter --rank 4 --output smaller
  lora-jax combine --model org/name --adapter runs/a/adapter --adapter runs/b/adapter \\
      --method ties --density 0.2 --rank 32 --output both
  lora-jax combine --model org/name --finetuned my-model --rank 64 --output as-adapter

Writes one PEFT adapter directory. All adapters must have the same base.

sum   adds the updates, weight * scale * A B, exactly; the rank is the sum of the ranks.
svd   is the nearest adapter of rank R to that sum.
ties, dare_linear, dare_ties
      drop a part of each update before adding them (arXiv 2306.01708, 2311.03099). The result has
      full rank and is truncated, so --rank is required.

The error of the truncation is printed. docs/combine.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="base model: a directory, a .gguf file, org/name on the hub, or demo:NAME",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--adapter",
        action="append",
        type=_weighted,
        metavar="DIR[=WEIGHT]",
        help="PEFT adapter directory and its weight (default: 1); may be given several times",
    )
    source.add_argument(
        "--finetuned",
        metavar="MODEL",
        help="the base model after full fine-tuning, to extract an adapter from",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="directory to write; must be empty or absent"
    )
    parser.add_argument(
        "--method",
        choices=("sum", "svd", "ties", "dare_linear", "dare_ties"),
        help="combination method (default: sum, or svd with --rank)",
    )
    parser.add_argument(
        "--rank",
        type=arguments.positive,
        metavar="R",
        help="largest rank of a module (default: the sum of the ranks)",
    )
    parser.add_argument(
        "--density",
        type=float,
        metavar="D",
        help="share of every update that ties and dare keep, such as 0.2",
    )
    parser.add_argument(
        "--seed",
        type=arguments.seed,
        default=0,
        help="seed of the values that dare drops (default: 0)",
    )
    _add_extraction(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    arguments.add_ignore(parser)
    arguments.add_allow_change(parser)
    arguments.add_verbose(parser)
    parser.set_defaults(function=run)


def _add_extraction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="with --finetuned: modules that get an adapter, as in training (default: all-linear)",
    )
    parser.add_argument(
        "--uncovered",
        choices=("refuse", "save", "drop"),
        help="with --finetuned: what to do with other weights that differ (norms, embeddings, "
        "biases): fail, save them in full in the adapter, or keep those of the base (default: "
        "refuse)",
    )


def run(options: argparse.Namespace) -> None:
    of_tuned = {"--target-modules": options.target_modules, "--uncovered": options.uncovered}
    of_adapters = {"--method": options.method, "--density": options.density}
    foreign, other = (of_adapters, "--adapter") if options.finetuned else (of_tuned, "--finetuned")
    raise_all(
        [f"{name} goes with {other} only" for name, value in foreign.items() if value is not None]
    )
    if options.finetuned and options.rank is None:
        raise UserError("--finetuned needs --rank: the difference of two models has full rank")
    from lora_jax.combine import Formula, combine_directories, extract_directory

    if options.finetuned:
        report = extract_directory(
            options.model,
            options.finetuned,
            Path(options.output),
            rank=options.rank,
            target_modules=_one_or_list(options.target_modules),
            uncovered=options.uncovered or "refuse",
            ignore=options.ignore_config_fields,
        )
    else:
        report = combine_directories(
            options.model,
            options.adapter,
            Path(options.output),
            Formula(
                method=options.method or ("sum" if options.rank is None else "svd"),
                rank=options.rank,
                density=options.density,
                seed=options.seed,
            ),
            allow_change=options.allow_change,
            ignore=options.ignore_config_fields,
        )
    if options.json:
        return print(json.dumps(report))
    low, high = report["ranks"]
    print(
        f"{options.output}: {report['parameters']:,} parameters, rank "
        + (str(high) if low == high else f"{low} to {high}")
    )
    if report["method"] != "sum":
        print(
            f"relative error of the update: {report['error']:.2e} over all modules, "
            f"{report['worst_error']:.2e} in {report['worst_module']}"
        )


def _weighted(text: str) -> tuple[str, float]:
    """Parse `DIR=WEIGHT`, or `DIR` with weight 1; the directory's name may contain `=`."""
    path, _, weight = text.rpartition("=")
    if not path or Path(text).expanduser().is_dir():
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: {weight!r} is no number, and there is no directory of that name"
        ) from None


def _one_or_list(names: list[str] | None) -> str | list[str]:
    return "all-linear" if names in (None, ["all-linear"]) else names
