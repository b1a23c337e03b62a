"""`lora-jax plan`."""

import argparse
import json
import os

from lora_jax import config as configs
from lora_jax.cli import arguments
from lora_jax.errors import UserError

HELP = "estimate whether a run fits its devices, and how fast it is"
EPILOG = """examples:
  lora-jax plan --config configs/quickstart.yaml
  lora-jax plan --config configs/quickstart.yaml --topology v5e:2x2 mesh.fsdp=4
  lora-jax plan --config configs/quickstart.yaml --topology v5e:4x4 --search
  lora-jax plan --parameters 70e9

Memory is estimated from shapes first, in a moment. The train step is then compiled for the devices
of this machine, or for a TPU slice that it need not have (pip install 'lora_jax[plan]'). Neither
weights nor data are loaded. docs/plan.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, required=False)
    parser.add_argument(
        "--topology",
        metavar="CHIP:SHAPE",
        help="plan for a TPU slice, such as v5p:2x2x4; needs no TPU",
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="plan for N devices, simulated on the CPU"
    )
    parser.add_argument(
        "--parameters",
        type=float,
        metavar="N",
        help="print the memory that a model of N parameters takes, such as 70e9, without a config",
    )
    parser.add_argument(
        "--search", action="store_true", help="try meshes, micro-batches and remat policies"
    )
    parser.add_argument(
        "--members",
        type=arguments.positive,
        metavar="K",
        help="plan a sweep of K members too, and the most members that fit",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="print only the memory estimated from shapes"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compile faster, with fewer optimisations; memory is almost the same",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    arguments.add_verbose(parser)
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> None:
    if (options.config is None) == (options.parameters is None):
        raise UserError("plan needs either --config FILE or --parameters N")
    if options.topology is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"  # neither use nor reserve a device here
    from lora_jax import plan as planning

    if options.parameters is not None:
        return planning.plan_parameters(options.parameters, options.json)
    from lora_jax.report.console import make_console

    result = planning.plan(
        configs.load(options.config, options.overrides),
        planning.PlanOptions(
            topology=options.topology,
            devices=options.devices,
            compiles=not options.no_compile,
            quick=options.quick,
            searches=options.search,
            members=options.members,
        ),
        say=(lambda text: None) if options.json else (lambda text: print(text, flush=True)),
        working=make_console().status,
    )
    if options.json:
        print(json.dumps(result))
