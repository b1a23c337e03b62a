"""`lora-jax export`."""

import argparse
import sys
from pathlib import Path

from lora_jax.cli import arguments
from lora_jax.errors import UserError

HELP = "write the result of a run as a PEFT adapter, a merged model, or for llama.cpp"
EPILOG = """examples:
  lora-jax export --run runs/quickstart --format peft --output my-adapter
  lora-jax export --run runs/quickstart --format hf --output my-model
  lora-jax export --run runs/quickstart --format hf --output my-model export.dtype=bfloat16
  lora-jax export --run runs/qlora --format hf --output my-model export.quantized_base=dequantized
  lora-jax export --run runs/old --format peft --output my-adapter --allow-change base
  lora-jax export --run runs/quickstart --format peft --profile vllm --output my-adapter
  lora-jax export --run runs/quickstart --format peft --output my-adapter --push-to-hub me/mine
  lora-jax export --run runs/quickstart --format gguf --output my-adapter
  lora-jax export --run runs/quickstart --format gguf --merged --output my-model
  lora-jax export --run runs/quickstart --format peft --output my-adapter --scale 0.8

peft  an adapter directory for PEFT, vLLM and others. --profile vllm folds rank and alpha patterns,
      which SGLang and older versions of vLLM do not read, into the weights, and refuses what vLLM
      does not load, such as DoRA.
hf    the base model with the adapter merged in, for transformers, with a report on what rounding
      lost; export.min_merge_cosine and export.max_merge_kl refuse a merge that loses too much.
gguf  adapter.gguf for llama.cpp, over the GGUF file of the base, and a Modelfile for Ollama. With
      --merged model.gguf, the merged model with its tokenizer and chat template, in float32 or
      export.dtype. For llama, mistral and gemma3_text.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="DIR", help="output directory of the run")
    parser.add_argument(
        "--format",
        required=True,
        choices=("peft", "hf", "gguf"),
        help="peft writes an adapter directory, hf a merged model, gguf files for llama.cpp",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="directory to write; must be empty or absent"
    )
    parser.add_argument(
        "--merged", action="store_true", help="write a merged model; with --format gguf"
    )
    parser.add_argument(
        "--profile", choices=("vllm",), help="write a PEFT directory that this server can load"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="multiply the update by this (default: 1); `lora-jax eval --scale` compares some",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="upload the result to this repository of the Hugging Face hub",
    )
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="create the repository as private (default); an existing one is not changed",
    )
    parser.add_argument("--commit-message", metavar="TEXT", help="commit message of the upload")
    arguments.add_allow_change(parser)
    arguments.add_verbose(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="export.key=value",
        help="override of an export setting of the run",
    )
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> None:
    from lora_jax.formats import push
    from lora_jax.report.console import make_console
    from lora_jax.train.export import Variant, export_run

    run, output, console = Path(options.run), Path(options.output), make_console()
    allowed, overrides = options.allow_change, options.overrides
    if options.push_to_hub is not None:
        push.check_repository(options.push_to_hub)
    export_run(
        run,
        _kind(options.format, options.merged),
        output,
        console,
        allowed,
        overrides,
        Variant(options.profile, options.scale),
    )
    print(f"written to {options.output}")
    if options.push_to_hub is not None:
        message = options.commit_message or f"Upload {run.resolve().name} by lora_jax"
        print(f"uploading to {options.push_to_hub}", file=sys.stderr)
        address = push.push(output, options.push_to_hub, options.private, message)
        print(f"uploaded to {address}")


def _kind(form: str, merged: bool) -> str:
    """Return the kind of the export that the options name.

    Raises:
        UserError: --merged with a format that has one kind only.
    """
    if merged and form == "peft":
        raise UserError("--merged is for --format gguf; --format hf writes a merged model")
    return "gguf-merged" if merged and form == "gguf" else form
