"""Preview of what a config trains, from shapes and the first rows of its data: no weights, no
tokenizer, nothing written.
"""

import math
from collections.abc import Sequence

from lora_jax import adapters as methods
from lora_jax import formats, sharding, tree
from lora_jax.config import Config
from lora_jax.report.console import share
from lora_jax.targets import Target
from lora_jax.train import directory, first_rows, warn
from lora_jax.train.model import describe
from lora_jax.train.setup import check_settings, continue_adapter, find_trainable


def print_preview(config: Config) -> None:
    """Print a row per target (layers that agree share one), the totals, and what the data are.

    Raises:
        UserError: what a run would refuse, as far as config, model and the first rows tell.
    """
    mesh = sharding.abstract_mesh(config.mesh)
    check_settings(config, mesh)
    in_use = directory.preview(config)
    config, model = describe(config, formats.resolve(config.model, weights=False))
    for note in model.notes:
        print(f"note: {note}")
    if config.adapter.path is not None:
        config, _ = continue_adapter(config, model)
    found = find_trainable(config, model)
    shapes = methods.shapes(model.params, config.adapter)
    specs = tree.flatten(sharding.adapter_specs(shapes, model.params, model.rules, mesh))
    rows = [
        (
            "module",
            "shape (in, out)",
            "rank",
            "alpha",
            "scale",
            "parameters",
            f"partition of {'; '.join(found.targets[0].factors)}" if found.targets else "partition",
        )
    ]
    for target in found.targets:
        partition = "; ".join(str(specs[(*target.path, part)]) for part in target.factors)
        scales = target.scales(config.adapter.use_rslora).reshape(-1)
        for (rank, alpha), layers in group_slices(target).items():
            ranks = (rank,) * len(layers)
            count = sum(target.numbers(part, ranks) for part in target.factors)
            name = layer_range(target, layers)
            rows.append(
                (
                    name,
                    str(target.shape),
                    str(rank),
                    f"{alpha:g}",
                    f"{scales[layers[0]]:g}",
                    f"{count:,}",
                    partition,
                )
            )
    for part in (*found.whole, *found.rows):
        name = tree.dotted(part.path[:-1])
        shape = part.shape[-2:]
        spec = str(specs[part.trained])
        rows.append((name, str(tuple(shape)), "", "", "", f"{part.parameters:,}", spec))
    for name, shape in found.virtual.items():
        rows.append((name, str(shape), "", "", "", f"{math.prod(shape):,}", str(specs[(name,)])))
    if mesh.size == 1:  # nothing to split
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )
    trainable, frozen = found.parameters, tree.count(model.params)
    frozen = 0 if config.adapter.method == "full" else frozen
    print(
        f"\n{trainable:,} trainable parameters || {frozen:,} frozen || "
        f"{100 * share(trainable, frozen):.4f} % trainable || "
        f"adapter {4 * found.exported:,} bytes in float32\nmesh: "
        + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    )
    for line in first_rows.check(config, bool(model.labels)):
        print(line)
    for warning in warn.of_config(config):
        print(f"warning: {warning}")
    if in_use is not None:
        print(f"warning: a run would be refused: {in_use}")


def group_slices(target: Target) -> dict[tuple[int, float], list[int]]:
    """Slices of a target by their (rank, alpha); those that are not adapted are left out."""
    groups: dict[tuple[int, float], list[int]] = {}
    for i, pair in enumerate(zip(target.ranks, target.alphas, strict=True)):
        if pair[0]:
            groups.setdefault(pair, []).append(i)
    return groups


def layer_range(target: Target, layers: Sequence[int]) -> str:
    """`model.layers.{0-3,7}.self_attn.q_proj` for slices of a stack; the plain path for a single
    matrix.
    """
    if not target.stacked:
        return target.names[0]
    runs: list[list[int]] = []
    for i in layers:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    position = tree.stack_position((*target.path, target.leaf))
    return tree.dotted(
        (
            *target.path[:position],
            f"{{{text}}}" if len(layers) > 1 else text,
            *target.path[position:],
        )
    )
