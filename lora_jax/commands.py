"""The subcommands: of each its options, and what it does with them. What takes seconds to import is
imported there.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_jax import config as configs
from lora_jax.config import UserError

_TRAIN_HELP = """examples:
  python train.py --config configs/quickstart.yaml
  python train.py --config configs/quickstart.yaml adapter.rank=8 output_dir=runs/r8
  python train.py --config configs/quickstart.yaml model=org/name data.train=rows.jsonl mesh.fsdp=4
  python train.py --config configs/quickstart.yaml --dry-run

  python train.py --config configs/quickstart.yaml resume=auto train.save_every=20

Any setting of the YAML file can be overridden as key.sub=value; docs/configuration.md lists them
all, and so does `python -m lora_jax.reference`. Rows are {"prompt": .., "completion": ..},
{"messages": [..]} and others, in .jsonl, .csv, .parquet or on the hub. SIGTERM, SIGHUP and Ctrl-C
end a run with a checkpoint, and resume=true goes on from it.
"""
_EVAL_HELP = """examples:
  lora-jax eval --config configs/quickstart.yaml --adapter runs/quickstart/adapter
  lora-jax eval --config runs/a/config.yaml --adapter runs/a/adapter --adapter runs/b/adapter
  lora-jax eval --config configs/e2e.yaml data.eval=mine.jsonl eval.metrics=[bleu,rouge_l]
  lora-jax eval --config runs/a/config.yaml --adapter runs/a/adapter --predictions answers.jsonl

One table: held-out losses and the metrics of greedy answers, for the base and for every adapter.
The config says which model, which data (data.eval, data.regression) and which metrics.
"""
_INSPECT_HELP = """examples:
  lora-jax inspect --config configs/quickstart.yaml
  lora-jax inspect --config configs/quickstart.yaml data.max_length=256 --examples 1
  lora-jax inspect --config configs/e2e.yaml data.train=mine.jsonl --plot lengths.png

What a run would train on: examples as the model sees them, lengths, drops, overlaps, packing.
Supervised text is green, or between « and » where nothing can be coloured. No weights are loaded;
of a stream only the first data.stream_rows records are read.
"""
_PLAN_HELP = """examples:
  lora-jax plan --config configs/quickstart.yaml
  lora-jax plan --config configs/quickstart.yaml --topology v5e:2x2 mesh.fsdp=4
  lora-jax plan --config configs/quickstart.yaml --topology v5e:4x4 --search
  lora-jax plan --parameters 70e9

Does it fit? Memory from shapes, at once; then the train step compiled, for the devices here or for
a TPU slice that need not be (pip install 'lora_jax[plan]'). No weights, no data. docs/plan.md
"""
_EXPORT_HELP = """examples:
  lora-jax export --run runs/quickstart --format peft --output my-adapter
  lora-jax export --run runs/quickstart --format hf --output my-model
  lora-jax export --run runs/quickstart --format hf --output my-model export.dtype=bfloat16
  lora-jax export --run runs/qlora --format hf --output my-model export.quantized_base=dequantized
  lora-jax export --run runs/old --format peft --output my-adapter --allow-change base
  lora-jax export --run runs/quickstart --format peft --profile vllm --output my-adapter
  lora-jax export --run runs/quickstart --format peft --output my-adapter --push-to-hub me/mine

peft: an adapter directory for PEFT, vLLM and others. vLLM reads no rank and alpha patterns and no
DoRA: --profile vllm folds the former in and refuses the latter.
hf: the base with the adapter merged in, for transformers, and a report on what the merge kept;
export.min_merge_cosine and export.max_merge_kl refuse a bad one.
"""
_COMBINE_HELP = """examples:
  lora-jax combine --model org/name --adapter runs/a/adapter=0.7 --adapter runs/b/adapter=0.3 \\
      --output both                                       # exact: ranks add up
  lora-jax combine --model org/name --adapter runs/a/adapter --adapter runs/b/adapter=-1 \\
      --output a-without-b
  lora-jax combine --model org/name --adapter runs/a/adapter --rank 4 --output smaller
  lora-jax combine --model org/name --adapter runs/a/adapter --adapter runs/b/adapter \\
      --method ties --density 0.2 --rank 32 --output both
  lora-jax combine --model org/name --finetuned my-model --rank 64 --output as-adapter

Adapters of one base become one, a PEFT directory again. sum adds the updates weight * scale * A B
exactly, where adding A to A and B to B would not. svd is the nearest to it of a lower rank; ties
and dare thin the updates out before they are added (arXiv 2306.01708, 2311.03099) and need a rank
too, since what they make has full rank. What a rank loses is printed. docs/combine.md has more.
"""
_GENERATE_HELP = """examples:
  lora-jax generate --model org/name --prompt "Hello"
  lora-jax generate --model demo:smollm2-135m-instruct --adapter runs/quickstart/adapter \\
      --system-prompt "Parse address as JSON." --prompt "71 S. Wacker Drive, Chicago, IL 60606"
  lora-jax generate --model org/name --prompts questions.txt --output answers.jsonl
  head rows.jsonl | lora-jax generate --model org/name --prompts - > answers.jsonl
  lora-jax generate --model org/name --chat --temperature 0.7 --top-p 0.9

Answers go to stdout, prompts to stderr. With --prompts, into a file or a pipe, answers are lines
of JSON: prompt, answer, finish_reason (stop, or length: cut off at
--max-new-tokens) and tokens. A row is {"prompt": ..}, {"messages": [..]} or another form of a
training row, whose answer is not read. In a --chat, /reset starts a new conversation,
/quit or Ctrl-D ends it, and Ctrl-C stops an answer. An answer depends on --seed and the place of
its prompt, not on the other prompts.
"""
# Only the first process prints; to ask JAX which one that is takes seconds.
_RANKS = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID")


def add_train(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be trained, look at the first rows of the data, and stop",
    )
    _add_verbose(parser)
    parser.set_defaults(function=train)


def train(options: argparse.Namespace) -> None:
    config = configs.load(options.config, options.overrides)
    if options.dry_run:
        from lora_jax.train.dry_run import print_preview

        return print_preview(config)
    if not any(os.environ.get(name, "0") != "0" for name in _RANKS):
        print(
            f"starting {config.output_dir}: {config.model} on {config.data.train}",
            file=sys.stderr,
            flush=True,
        )
    from lora_jax.train.loop import run  # seconds of imports: after the config is known to be right

    run(config)


def add_eval(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR",
        help="a PEFT adapter directory; may be given several times",
    )
    parser.add_argument("--output", metavar="FILE", help="also write the table there, as JSON")
    parser.add_argument(
        "--predictions", metavar="FILE", help="write every answer there, one JSON object per line"
    )
    _add_allow_change(parser)
    _add_verbose(parser)
    parser.set_defaults(function=evaluate)


def evaluate(options: argparse.Namespace) -> None:
    config = configs.load(options.config, options.overrides)
    for name, file in (("--output", options.output), ("--predictions", options.predictions)):
        if file and not os.access(Path(file).parent, os.W_OK):
            raise UserError(f"{name} {file}: its directory is missing or not writable")
        if file and Path(file).is_dir():
            raise UserError(f"{name} {file} is a directory; give a file in it")
    if options.predictions and not config.eval.generate:
        raise UserError("--predictions writes answers, and eval.generate=false generates none")
    from rich.console import Console

    from lora_jax import hosts
    from lora_jax.train.compare import compare, print_table
    from lora_jax.train.metrics import make_console, to_text

    with hosts.joined(config.hosts):
        main = hosts.is_main()
        rows, lines = compare(config, options.adapter, make_console(not main), options.allow_change)
    if main:
        print_table(rows, Console())
    if main and options.output:
        text = json.dumps(rows, indent=2) + "\n"
        Path(options.output).write_text(text, encoding="utf-8")
    if main and options.predictions:
        Path(options.predictions).write_text(to_text(lines), encoding="utf-8")


def add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--examples",
        type=int,
        default=3,
        metavar="N",
        help="shown of every training source (default: 3)",
    )
    parser.add_argument("--plot", metavar="FILE", help="write histograms of the lengths there")
    _add_verbose(parser)
    parser.set_defaults(function=inspect)


def inspect(options: argparse.Namespace) -> None:
    config = configs.load(options.config, options.overrides)
    if options.plot and Path(options.plot).is_dir():
        raise UserError(f"--plot {options.plot} is a directory; give a file in it")
    from rich.console import Console

    from lora_jax.train import inspect as inspection
    from lora_jax.train.metrics import make_console

    report = inspection.inspect(config, make_console(), options.examples)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    inspection.print_report(report, console)
    if options.plot:
        inspection.plot(report, Path(options.plot))


def add_plan(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, required=False)
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
    _add_verbose(parser)
    parser.set_defaults(function=plan)


def plan(options: argparse.Namespace) -> None:
    if (options.config is None) == (options.parameters is None):
        raise UserError("plan needs either --config FILE or --parameters N")
    if options.topology is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"  # no device here is used, or held from others
    from lora_jax import plan as planning

    if options.parameters is not None:
        return planning.plan_parameters(options.parameters, options.json)
    from lora_jax.train.metrics import make_console

    result = planning.plan(
        configs.load(options.config, options.overrides),
        topology=options.topology,
        devices=options.devices,
        quick=options.quick,
        compiles=not options.no_compile,
        searches=options.search,
        say=(lambda text: None) if options.json else (lambda text: print(text, flush=True)),
        working=make_console().status,
    )
    if options.json:
        print(json.dumps(result))


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="DIR", help="the output directory of a run")
    parser.add_argument(
        "--format", required=True, choices=("peft", "hf"), help="adapter directory or merged model"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="where to write; must be empty or absent"
    )
    parser.add_argument(
        "--profile", choices=("vllm",), help="write a PEFT directory that this program can load"
    )
    parser.add_argument(
        "--push-to-hub", metavar="ORG/NAME", help="upload what was written to the Hugging Face hub"
    )
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make a new repository private; one that exists stays as it is (default: yes)",
    )
    parser.add_argument("--commit-message", metavar="TEXT", help="the message of the upload")
    _add_allow_change(parser)
    _add_verbose(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="export.key=value", help="settings of export for this time"
    )
    parser.set_defaults(function=export)


def export(options: argparse.Namespace) -> None:
    from lora_jax.formats import push
    from lora_jax.train.export import export_run
    from lora_jax.train.metrics import make_console

    run, output, console = Path(options.run), Path(options.output), make_console()
    allowed, overrides = options.allow_change, options.overrides
    if options.push_to_hub is not None:
        push.check_repository(options.push_to_hub)
    export_run(run, options.format, output, console, allowed, overrides, options.profile)
    print(f"written to {options.output}")
    if options.push_to_hub is not None:
        message = options.commit_message or f"Upload {run.resolve().name} by lora_jax"
        print(f"uploading to {options.push_to_hub}", file=sys.stderr)
        address = push.push(output, options.push_to_hub, options.private, message)
        print(f"uploaded to {address}")


def add_combine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="the base: a directory, a .gguf file, org/name, or demo:NAME"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--adapter",
        action="append",
        type=_weighted,
        metavar="DIR[=WEIGHT]",
        help="a PEFT adapter directory; may be given several times (default weight: 1)",
    )
    source.add_argument("--finetuned", metavar="MODEL", help="the base after full fine-tuning")
    parser.add_argument("--output", required=True, metavar="DIR", help="must be empty or absent")
    parser.add_argument(
        "--method",
        choices=("sum", "svd", "ties", "dare_linear", "dare_ties"),
        help="(default: sum, with --rank svd)",
    )
    parser.add_argument(
        "--rank", type=_positive, metavar="R", help="the most that a module gets (default: the sum)"
    )
    parser.add_argument(
        "--density", type=float, metavar="D", help="share of every update that ties and dare keep"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of what dare drops (default: 0)")
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="with --finetuned: what takes an adapter, as in training (default: all-linear)",
    )
    parser.add_argument(
        "--uncovered",
        choices=("refuse", "save", "drop"),
        help="with --finetuned: what else differs (norms, embeddings, biases) is an error, stored "
        "whole in the adapter, or left as in the base (default: refuse)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    _add_ignore(parser)
    _add_allow_change(parser)
    _add_verbose(parser)
    parser.set_defaults(function=combine)


def combine(options: argparse.Namespace) -> None:
    of_tuned = {"--target-modules": options.target_modules, "--uncovered": options.uncovered}
    of_adapters = {"--method": options.method, "--density": options.density}
    foreign, other = (of_adapters, "--adapter") if options.finetuned else (of_tuned, "--finetuned")
    configs.raise_all(
        [f"{name} goes with {other} only" for name, value in foreign.items() if value is not None]
    )
    if options.finetuned and options.rank is None:
        raise UserError("--finetuned needs --rank: the difference of two models has full rank")
    from lora_jax.combine import combine_directories, extract_directory

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
            method=options.method or ("sum" if options.rank is None else "svd"),
            rank=options.rank,
            density=options.density,
            seed=options.seed,
            allow_change=options.allow_change,
            ignore=options.ignore_config_fields,
        )
    if options.json:
        return print(json.dumps(report))
    low, high = report["ranks"]
    print(
        f"{options.output}: {report['parameters']:,} numbers, rank "
        + (str(high) if low == high else f"{low} to {high}")
    )
    if report["method"] != "sum":
        print(
            f"away from what was asked for, |made - meant| / |meant|: {report['error']:.2e} over "
            f"all modules, {report['worst_error']:.2e} in {report['worst_module']}"
        )


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="a model directory, a .gguf file, org/name, or demo:NAME"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="a PEFT adapter directory, such as OUTPUT_DIR/adapter"
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", help="a user turn; may be given several times")
    asked.add_argument(
        "--prompts",
        metavar="FILE",
        help="a .txt file with a prompt per line, a .jsonl, .csv or other file of rows, or - for "
        "stdin",
    )
    asked.add_argument("--chat", action="store_true", help="chat on the terminal")
    parser.add_argument(
        "--prompt-format",
        metavar="TEXT",
        help="the user turn from columns of --prompts, '{question}', as data.prompt in training",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write answers there, as lines of JSON (.jsonl)"
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=16,
        metavar="N",
        help="prompts that are answered together (default: 16)",
    )
    parser.add_argument("--system-prompt", metavar="TEXT", help="the system turn, as in training")
    parser.add_argument(
        "--chat-template",
        metavar="FILE|none",
        help="as data.chat_template in training; the adapter's own comes first",
    )
    parser.add_argument(
        "--chat-template-kwargs",
        type=_json_object,
        metavar="JSON",
        help="as data.chat_template_kwargs in training (default: those of the adapter)",
    )
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=200, metavar="N", help="(default: 200)"
    )
    parser.add_argument(
        "--temperature", type=_not_negative, default=0.0, help="0 is greedy (default: 0)"
    )
    parser.add_argument(
        "--top-p",
        type=_share,
        default=1.0,
        metavar="P",
        help="draw from the fewest tokens whose probabilities reach P (default: 1, from all)",
    )
    parser.add_argument(
        "--top-k", type=_positive, metavar="K", help="draw from the K likeliest tokens"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--base-dtype",
        choices=("float32", "bfloat16", "int8", "nf4"),
        help="of the frozen weights, as base_dtype in training (default: as in the files)",
    )
    _add_ignore(parser)
    _add_allow_change(parser)
    _add_verbose(parser)
    parser.set_defaults(function=generate)


def generate(options: argparse.Namespace) -> None:
    from lora_jax.generate import command

    command.run(options)


def _add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--config", required=required, metavar="FILE", help="the YAML file of the run"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="settings that replace those of the file",
    )


def _add_allow_change(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        choices=configs.PRINTS[:3],
        help="go on although this is not what the adapter was trained with",
    )


def _add_ignore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-config-fields",
        nargs="+",
        default=[],
        metavar="NAME",
        help="fields of config.json known not to matter, as ignore_config_fields in training",
    )


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no object, as {{"enable_thinking": false}}')
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _seed(text: str) -> int:
    value = _whole(text)
    if not 0 <= value <= configs.LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{value} must be from 0 to {configs.LARGEST_SEED}")
    return value


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} must not be negative")
    return value


def _share(text: str) -> float:
    value = _not_negative(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} must be above 0 and at most 1")
    return value


def _weighted(text: str) -> tuple[str, float]:
    """`DIR=WEIGHT`, or `DIR` with a weight of 1; the name of a directory may have `=` too."""
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


@dataclass(frozen=True)
class Command:
    """A subcommand: its line of help, the text below its options, the function that adds them."""

    help: str
    epilog: str
    add: Callable[[argparse.ArgumentParser], None]


COMMANDS = {
    "train": Command("fine-tune as a YAML file says", _TRAIN_HELP, add_train),
    "eval": Command("compare adapters with their base on held-out data", _EVAL_HELP, add_eval),
    "inspect": Command("what a run would train on, and how", _INSPECT_HELP, add_inspect),
    "plan": Command("whether a run fits its devices, and how fast", _PLAN_HELP, add_plan),
    "export": Command("write the result of a run for other tools", _EXPORT_HELP, add_export),
    "combine": Command(
        "adapters from adapters, or from a fine-tuned model", _COMBINE_HELP, add_combine
    ),
    "generate": Command(
        "text from a model, with or without an adapter", _GENERATE_HELP, add_generate
    ),
}
