"""`lora-jax plan`."""

import argparse
import json
import os

from lora_jax import config as configs
from lora_jax.cli import arguments
from lora_jax.errors import UserError

HELP = "whether a run fits its devices, and how fast"
EPILOG = """examples:
  lora-jax plan --config configs/quickstart.yaml
  lora-jax plan --config configs/quickstart.yaml --topology v5e:2x2 mesh.fsdp=4
  lora-jax plan --config configs/quickstart.yaml --topology v5e:4x4 --search
  lora-jax plan --parameters 70e9

Does it fit? Memory from shapes, at once; then the train step compiled, for the devices here or for
a TPU slice that need not be (pip install 'lora_jax[plan]'). No weights, no data. docs/plan.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, required=False)
    parser.add_argument(
        "--topology", metavar="CHIP:SHAPE", help="a TPU slice, such as v5p:2x2x4; need not be here"
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="so many devices that need not be here, as CPUs"
    )
    parser.add_argument(
        "--parameters", type=float, metavar="N", help="the memory of N parameters, such as 70e9"
    )
    parser.add_argument(
        "--search", action="store_true", help="try meshes, micro-batches and remat policies"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="print the memory from shapes, and stop"
    )
    parser.add_argument(
        "--quick", action="store_true", help="let the compiler optimise less; sizes stay close"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, no text")
    arguments.add_verbose(parser)
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> None:
    if (options.config is None) == (options.parameters is None):
        raise UserError("plan needs either --config FILE or --parameters N")
    if options.topology is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"  # no device here is used, or held from others
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
        ),
        say=(lambda text: None) if options.json else (lambda text: print(text, flush=True)),
        working=make_console().status,
    )
    if options.json:
        print(json.dumps(result))
