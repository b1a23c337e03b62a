"""`lora-jax generate`."""

import argparse

from lora_jax.cli import arguments

HELP = "text from a model, with or without an adapter"
EPILOG = """examples:
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="a model directory, a .gguf file, org/name, or demo:NAME"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="a PEFT adapter directory, such as OUTPUT_DIR/adapter"
    )
    _add_prompts(parser)
    _add_template(parser)
    _add_sampling(parser)
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--base-dtype",
        choices=("float32", "bfloat16", "int8", "nf4"),
        help="of the frozen weights, as base_dtype in training (default: as in the files)",
    )
    arguments.add_ignore(parser)
    arguments.add_allow_change(parser)
    arguments.add_verbose(parser)
    parser.set_defaults(function=run)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which prompts are answered."""
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
        type=arguments.positive,
        default=16,
        metavar="N",
        help="prompts that are answered together (default: 16)",
    )


def _add_template(parser: argparse.ArgumentParser) -> None:
    """Add the options of the text around a prompt."""
    parser.add_argument("--system-prompt", metavar="TEXT", help="the system turn, as in training")
    parser.add_argument(
        "--chat-template",
        metavar="FILE|none",
        help="as data.chat_template in training; the adapter's own comes first",
    )
    parser.add_argument(
        "--chat-template-kwargs",
        type=arguments.json_object,
        metavar="JSON",
        help="as data.chat_template_kwargs in training (default: those of the adapter)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of an answer's tokens."""
    parser.add_argument(
        "--max-new-tokens", type=arguments.positive, default=200, metavar="N", help="(default: 200)"
    )
    parser.add_argument(
        "--temperature", type=arguments.not_negative, default=0.0, help="0 is greedy (default: 0)"
    )
    parser.add_argument(
        "--top-p",
        type=arguments.share,
        default=1.0,
        metavar="P",
        help="draw from the fewest tokens whose probabilities reach P (default: 1, from all)",
    )
    parser.add_argument(
        "--top-k", type=arguments.positive, metavar="K", help="draw from the K likeliest tokens"
    )
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, help="of the sampling (default: 0)"
    )


def run(options: argparse.Namespace) -> None:
    from lora_jax.generate import command

    command.run(options)
