"""`lora-jax sweep`."""

import argparse
import sys

from lora_jax import config as configs
from lora_jax.cli import arguments

HELP = "train many adapters over one base as one program, and compare them"
EPILOG = """examples:
  lora-jax sweep --config configs/quickstart.yaml --space space.yaml
  lora-jax sweep --config configs/quickstart.yaml --space space.yaml --members 8 train.steps=200
  lora-jax sweep --config configs/quickstart.yaml --space space.yaml resume=true

space.yaml:
  sampler: grid                      # or random, tpe
  halving: {first_step: 25, factor: 2}
  space:
    adapter.rank: [1, 4, 16]
    train.learning_rate: [3e-4, 1e-3]
    seed: [0, 1]

Results are in output_dir: sweep.json, best.yaml for train.py, and the best adapters in `adapters`,
which `lora-jax serve --adapter-root` serves. docs/sweeps.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)
    parser.add_argument(
        "--space", required=True, metavar="FILE", help="YAML file with the settings that differ"
    )
    parser.add_argument(
        "--members",
        type=arguments.positive,
        metavar="K",
        help="trials that train at once (default: as many as fit, 8 if the memory is not known)",
    )
    parser.add_argument(
        "--best",
        type=arguments.positive,
        default=1,
        metavar="N",
        help="adapters to export; where trials differ in data.train, of each of these (default: 1)",
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="database of Optuna that several processes share, such as sqlite:///sweep.db; each "
        "runs the same command with an output_dir of its own and takes trials",
    )
    arguments.add_verbose(parser)
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> None:
    config = configs.load(options.config, options.overrides)
    from lora_jax.sweep.space import load_space

    space = load_space(options.space)
    print(f"starting {config.output_dir}: {config.model}", file=sys.stderr, flush=True)
    from lora_jax.sweep import run as sweeps  # seconds of imports: after the files are right

    sweeps.run_sweep(
        config, space, sweeps.SweepOptions(options.members, options.best, options.storage)
    )
