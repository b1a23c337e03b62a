"""`lora-jax generate`."""

import argparse

from lora_jax.cli import arguments

HELP = "generate text with a model, with or without an adapter"
EPILOG = """examples:
  lora-jax generate --model org/name --prompt "Hello"
  lora-jax generate --model demo:smollm2-135m-instruct --adapter runs/quickstart/adapter \\
      --system-prompt "Parse address as JSON." --prompt "71 S. Wacker Drive, Chicago, IL 60606"
  lora-jax generate --model org/name --prompts questions.txt --output answers.jsonl
  head rows.jsonl | lora-jax generate --model org/name --prompts - > answers.jsonl
  lora-jax generate --model org/name --chat --temperature 0.7 --top-p 0.9

Answers go to stdout, prompts to stderr. With --prompts, answers to a file or a pipe are JSON
lines with prompt, answer, finish_reason and tokens. finish_reason is stop, or length for an answer
that --max-new-tokens cut off.

A row of --prompts is {"prompt": ..}, {"messages": [..]} or another form of a training row; its
answer is ignored. An answer depends on --seed and on the position of its prompt, not on the other
prompts. In --chat, /reset starts a new conversation, /quit or Ctrl-D ends it, and Ctrl-C stops an
answer.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="model directory, .gguf file, org/name on the hub, or demo:NAME",
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="PEFT adapter directory, such as OUTPUT_DIR/adapter"
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--prompt", action="append", help="prompt to answer; may be given several times"
    )
    asked.add_argument(
        "--prompts",
        metavar="FILE",
        help=".txt file with a prompt per line, .jsonl, .csv or other file of rows, or - for stdin",
    )
    asked.add_argument("--chat", action="store_true", help="chat on the terminal")
    parser.add_argument(
        "--prompt-format",
        metavar="TEXT",
        help="user turn made from columns of --prompts, such as '{question}', like data.prompt in "
        "training",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write the answers to this file, as lines of JSON (.jsonl)"
    )
    parser.add_argument(
        "--batch-size",
        type=arguments.positive,
        default=16,
        metavar="N",
        help="prompts that are answered at once (default: 16)",
    )
    _add_rendering(parser)
    _add_sampling(parser)
    arguments.add_dtypes(parser)
    arguments.add_ignore(parser)
    arguments.add_allow_change(parser)
    arguments.add_verbose(parser)
    parser.set_defaults(function=run)


def _add_rendering(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--system-prompt", metavar="TEXT", help="system turn; use the one from training"
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE|none",
        help="chat template, like data.chat_template in training (default: that of the adapter, or "
        "else of the model)",
    )
    parser.add_argument(
        "--chat-template-kwargs",
        type=arguments.json_object,
        metavar="JSON",
        help="arguments of the chat template, like data.chat_template_kwargs in training (default: "
        "those of the adapter)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens",
        type=arguments.positive,
        default=200,
        metavar="N",
        help="maximum number of tokens of an answer (default: 200)",
    )
    parser.add_argument(
        "--temperature",
        type=arguments.not_negative,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 is greedy decoding (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=arguments.share,
        default=1.0,
        metavar="P",
        help="sample from the fewest most likely tokens with total probability P (default: 1, all)",
    )
    parser.add_argument(
        "--top-k",
        type=arguments.positive,
        metavar="K",
        help="sample from the K most likely tokens (default: all)",
    )
    parser.add_argument(
        "--min-p",
        type=arguments.part,
        default=0.0,
        metavar="P",
        help="sample from tokens at least P times as likely as the most likely one (default: 0, "
        "all)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=arguments.factor,
        default=1.0,
        metavar="F",
        help="above 1: tokens of the prompt and the answer so far become less likely (default: 1)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end an answer before this text; may be given several times",
    )
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, metavar="N", help="seed of sampling (default: 0)"
    )


def run(options: argparse.Namespace) -> None:
    from lora_jax.generate import command

    command.run(options)
