"""A mesh over all devices, and path rules for the sharding of every parameter.

Axes: `data` (replicas), `fsdp` (weights and batch split), `tensor` (heads and hidden features
split). A rule is (regex for the dotted tree path, PartitionSpec of one slice); the `layers` axis of
stacked leaves is never split.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.config import MeshConfig
from lora_jax.errors import UserError, counted
from lora_jax.leaves import known_kind, weight_name
from lora_jax.tree import (
    Path,
    dotted,
    flatten,
    stack_position,
    summarize,
    tied_embedding,
    unflatten,
)

Rules = Sequence[tuple[str, Any]]  # (regex, PartitionSpec)
AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # rows of a batch


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh of all devices (or the given ones) with axes data, fsdp, tensor; an axis of -1
    takes the remaining devices.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = _fitting_sizes(config, len(devices))
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(config: MeshConfig, devices: int | None = None) -> AbstractMesh:
    """Return an abstract mesh, without devices, to plan for other machines. It has `devices`
    devices if given, else the product of the axes, where -1 takes those of this process.

    Raises:
        UserError: the axes do not multiply to `devices`.
    """
    sizes = (
        _axis_sizes(config, len(jax.devices()))
        if devices is None
        else _fitting_sizes(config, devices)
    )
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fitting_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    sizes = _axis_sizes(config, devices)
    if math.prod(sizes) != devices:
        raise UserError(
            f"mesh={dataclasses.asdict(config)} does not fit {counted(devices, 'device')}; "
            "the axes must multiply to their number, and -1 takes what is left"
        )
    return sizes


def _axis_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    sizes = dataclasses.astuple(config)
    left = max(1, devices // math.prod(size for size in sizes if size != -1))
    return tuple(left if size == -1 else size for size in sizes)


def check_batch(rows: int, mesh: Mesh | AbstractMesh, what: str) -> None:
    """Raise if `rows` cannot be split evenly over the data and fsdp axes."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise UserError(
            f"{what}={rows} rows cannot be split over {parts} devices (data={mesh.shape['data']} x "
            f"fsdp={mesh.shape['fsdp']}); use a multiple of {parts}"
        )


def check_length(tokens: int, mesh: Mesh | AbstractMesh, what: str) -> None:
    """Raise if rows of so many tokens cannot be split evenly over the tensor axis."""
    parts = mesh.shape["tensor"]
    if tokens % parts:
        raise UserError(
            f"{what}={tokens} tokens cannot be split over {parts} devices (tensor={parts}); use a "
            f"multiple of {parts}"
        )


def param_specs(params: Mapping, rules: Rules, mesh: Mesh | AbstractMesh) -> dict:
    """Return a PartitionSpec per parameter. A mesh axis that does not divide a dimension is left
    out for that leaf.

    Raises:
        UserError: parameters that no rule covers, all of them listed.
    """
    specs, uncovered = {}, []
    for path, leaf in flatten(params).items():
        spec = next((spec for rule, spec in rules if re.fullmatch(rule, dotted(path))), None)
        if spec is None:
            uncovered.append(dotted(path))
        else:
            stack = () if stack_position(path) is None else (None,)
            specs[path] = _fit(P(*stack, *spec), leaf.shape, mesh)
    if uncovered:
        raise UserError("no partition rule covers these parameters:\n  " + summarize(uncovered))
    return unflatten(specs)


def adapter_specs(
    adapters: Mapping, params: Mapping, rules: Rules, mesh: Mesh | AbstractMesh
) -> dict:
    """Return a PartitionSpec per trainable leaf: axes called `in` and `out` (`lora_jax.leaves`) are
    split like those of the base weight, the rank never. A fully trained weight is split like the
    frozen one, and a prefix like keys and values.
    """
    return _adapter_specs(adapters, params, flatten(param_specs(params, rules, mesh)), mesh)


def place_adapters(adapters: dict, params: Mapping) -> dict:
    """Put adapters on the mesh of `params`, split by `adapter_specs`. If `params` are plain arrays,
    adapters become plain arrays; if they are shapes, nothing happens.
    """
    arrays = _arrays(params)
    mesh = _mesh(arrays.values())
    if mesh is None:
        plain = any(isinstance(x, jax.Array) for x in arrays.values())
        return jax.tree.map(jnp.asarray, adapters) if plain else adapters
    weights = {path: x.sharding.spec if _is_placed(x) else P() for path, x in arrays.items()}
    specs = flatten(_adapter_specs(adapters, params, weights, mesh))
    short = unflatten({path: _shortened(spec, mesh) for path, spec in specs.items()})
    return jax.tree.map(_put_or_constrain, adapters, shardings(short, mesh))


def zeros_split_like(weight: Any, shape: Sequence[int], axes: Sequence[int | None]) -> jax.Array:
    """Return float32 zeros on the mesh of a weight. Each axis is split like the axis of the weight
    that `axes` names, or not at all.
    """
    first: Any = next(iter(jax.tree.leaves(weight)), None)
    if not _is_placed(first):
        return jnp.zeros(shape)
    mesh, known = first.sharding.mesh, first.sharding.spec
    of_weight = (*known, *(None,) * (len(weight.shape) - len(known)))
    spec = _fit(P(*(None if i is None else of_weight[i] for i in axes)), shape, mesh)
    return jnp.zeros(shape, device=NamedSharding(mesh, _shortened(spec, mesh)))


def _shortened(spec: P, mesh: Mesh) -> P:
    """Return the spec in the form that compiled programs return: without axes of one device and
    without `None` at the end. Another form of the same sharding would recompile.
    """
    axes = [None if axis is None or _size(axis, mesh) == 1 else axis for axis in spec]
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def place_state(state: Any, params: Mapping) -> Any:
    """Replicate the arrays of an optimizer's state that are on no mesh, such as step counts, over
    the mesh of `params`; do nothing if `params` are plain arrays.
    """
    mesh = _mesh(_arrays(params).values())

    if mesh is None:
        return state
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: x if _is_placed(x) else _put_or_constrain(x, everywhere), state)


def _arrays(params: Mapping) -> dict[Path, Any]:
    """Return the arrays of a tree by path; of a quantised weight, its first."""
    leaves = {path: jax.tree.leaves(leaf) for path, leaf in flatten(params).items()}
    return {path: parts[0] for path, parts in leaves.items() if parts}


def _is_placed(x: Any) -> bool:
    """Return True for an array on a mesh, which shapes and traced values are not."""
    known = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    return known and isinstance(x.sharding, NamedSharding)


def mesh_of(tree: Any) -> Mesh | None:
    """Return the mesh that arrays of a tree are on; None for arrays on no mesh."""
    return _mesh(jax.tree.leaves(tree))


def _mesh(arrays: Iterable[Any]) -> Any:
    """Return the mesh that some of the arrays are on, or None."""
    return next((x.sharding.mesh for x in arrays if _is_placed(x)), None)


def _put_or_constrain(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, Tracer):  # under `vmap` or `jit`
        return jax.lax.with_sharding_constraint(x, sharding)
    return _put(x, sharding)


def _adapter_specs(
    adapters: Mapping, params: Mapping, weights: Mapping[Path, P], mesh: Mesh | AbstractMesh
) -> dict:
    """Return a PartitionSpec per trainable leaf, from those of the weights."""
    leaves = flatten(params)
    axes = {
        path: (*spec, *(None,) * (len(leaves[path].shape) - len(spec)))
        for path, spec in weights.items()
    }
    if (tied := tied_embedding(params)) is not None:
        axes[("lm_head", "kernel")] = axes[tied][::-1]
    specs = {
        path: _fit(P(*_leaf_axes(path, axes)), leaf.shape, mesh)
        for path, leaf in flatten(adapters).items()
    }
    return unflatten(specs)


def _leaf_axes(path: Path, axes: Mapping[Path, tuple[Any, ...]]) -> tuple[Any, ...]:
    """Mesh axes of a trainable leaf, where `axes` are those of the weights."""
    module, kind = path[:-1], known_kind(path[-1])
    if kind.axes is None:
        return axes[(*module, weight_name(path[-1]))]
    if not module:
        return tuple(axis if axis in AXES else None for axis in kind.axes)
    homes = (module, module[:-1])  # a part of a fused projection is below its weight
    weight = next(
        (*home, leaf) for home in homes for leaf in ("kernel", "embedding") if (*home, leaf) in axes
    )
    *lead, rows, columns = axes[weight]
    of_base = {"in": rows, "out": columns}
    return (*lead, *(of_base.get(axis) for axis in kind.axes))


def _fit(spec: P, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    return P(
        *(
            axis if axis is None or n % _size(axis, mesh) == 0 else None
            for axis, n in zip(spec, shape, strict=False)
        )
    )


def _size(axis: Any, mesh: Mesh | AbstractMesh) -> int:
    """Return the number of devices along an axis of the mesh, or along several of them."""
    return math.prod(mesh.shape[name] for name in (axis if isinstance(axis, tuple) else (axis,)))


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Return NamedShardings for a tree of PartitionSpecs."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P)
    )


def place(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """Put a tree on the mesh. With several hosts, each passes the full tree and keeps its part."""
    return jax.tree.map(_put, tree, shardings(specs, mesh))


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    spread = not getattr(x, "is_fully_addressable", True)  # over several hosts already
    if spread and x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
    if spread or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    array = np.asarray(x)  # device_put would make the hosts compare their values
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def gather_to_host(x: Any) -> np.ndarray:
    """Return a full array in the memory of every host. For an array that is split over hosts, all
    must call this together.
    """
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def replicate_scalars(tree: Any, mesh: Mesh) -> Any:
    """Replicate the scalars of a tree (step counts) over the mesh; arrays are not moved."""
    return jax.tree.map(lambda x: x if x.ndim else _put(x, NamedSharding(mesh, P())), tree)


def host_memory(mesh: Mesh) -> str | None:
    """Return the kind of host memory that the devices of a mesh can compute from, or None."""
    kinds = [memory.kind for memory in mesh.devices.flat[0].addressable_memories()]
    return "pinned_host" if "pinned_host" in kinds else None


def to_host(x: jax.Array) -> jax.Array:
    """Move an array to host memory, with its sharding; scalars are not moved."""
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host")) if x.ndim else x


def on_device(x: jax.Array) -> jax.Array:
    """Invert `to_host`; arrays in other memory are not moved."""
    if x.sharding.memory_kind != "pinned_host":
        return x
    return jax.device_put(x, x.sharding.with_memory_kind("device"))


def local_rows(rows: int, mesh: Mesh) -> range:
    """Return the rows of a batch that are on devices of this process: all of them on one host.

    Hosts whose devices hold rows that are far apart also build those between.
    """
    placed = NamedSharding(mesh, BATCH).addressable_devices_indices_map((rows,)).values()
    bounds = [index[0].indices(rows) for index in placed if index is not None]
    return range(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def place_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, rows: int | None = None
) -> dict[str, jax.Array]:
    """Put a batch of (rows, ...) arrays on the mesh, rows split over data and fsdp.

    With `rows` the arrays hold the `local_rows` of a batch of so many rows; without it all rows.
    """
    first = 0 if rows is None else local_rows(rows, mesh).start
    split = NamedSharding(mesh, BATCH)

    def put(array: np.ndarray) -> jax.Array:
        total = len(array) if rows is None else rows

        def piece(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(total)
            return array[start - first : stop - first]

        return jax.make_array_from_callback((total, *array.shape[1:]), split, piece)

    return {name: put(array) for name, array in batch.items()}


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Constrain the sharding of an activation on the mesh of `jax.set_mesh`; without one, do
    nothing. A mesh axis that does not divide a dimension is left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, _fit(P(*spec), x.shape, mesh))


def constrain_stream(x: jax.Array) -> jax.Array:
    """Split the residual stream (b, t, d): rows over data and fsdp, tokens over tensor (sequence
    parallelism, arXiv 2205.05198). The activations that the backward pass keeps per layer are then
    split over all axes.
    """
    return constrain(x, *BATCH, "tensor", None)


def tensor_devices() -> int:
    """Return the number of devices of the tensor axis of the mesh of `jax.set_mesh`; 1 without."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["tensor"]


def whole_unless_split(x: jax.Array) -> jax.Array:
    """Return x (b, t, d), whole on each device where the tensor axis does not divide the tokens, as
    in a decode step. XLA gathers wrong rows of an array that only some axes of a mesh split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or x.shape[1] % mesh.shape["tensor"] == 0 else constrain(x)


def logits_axes(vocab: int) -> tuple[Any, Any]:
    """Return the mesh axes for the rows and for the vocabulary of logits. The vocabulary is split
    over as many devices as hold a part of the weights, so that no device holds all of the head.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or vocab % (mesh.shape["fsdp"] * mesh.shape["tensor"]) == 0:
        return "data", ("fsdp", "tensor")
    return ("data", "fsdp"), "tensor"
