"""Several adapters of one config as one tree, which `jax.vmap` trains at once and a bank serves."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from lora_jax.errors import UserError
from lora_jax.tree import check_adapters, check_same_structure, dotted, flatten, summarize


def stack(adapters: Sequence[Mapping]) -> dict:
    """Stack adapters of one config: every leaf gets a leading axis of members.

    Raises:
        UserError: no adapters, or adapters of different paths or shapes.

    Example:
        >>> lora.stack([adapters, adapters])["proj"]["lora_a"].shape
        (2, 4, 2)
    """
    if not adapters:
        raise UserError("stack: there are no adapters")
    for index, tree in enumerate(adapters):
        check_adapters(tree, "stack takes a list of adapters")
        check_same_structure(tree, adapters[0], f"adapters {index} differ from the first")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)


def unstack(adapters: Mapping) -> list[dict]:
    """Invert `stack`.

    Raises:
        UserError: leaves without one common leading axis.

    Example:
        >>> first, second = lora.unstack(lora.stack([adapters, adapters]))
        >>> first["proj"]["lora_a"].shape
        (4, 2)
    """
    check_adapters(adapters, "unstack takes stacked adapters")
    members = count_members(adapters)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], dict(adapters)) for i in range(members)]


def count_members(adapters: Mapping) -> int:
    """Return the size of the leading axis that all leaves have.

    Raises:
        UserError: as `unstack`.
    """
    counts = {tuple(leaf.shape[:1]) for leaf in jax.tree.leaves(adapters)}
    if len(counts) != 1 or counts == {()}:
        shapes = [f"{dotted(p)} {tuple(leaf.shape)}" for p, leaf in flatten(adapters).items()]
        raise UserError("stacked adapters have one leading axis, and these: " + summarize(shapes))
    return counts.pop()[0]
