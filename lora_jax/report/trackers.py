"""Trackers of metrics: TensorBoard, Weights & Biases, Trackio."""

import contextlib
import dataclasses
import importlib
import importlib.util
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax import hosts
from lora_jax.config import Config
from lora_jax.errors import UserError

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_FLUSH = 5  # seconds between writes to TensorBoard
Tracker = Callable[[int, Mapping[str, float]], None]  # step, values by name


def check_trackers(names: Sequence[str]) -> None:
    """Raise if a package that `train.report_to` needs is not installed."""
    missing = [name for name in names if importlib.util.find_spec(_PACKAGES[name]) is None]
    if missing:
        raise UserError(
            f"train.report_to={list(names)} needs packages that are not installed; "
            + "; ".join(f"pip install 'lora_jax[{name}]'" for name in missing)
        )


@contextlib.contextmanager
def open_trackers(config: Config, output: Path, first_step: int) -> Iterator[list[Tracker]]:
    """Open one function per name of `train.report_to`, on the main host.

    A resumed run is the same run to every tracker. TensorBoard and W&B replace the values from
    `first_step` on, the first step that will be sent; Trackio keeps both.

    Raises:
        UserError: a tracker cannot be started, for example without a login.
    """
    names, own = config.train.report_to if hosts.is_main() else [], ""
    if any(name != "tensorboard" for name in names):
        own = _run_id(output, first_step)
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []
        for name in names:
            package = importlib.import_module(_PACKAGES[name])
            if name == "tensorboard":
                trackers.append(_open_tensorboard(package, stack, output, first_step))
            else:
                trackers.append(_open_tracker(name, package, stack, config, output, own))
        yield trackers


def _open_tensorboard(
    package: Any, stack: contextlib.ExitStack, output: Path, first_step: int
) -> Tracker:
    writer = package.SummaryWriter(
        str(output / "tensorboard"), purge_step=first_step, flush_secs=_FLUSH
    )
    stack.callback(writer.close)

    def send(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return send


def _open_tracker(
    name: str, package: Any, stack: contextlib.ExitStack, config: Config, output: Path, own: str
) -> Tracker:
    options = {"project": "lora_jax", "config": dataclasses.asdict(config), "resume": "allow"}
    title = output.resolve().name
    try:
        if name == "wandb":
            run = stack.enter_context(package.init(id=own, name=title, dir=output, **options))
        else:  # Trackio identifies a run by its name
            run = package.init(name=own, **options)
            stack.callback(package.finish)
    except Exception as error:  # no login, no network: many exception types
        raise UserError(
            f"train.report_to: {name} cannot be started: {error}. Set it up, or leave it out"
        ) from error
    return lambda step, numbers: run.log(dict(numbers), step=step)


def _run_id(output: Path, first_step: int) -> str:
    """Return the ID in run_id.txt, by which W&B and Trackio identify the run; a new run gets a new
    one.
    """
    file = output / "run_id.txt"
    if first_step <= 1 or not file.is_file():
        title = re.sub(r"[^\w.-]+", "_", output.resolve().name)
        file.write_text(f"{title}-{secrets.token_hex(4)}", encoding="utf-8")
    return file.read_text(encoding="utf-8")
