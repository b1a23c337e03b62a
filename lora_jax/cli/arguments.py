"""Options that several subcommands share, and the types of their values."""

import argparse
import json
from collections.abc import Sequence

from lora_jax import config as configs
from lora_jax.errors import UserError


def add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--config", required=required, metavar="FILE", help="YAML file with the settings of the run"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="override of a setting, such as train.steps=10",
    )


def add_allow_change(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        choices=configs.PRINTS[:3],
        help="accept that this part differs from the one that the adapter was trained with; may be "
        "given several times",
    )


def add_ignore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-config-fields",
        nargs="+",
        default=[],
        metavar="NAME",
        help="fields of config.json to ignore, as with ignore_config_fields in training",
    )


def add_dtypes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compute-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of activations and of the cache (default: float32)",
    )
    parser.add_argument(
        "--base-dtype",
        choices=("float32", "bfloat16", "int8", "nf4"),
        help="dtype of the weights, like base_dtype in training (default: that of the files)",
    )


def add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="print the traceback of an error")


def split_numbers(option: str, texts: Sequence[str]) -> tuple[list[float], list[str]]:
    """Return the numbers of an option, and the overrides of settings that follow them.

    Raises:
        UserError: anything else.
    """
    overrides = [text for text in texts if "=" in text]
    try:
        return [float(text) for text in texts if "=" not in text], overrides
    except ValueError as error:
        raise UserError(f"{option} needs numbers, not {' '.join(texts)}") from error


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def positive(text: str) -> int:
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def seed(text: str) -> int:
    value = whole(text)
    if not 0 <= value <= configs.LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{value} must be from 0 to {configs.LARGEST_SEED}")
    return value


def not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} must not be negative")
    return value


def share(text: str) -> float:
    value = not_negative(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} must be above 0 and at most 1")
    return value


def part(text: str) -> float:
    value = not_negative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{value} must be from 0 to 1")
    return value


def factor(text: str) -> float:
    value = not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{value} must be above 0")
    return value


def json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no object, as {{"enable_thinking": false}}')
    return value
