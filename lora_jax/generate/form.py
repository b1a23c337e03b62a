"""The form of parameters that decodes fastest."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.common import Model
from lora_jax.tree import Path, flatten, stack_position, unflatten
from lora_jax.weights import Layered, LoraWeight, Transposed, layer_of


def for_decoding(model: Model, *, donate: bool = False) -> Model:
    """Return the model in the form that decodes fastest: each layer's weights in arrays of their
    own, and kernels as (out, in). They are a copy; with `donate`, the arrays of the argument are
    deleted one after the other, and the base is in memory once.
    """
    return model.replace(params=separate(model.params, donate=donate))


def separate(params: Mapping, *, donate: bool = False) -> dict:
    """Return parameters with each stacked leaf as a `Layered` and each plain kernel that no mesh
    splits as a `Transposed`; the other leaves are shared.

    With `donate`, each array is deleted once it is copied, so that the base is in memory once.

    Example:
        >>> from lora_jax.generate.form import separate
        >>> params = {"layers": {"proj": {"kernel": jnp.ones((3, 2, 4))}}}
        >>> kernel = separate(params)["layers"]["proj"]["kernel"]
        >>> kernel.shape, [layer.value.shape for layer in kernel.layers]
        ((3, 2, 4), [(4, 2), (4, 2), (4, 2)])
    """

    def form(path: Path, leaf: Any) -> Any:
        stacked, is_kernel = stack_position(path) is not None, path[-1] == "kernel"
        if isinstance(leaf, Layered) or not (stacked or is_kernel):
            return leaf
        leaf = jax.tree.map(jnp.asarray, leaf)
        parts = [layer_of(leaf, i) for i in range(leaf.shape[0])] if stacked else [leaf]
        parts = [_transposed(part) for part in parts] if is_kernel else parts
        if donate:
            jax.block_until_ready(parts)
            shared = set(map(id, jax.tree.leaves(parts)))
            for array in jax.tree.leaves(leaf):
                if id(array) not in shared:
                    array.delete()
        return Layered(tuple(parts)) if stacked else parts[0]

    return unflatten({path: form(path, leaf) for path, leaf in flatten(params).items()})


def _transposed(kernel: Any) -> Any:
    """Return a kernel with its plain matrix, if it has one, as a `Transposed`."""
    if isinstance(kernel, LoraWeight):
        return dataclasses.replace(kernel, base=_transposed(kernel.base))
    # Of a kernel that a mesh splits, the compiler chooses the order on each device.
    plain = isinstance(kernel, jax.Array) and kernel.ndim == 2 and len(kernel.devices()) == 1
    return Transposed(kernel.T) if plain else kernel
