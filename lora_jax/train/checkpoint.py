"""Checkpoints of a run: adapters, optimizer state and a JSON record, one Orbax item each, written
in the background.

    checkpoints/<step>/adapters    the adapter tree
    checkpoints/<step>/optimizer   the optimizer's arrays, by path
    checkpoints/<step>/record      step, resolved config, versions

Nothing of the base model is in them.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lora_jax.config import UserError

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save at INFO and WARNING

ITEMS = ("adapters", "optimizer", "record")


@contextlib.contextmanager
def open_checkpoints(directory: Path) -> Iterator[ocp.CheckpointManager]:
    """The manager of `directory`; leaving the block waits for saves that are under way."""
    options = ocp.CheckpointManagerOptions(create=True)
    with ocp.CheckpointManager(directory.absolute(), item_names=ITEMS, options=options) as manager:
        yield manager
        manager.wait_until_finished()


def save(
    manager: ocp.CheckpointManager,
    step: int,
    adapters: Any,
    opt_state: Any,
    record: Mapping[str, Any],
) -> None:
    """Start to write `step`; returns as soon as the arrays are copied.

    Raises:
        UserError: the files cannot be written.
    """
    arguments = ocp.args.Composite(
        adapters=ocp.args.StandardSave(adapters),
        optimizer=ocp.args.StandardSave(_by_path(opt_state)),
        record=ocp.args.JsonSave({"step": step, **record}),
    )
    try:
        manager.save(step, args=arguments)
    except OSError as error:
        raise UserError(
            f"the checkpoint of step {step} cannot be written to {manager.directory}: {error}"
        ) from error


def restore(
    directory: Path, adapters: Any, opt_state: Any = None, step: int | None = None
) -> tuple[Any, Any, dict]:
    """Adapters, optimizer state (if its structure is given) and record of a step, the latest if
    none is named.

    `adapters` and `opt_state` give structure, shapes, dtypes and shardings, as arrays or
    `jax.ShapeDtypeStruct`s.

    Raises:
        UserError: no checkpoint is there, or it cannot be read.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist: the run has no checkpoints")
    with open_checkpoints(directory) as manager:
        found = manager.latest_step() if step is None else step
        if found is None or found not in manager.all_steps():
            raise UserError(
                f"{directory} has no checkpoint{'' if step is None else f' of step {step}'}; it "
                f"has: {manager.all_steps()}"
            )
        wanted = {"adapters": ocp.args.StandardRestore(adapters), "record": ocp.args.JsonRestore()}
        if opt_state is not None:
            wanted["optimizer"] = ocp.args.StandardRestore(_by_path(opt_state))
        try:
            items = manager.restore(found, args=ocp.args.Composite(**wanted))
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"checkpoint {directory / str(found)} cannot be read: {error}"
            ) from error
    if opt_state is not None:
        leaves = items["optimizer"]
        opt_state = jax.tree.unflatten(
            jax.tree.structure(opt_state), [leaves[name] for name in _by_path(opt_state)]
        )
    return items["adapters"], opt_state, items["record"]


def _by_path(opt_state: Any) -> dict[str, Any]:
    """Array leaves under readable names; optax's wrappers have no content of their own."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
    }
