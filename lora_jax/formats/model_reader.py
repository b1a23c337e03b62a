"""Parameters of a model, read from its safetensors files slice by slice onto the devices.

`names` says which tensors make up a leaf.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax import tree
from lora_jax.config import expand
from lora_jax.errors import UserError, nearest
from lora_jax.formats.model_tensors import find_contents
from lora_jax.formats.names import Piece, pieces
from lora_jax.formats.tensors import FLOATS, Tensor, all_finite, open_all, open_source
from lora_jax.models import Model
from lora_jax.quantize import SCHEMES, QuantizedWeight, quantize, quantizes
from lora_jax.sharding import _fit, param_specs


def read_params(
    directory: str | Path,
    model: Model,
    mesh: Mesh | None,
    dtype: Any = None,
    advance: Callable[[], None] = lambda: None,
) -> dict:
    """Read the parameters of `model`, each slice directly to its device.

    Host memory holds at most one device's share of one leaf; with quantisation one float tensor and
    one quantised leaf. Heads that the files lack start at random (`missing_heads`).

    Args:
        directory: a Hugging Face model directory.
        model: its description, with shapes in place of weights.
        mesh: devices to shard over; None for plain arrays on the default device.
        dtype: None keeps the dtype of the files. "nf4" and "int8" quantise the kernels of the
            layers; embeddings, norms, biases and the output head keep the dtype of the files.
        advance: called after each leaf, for a progress bar.

    Raises:
        UserError: tensors that are missing, unexpected, of another shape or not finite, all of
            them listed; a `dtype` that weights cannot be stored in.
    """
    directory = expand(directory)
    scheme, cast = _storage(dtype)
    contents = find_contents(directory, model)
    leaves = tree.flatten(model.params)
    specs = tree.flatten(param_specs(model.params, model.rules, mesh)) if mesh else {}
    broken: dict[str, bool] = {}
    params = {}
    with open_all(contents.tensors.values()) as handles:
        for path, leaf in leaves.items():
            spec = specs.get(path)
            if path in contents.new:
                start = _draw(path, leaf)
                params[path] = _place(leaf.shape, start.__getitem__, mesh, spec)
            else:
                parts = pieces(path, leaf.shape, model.names)
                tensors = [contents.tensors[part.name] for part in parts]
                stored = tensors[0].dtype if cast is None else cast
                source = _Source(leaf.shape, stored, _slices(parts, tensors, handles), broken)
                if scheme and quantizes(path, leaves):
                    params[path] = _place_parts(_read_quantized(source, scheme), mesh, spec)
                else:
                    params[path] = _place(leaf.shape, _part_reader(source), mesh, spec)
            advance()
    lost = {contents.tensors[name].stored: by_cast for name, by_cast in broken.items()}
    _refuse_broken(directory, lost, cast)
    return tree.unflatten(params)


@dataclass(frozen=True)
class _Source:
    """A leaf in the files."""

    shape: tuple[int, ...]
    stored: np.dtype  # of the leaf
    slices: Sequence[tuple[Piece, Any]]  # each part of the leaf, with the slice of its tensor
    # Tensors found not finite, by name: True if they were finite before the cast to `stored`.
    broken: dict[str, bool] = field(default_factory=dict)


def _slices(
    parts: Sequence[Piece], tensors: Sequence[Tensor], handles: Mapping[Path, Any]
) -> list[tuple[Piece, Any]]:
    return [
        (part, open_source(tensor, handles)) for part, tensor in zip(parts, tensors, strict=True)
    ]


def _refuse_broken(directory: Path, broken: Mapping[str, bool], cast: np.dtype | None) -> None:
    """Raise for `broken` tensors; the value is True if the cast to `cast` made them so."""
    stored = [name for name, lost in broken.items() if not lost]
    if stored:
        raise UserError(
            f"{directory}: weights are infinite or not a number in:\n  "
            + tree.summarize(sorted(stored))
            + "\nThe files are damaged, or a training diverged; get or save the model again"
        )
    if broken:
        raise UserError(
            f"{directory}: weights are too large for {cast} in:\n  "
            + tree.summarize(sorted(broken))
            + "\nKeep the dtype of the files, or load them as bfloat16 or float32"
        )


def _draw(path: tree.Path, leaf: Any) -> np.ndarray:
    """Return a weight of a new head: normal with deviation 0.02, always the same; a bias is 0, and
    the scale of a norm is 1.
    """
    if path[-1] in ("bias", "scale"):
        return np.full(leaf.shape, path[-1] == "scale", np.float32)
    seed = zlib.crc32(tree.dotted(path).encode())
    return np.random.default_rng(seed).normal(0, 0.02, leaf.shape).astype(np.float32)


def _place(
    shape: Sequence[int],
    read: Callable[[Any], np.ndarray],
    mesh: Mesh | None,
    spec: PartitionSpec | None,
) -> jax.Array:
    """Return an array on the mesh, or a plain one without a mesh; `read(index)` gives its parts."""
    if mesh is None or spec is None:
        return jnp.asarray(read(tuple(slice(n) for n in shape)))
    return jax.make_array_from_callback(tuple(shape), NamedSharding(mesh, spec), read)


def _storage(dtype: Any) -> tuple[str | None, np.dtype | None]:
    """Return the quantisation scheme and the dtype to cast to that `dtype` asks for, or None."""
    if dtype is None or (isinstance(dtype, str) and dtype in SCHEMES):
        return dtype, None
    try:
        cast = np.dtype(dtype)
    except TypeError:
        cast = None
    if cast not in FLOATS.values():
        floats = [stored.name for stored in FLOATS.values()]
        raise UserError(
            f"dtype={dtype!r} is not a dtype that weights can be stored in; these are: "
            f"{', '.join([*floats, *SCHEMES])}, and None for the dtype of the files."
            + nearest(str(dtype), [*floats, *SCHEMES])
        )
    return None, cast


def _part_reader(leaf: _Source) -> Callable[[Any], np.ndarray]:
    """Return a function from an index of a leaf to that part of it, read from the files. Tensors
    that are not finite there are added to `leaf.broken`.
    """

    def read(index: Any) -> np.ndarray:
        ranges = [range(*part.indices(n)) for part, n in zip(index, leaf.shape, strict=True)]
        out = _empty([len(wanted) for wanted in ranges], leaf.stored)
        for piece, source in leaf.slices:
            lead, inner = ranges[: len(piece.lead)], ranges[len(piece.lead) :]
            if any(i not in wanted for i, wanted in zip(piece.lead, lead, strict=True)):
                continue
            *rows, last = inner
            first, stop = (
                max(last.start, piece.start),
                min(last.stop, piece.start + piece.shape[-1]),
            )
            if first >= stop:
                continue
            own = [slice(part.start, part.stop) for part in rows]
            own.append(slice(first - piece.start, stop - piece.start))
            place = [i - wanted.start for i, wanted in zip(piece.lead, lead, strict=True)]
            here = out[(*place, ..., slice(first - last.start, stop - last.start))]
            part = piece.read(source, own)
            with np.errstate(over="ignore"):
                here[...] = part
            if not all_finite(here):
                leaf.broken[piece.name] = all_finite(part)
        return out

    return read


def _empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Return `np.empty` aligned to 64 bytes. The CPU backend uses such an array without a copy;
    otherwise the largest leaf would be in memory twice.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _read_quantized(leaf: _Source, scheme: str) -> QuantizedWeight:
    """Return the quantised leaf of a kernel (..., in, out) as NumPy arrays. One matrix (in, out) is
    quantised at a time, on the CPU. Tensors that are not finite are added to `leaf.broken`.
    """
    shapes = jax.eval_shape(lambda: quantize(jnp.zeros(leaf.shape, leaf.stored), scheme))
    weight = jax.tree.map(lambda part: _empty(part.shape, part.dtype), shapes)
    by_matrix: dict[tuple[int, ...], list[tuple[Piece, Any]]] = {}
    for piece, source in leaf.slices:
        by_matrix.setdefault(piece.lead, []).append((piece, source))
    for lead, own in by_matrix.items():
        for rest in np.ndindex(*leaf.shape[len(lead) : -2]):  # the experts of one tensor
            matrix = np.empty(leaf.shape[-2:], leaf.stored)
            for piece, source in own:
                part = piece.read_one(source, (*lead, *rest))
                matrix[..., slice(piece.start, piece.start + piece.shape[-1])] = part
                if not all_finite(part):
                    leaf.broken[piece.name] = False
            with jax.default_device(_cpu()):
                quantized = _quantize(matrix, scheme)
            for part, one in zip(jax.tree.leaves(weight), jax.tree.leaves(quantized), strict=True):
                part[(*lead, *rest)] = one
    return weight


_quantize = jax.jit(quantize, static_argnums=1)


def _cpu() -> Any:
    """Return the CPU of this host: it gives the same bits on every machine, and no float weights
    reach the accelerator.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(
            "weights are quantised on the CPU, and JAX was started without it; name it after the "
            "accelerator in JAX_PLATFORMS, as in JAX_PLATFORMS=cuda,cpu"
        ) from error


def _place_parts(
    leaf: QuantizedWeight, mesh: Mesh | None, spec: PartitionSpec | None
) -> QuantizedWeight:
    """Put the arrays of a quantised leaf on the mesh, sharded like the kernel; a dimension that a
    mesh axis does not divide is not split.
    """

    def place(part: np.ndarray) -> jax.Array:
        fitting = _fit(spec, part.shape, mesh) if mesh and spec is not None else None
        return _place(part.shape, part.__getitem__, mesh, fitting)

    return jax.tree.map(place, leaf)
