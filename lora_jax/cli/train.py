"""`lora-jax train`, also available as `python train.py`."""

import argparse
import os
import sys

from lora_jax import config as configs
from lora_jax.cli import arguments

HELP = "fine-tune a model with the settings of a YAML file"
EPILOG = """examples:
  python train.py --config configs/quickstart.yaml
  python train.py --config configs/quickstart.yaml adapter.rank=8 output_dir=runs/r8
  python train.py --config configs/quickstart.yaml model=org/name data.train=rows.jsonl mesh.fsdp=4
  python train.py --config configs/quickstart.yaml --dry-run
  python train.py --config configs/quickstart.yaml resume=auto train.save_every=20

Any setting of the YAML file can be replaced by key.sub=value. docs/configuration.md lists all
settings, and so does `python -m lora_jax.config.reference`.

Data are rows such as {"prompt": .., "completion": ..} or {"messages": [..]}, in .jsonl, .csv or
.parquet files or on the Hugging Face hub: docs/data.md.

SIGTERM, SIGHUP and Ctrl-C end a run with a checkpoint. resume=true continues from the last
one; resume=auto does so if there is one, and starts a new run otherwise.
"""
# Only the first process prints; asking JAX for the process index takes seconds.
_RANKS = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be trained, check the files and the first rows, and stop",
    )
    arguments.add_verbose(parser)
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> None:
    config = configs.load(options.config, options.overrides)
    if options.dry_run:
        from lora_jax.audit.targets import print_preview

        return print_preview(config)
    if not any(os.environ.get(name, "0") != "0" for name in _RANKS):
        print(
            f"starting {config.output_dir}: {config.model} on {config.data.train}",
            file=sys.stderr,
            flush=True,
        )
    from lora_jax.train import loop  # seconds of imports: after the config is known to be right

    loop.run(config)
