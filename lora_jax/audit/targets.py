"""Preview of what a config trains, from shapes and the first rows of its data: no weights, no
tokenizer, nothing written.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_jax import adapters as methods
from lora_jax import sharding, tree
from lora_jax.config import Config
from lora_jax.report.console import share
from lora_jax.session import Session, continue_adapter, open_session
from lora_jax.targets import Target
from lora_jax.train import directory, first_rows, warn
from lora_jax.train.setup import check_settings, check_training

_Row = tuple[str, ...]
_HEADER = ("module", "shape (in, out)", "rank", "alpha", "scale", "parameters")


def print_preview(config: Config) -> None:
    """Print a row per target (layers that agree share one), the totals, and the data.

    Raises:
        UserError: mistakes that a run would refuse, as far as config, model and the first rows
            show them.
    """
    mesh = sharding.abstract_mesh(config.mesh)
    check_settings(config, mesh)
    in_use = directory.find_refusal(config)
    session = open_session(config, weights=False)
    for note in session.model.notes:
        print(f"note: {note}")
    session = continue_adapter(session)
    check_training(session)
    model, config = session.model, session.config
    shapes = methods.shapes(model.params, session.trainable)
    specs = tree.flatten(sharding.adapter_specs(shapes, model.params, model.rules, mesh))
    targets = session.trainable.targets
    factors = "; ".join(targets[0].factors if targets else ())
    header = (*_HEADER, f"partition of {factors}" if factors else "partition")
    rows = [header, *_target_rows(session, specs), *_other_rows(session, specs)]
    _print_table([row[:-1] for row in rows] if mesh.size == 1 else rows)
    trainable, frozen = session.trainable, session.frozen
    print(
        f"\n{trainable.parameters:,} trainable parameters || {frozen:,} frozen || "
        f"{100 * share(trainable.parameters, frozen):.4f} % trainable || "
        f"adapter {4 * trainable.exported:,} bytes in float32\nmesh: "
        + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    )
    for line in first_rows.preview_sources(config, bool(model.labels)):
        print(line)
    for warning in warn.of_config(config):
        print(f"warning: {warning}")
    if in_use is not None:
        print(f"warning: a run would be refused: {in_use}")


def _target_rows(session: Session, specs: Mapping[tree.Path, Any]) -> Iterator[_Row]:
    """Yield a row per target and group of layers with the same rank and alpha."""
    for target in session.trainable.targets:
        partition = "; ".join(str(specs[(*target.path, part)]) for part in target.factors)
        scales = target.scales(session.config.adapter.use_rslora).reshape(-1)
        for (rank, alpha), layers in group_slices(target).items():
            ranks = (rank,) * len(layers)
            count = sum(target.numbers(part, ranks) for part in target.factors)
            yield (
                layer_range(target, layers),
                str(target.shape),
                str(rank),
                f"{alpha:g}",
                f"{scales[layers[0]]:g}",
                f"{count:,}",
                partition,
            )


def _other_rows(session: Session, specs: Mapping[tree.Path, Any]) -> Iterator[_Row]:
    """Yield a row per weight that trains in full or by rows, and per leaf of virtual tokens."""
    trainable = session.trainable
    for part in (*trainable.whole, *trainable.rows):
        name = tree.dotted(part.path[:-1])
        shape = part.shape[-2:]
        spec = str(specs[part.trained])
        yield (name, str(tuple(shape)), "", "", "", f"{part.parameters:,}", spec)
    for name, shape in trainable.virtual.items():
        yield (name, str(shape), "", "", "", f"{math.prod(shape):,}", str(specs[(name,)]))


def _print_table(rows: Sequence[_Row]) -> None:
    """Print rows with their columns aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def group_slices(target: Target) -> dict[tuple[int, float], list[int]]:
    """Return the slices of a target by (rank, alpha), without those that are not adapted."""
    groups: dict[tuple[int, float], list[int]] = {}
    for i, pair in enumerate(zip(target.ranks, target.alphas, strict=True)):
        if pair[0]:
            groups.setdefault(pair, []).append(i)
    return groups


def layer_range(target: Target, layers: Sequence[int]) -> str:
    """Return a name such as `model.layers.{0-3,7}.self_attn.q_proj` for slices of a stack, and the
    plain path for a single matrix.
    """
    if not target.stacked:
        return target.names[0]
    path = (*target.path, target.leaf)
    position, own = tree.stack_position(path), tree.stack_layers(path)
    numbers = layers if own is None else [own[i] for i in layers]
    text = tree.ranges(numbers)
    text = f"{{{text}}}" if len(layers) > 1 else text
    rest = target.path[position:] if own is None else target.path[position:][1:]
    return tree.dotted((*target.path[:position], text, *rest))
