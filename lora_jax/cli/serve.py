"""`lora-jax serve`."""

import argparse
import importlib.util

from lora_jax.cli import arguments
from lora_jax.errors import UserError

HELP = "answer HTTP requests with a model and many adapters, by the protocol of OpenAI"
EPILOG = """examples:
  lora-jax serve --model demo:smollm2-135m-instruct --adapter-root runs
  lora-jax serve --model org/name --adapter-root adapters --max-loras 16 --max-lora-rank 32
  LORA_JAX_ADMIN_KEY=secret lora-jax serve --model org/name --adapter-root adapters

  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
      -d '{"model": "quickstart", "messages": [{"role": "user", "content": "Hello"}]}'

The name of a model is that of the base, of a directory below --adapter-root, or a weighted sum such
as a*0.7+b*0.3. http://127.0.0.1:8000/ is a page to try prompts. Adapters are read when they are
asked for; with --admin-key they are loaded, replaced and unloaded by name while the server runs.

Every program is compiled before the first answer; /health answers 503 until then. SIGTERM lets
running requests end. The server needs: pip install 'lora_jax[serve]'
"""
NEEDED = ("starlette", "uvicorn", "msgspec", "sse_starlette", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="model directory, .gguf file, org/name on the hub, or demo:NAME",
    )
    parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="name of the base for clients (default: its name on the hub, or of its directory)",
    )
    _add_adapters(parser)
    _add_engine(parser)
    _add_http(parser)
    arguments.add_allow_change(parser)
    arguments.add_ignore(parser)
    arguments.add_verbose(parser)
    parser.set_defaults(function=run)


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter-root",
        metavar="DIR",
        help="directory with a PEFT adapter, or a run with one, in each directory below it",
    )
    parser.add_argument(
        "--max-loras",
        type=arguments.positive,
        default=8,
        metavar="N",
        help="adapters on the device at once (default: 8); more take turns",
    )
    parser.add_argument(
        "--max-lora-rank",
        type=arguments.positive,
        default=16,
        metavar="R",
        help="largest rank of an adapter (default: 16); every slot takes memory for it",
    )
    parser.add_argument(
        "--max-cpu-loras",
        type=arguments.positive,
        default=64,
        metavar="N",
        help="adapters in host memory (default: 64); others are read again from disk",
    )
    parser.add_argument(
        "--host-memory-gib",
        type=arguments.factor,
        default=8.0,
        metavar="GIB",
        help="bytes of these adapters, at most (default: 8)",
    )
    parser.add_argument(
        "--enable-dora",
        action="store_true",
        help="serve adapters of DoRA too; their gains take memory, and a little time of every row",
    )
    parser.add_argument(
        "--max-virtual-tokens",
        type=arguments.whole,
        default=0,
        metavar="N",
        help="serve adapters of prompt and prefix tuning with up to N virtual tokens (default: 0)",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-num-seqs",
        type=arguments.positive,
        default=8,
        metavar="B",
        help="texts in one batch (default: 8)",
    )
    parser.add_argument(
        "--max-model-len",
        type=arguments.positive,
        metavar="L",
        help="tokens of a prompt with its answer (default: those of the model, 4096 at most)",
    )
    arguments.add_dtypes(parser)


def _add_http(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine only; 0.0.0.0: all)",
    )
    parser.add_argument(
        "--port", type=arguments.positive, default=8000, help="port (default: 8000)"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="key that clients need (default: LORA_JAX_API_KEY of the environment, or none)",
    )
    parser.add_argument(
        "--admin-key",
        metavar="KEY",
        help="key that loads and unloads adapters (default: LORA_JAX_ADMIN_KEY, or nobody can)",
    )
    parser.add_argument(
        "--max-queue",
        type=arguments.positive,
        default=256,
        metavar="N",
        help="requests that may wait; more are refused with 429 (default: 256)",
    )
    parser.add_argument(
        "--timeout",
        type=arguments.factor,
        default=600.0,
        metavar="SECONDS",
        help="time that a request may take (default: 600)",
    )
    parser.add_argument(
        "--drain-timeout",
        type=arguments.factor,
        default=60.0,
        metavar="SECONDS",
        help="time that running requests have to end after SIGTERM (default: 60)",
    )


def run(options: argparse.Namespace) -> None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"the server needs {', '.join(missing)}: pip install 'lora_jax[serve]', or, in a "
            "checkout, pip install -e '.[serve]'"
        )
    from lora_jax.serve import command

    command.run(options)
