"""Hugging Face model directories: safetensors <-> parameter trees.

`names` says which tensors make up a leaf.
"""

import contextlib
import math
import secrets
import shutil
import stat
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lora_jax import hosts, tree
from lora_jax.config import expand
from lora_jax.errors import UserError, nearest
from lora_jax.formats.names import Piece, canonical, pieces
from lora_jax.formats.side_files import copy_side_files, write_generation_config, write_json
from lora_jax.formats.tensors import (
    FLOATS,
    Tensor,
    all_finite,
    are_equal,
    has_weights,
    list_tensors,
    open_tensors,
    unreadable,
)
from lora_jax.models import Model
from lora_jax.quantize import SCHEMES, QuantizedWeight, quantize, quantizes
from lora_jax.sharding import _fit, gather_to_host, param_specs
from lora_jax.targets import HEAD
from lora_jax.weights import Untied

_HEAD = f"{HEAD[0]}.weight"


def read_params(
    directory: str | Path,
    model: Model,
    mesh: Mesh | None,
    dtype: Any = None,
    advance: Callable[[], None] = lambda: None,
) -> dict:
    """The parameters of `model`, read slice by slice straight to their place on the mesh; without
    one, as plain arrays on the default device.

    `dtype` None keeps the dtype of the files. "nf4" and "int8" quantise the kernels of the blocks
    and keep embeddings, norms, biases and the output head as they are in the files; host memory
    then holds one tensor of floats at a time, and one quantised leaf. Otherwise it holds no more
    than one device's share of one leaf. Heads that the files lack start at random
    (`missing_heads`). `advance` is called after each array.

    Raises:
        UserError: tensors that are missing, unexpected, mis-shaped or not finite, all of them
            listed; a `dtype` that weights are not stored in.
    """
    directory = expand(directory)
    scheme, cast = _storage(dtype)
    tensors = _weights(directory, model)
    leaves = tree.flatten(model.params)
    drawn = {path for path in leaves if _is_in(tree.dotted(path), _missing_heads(tensors, model))}
    of_files = {path: leaf for path, leaf in leaves.items() if path not in drawn}
    _check_tensors(directory, tensors, of_files, model)
    specs = tree.flatten(param_specs(model.params, model.rules, mesh)) if mesh else {}
    handles: dict[Path, Any] = {}
    broken: dict[str, bool] = {}
    with contextlib.ExitStack() as stack:
        for file in sorted({tensor.file for tensor in tensors.values()}):
            handles[file] = stack.enter_context(open_tensors(file))
        params = {}
        for path, leaf in leaves.items():
            if path in drawn:
                start = _draw(path, leaf)
                params[path] = _place(leaf.shape, start.__getitem__, mesh, specs.get(path))
                advance()
                continue
            parts = pieces(path, leaf.shape, model.names)
            found = [tensors[part.name] for part in parts]
            stored = found[0].dtype if cast is None else cast
            sources = [
                (part, handles[one.file].get_slice(one.stored))
                for part, one in zip(parts, found, strict=True)
            ]
            if scheme and quantizes(path, leaves):
                whole = _read_quantized(sources, leaf.shape, stored, scheme, broken)
                params[path] = _place_parts(whole, mesh, specs.get(path))
            else:
                read = _part_reader(leaf.shape, sources, stored, broken)
                params[path] = _place(leaf.shape, read, mesh, specs.get(path))
            advance()
    _refuse_broken(directory, {tensors[name].stored: lost for name, lost in broken.items()}, cast)
    return tree.unflatten(params)


def _refuse_broken(directory: Path, broken: Mapping[str, bool], cast: np.dtype | None) -> None:
    """Raise for tensors with weights that are not finite, or were before they were `cast`."""
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


def missing_heads(directory: str | Path, model: Model) -> tuple[str, ...]:
    """The modules of `model.names.heads` that are not taken from the files: they are not there, or
    are for other labels.
    """
    directory = expand(directory)
    return _missing_heads(_weights(directory, model), model)


def _missing_heads(names: Collection[str], model: Model) -> tuple[str, ...]:
    return tuple(
        head
        for head in model.names.heads
        if head in model.fresh or not any(_is_in(name, [head]) for name in names)
    )


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _weights(directory: Path, model: Model) -> dict[str, Tensor]:
    """The tensors of a directory by the names they have in a whole model, but for those of heads
    that are not taken.
    """
    tensors = list_tensors(directory)
    expected = {
        piece.name
        for path, leaf in tree.flatten(model.params).items()
        for piece in pieces(path, leaf.shape, model.names)
    }
    found: dict[str, Tensor] = {}
    for name, new in canonical(tensors, model.names, model.params, {*expected, _HEAD}).items():
        if new in found:
            raise UserError(
                f"{directory}: {found[new].stored} and {name} are the same weight {new}"
            )
        found[new] = tensors[name]
    for one in found.values():
        if one.dtype not in FLOATS.values():
            raise unreadable(one.file, one.stored, one.dtype)
    embedding = _tied_name(model)
    if embedding is not None and embedding not in found and _HEAD in found:
        found[embedding] = found.pop(_HEAD)
    return {name: one for name, one in found.items() if not _is_in(name, model.fresh)}


def _tied_name(model: Model) -> str | None:
    """The tensor of an embedding that is the output head too."""
    path = tree.tied_embedding(model.params)
    return None if path is None else f"{tree.dotted(path[:-1])}.weight"


def has_own_head(directory: str | Path, model: Model) -> bool:
    """Return True if a model is tied by its config, and its files hold an output head that differs
    from the embedding. transformers does not tie them then.
    """
    directory, embedding = expand(directory), _tied_name(model)
    if embedding is None or not has_weights(directory):
        return False
    tensors = _weights(directory, model)
    both = embedding in tensors and _HEAD in tensors
    return both and not are_equal(tensors[embedding], tensors[_HEAD])


def _draw(path: tree.Path, leaf: Any) -> np.ndarray:
    """A weight of a new head: normal with deviation 0.02, alike in every load; a bias is zero."""
    if path[-1] == "bias":
        return np.zeros(leaf.shape, np.float32)
    seed = zlib.crc32(tree.dotted(path).encode())
    return np.random.default_rng(seed).normal(0, 0.02, leaf.shape).astype(np.float32)


def _place(
    shape: Sequence[int],
    read: Callable[[Any], np.ndarray],
    mesh: Mesh | None,
    spec: PartitionSpec | None,
) -> jax.Array:
    """An array on the mesh, from a function of an index to that part of it; a plain one without a
    mesh.
    """
    if mesh is None or spec is None:
        return jnp.asarray(read(tuple(slice(n) for n in shape)))
    return jax.make_array_from_callback(tuple(shape), NamedSharding(mesh, spec), read)


def _storage(dtype: Any) -> tuple[str | None, np.dtype | None]:
    """`dtype` of read_params as a scheme to quantise with and a dtype to cast to, None where it
    asks for none.
    """
    if dtype is None or (isinstance(dtype, str) and dtype in SCHEMES):
        return dtype, None
    try:
        cast = np.dtype(dtype)
    except TypeError:
        cast = None
    if cast not in FLOATS.values():
        floats = [stored.name for stored in FLOATS.values()]
        raise UserError(
            f"dtype={dtype!r} is no dtype that weights can be stored in; these are: "
            f"{', '.join([*floats, *SCHEMES])}, and None for the dtype of the files."
            + nearest(str(dtype), [*floats, *SCHEMES])
        )
    return None, cast


def _part_reader(
    shape: tuple[int, ...],
    sources: Sequence[tuple[Piece, Any]],
    stored: np.dtype,
    broken: dict[str, bool] | None = None,
) -> Callable[[Any], np.ndarray]:
    """A function from an index of a leaf to that part of it, read from the slices' tensors. Tensors
    that are not finite there go into `broken`: True if they were before their cast to `stored`.
    """

    def read(index: Any) -> np.ndarray:
        ranges = [range(*part.indices(n)) for part, n in zip(index, shape, strict=True)]
        out = _empty([len(wanted) for wanted in ranges], stored)
        for piece, source in sources:
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
            if broken is not None and not all_finite(here):
                broken[piece.name] = all_finite(part)
        return out

    return read


def _empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Return `np.empty` on a boundary of 64 bytes. The CPU backend uses such an array as it is; it
    would copy another, with the largest leaf in memory twice.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _read_quantized(
    sources: Sequence[tuple[Piece, Any]],
    shape: tuple[int, ...],
    stored: np.dtype,
    scheme: str,
    broken: dict[str, bool],
) -> QuantizedWeight:
    """The leaf of a kernel (..., in, out) with NumPy arrays in it, one matrix (in, out) quantised
    at a time on the host's CPU. Tensors that are not finite go into `broken`.
    """
    whole = jax.eval_shape(lambda: quantize(jnp.zeros(shape, stored), scheme))
    leaf = jax.tree.map(lambda part: _empty(part.shape, part.dtype), whole)
    by_matrix: dict[tuple[int, ...], list[tuple[Piece, Any]]] = {}
    for piece, source in sources:
        by_matrix.setdefault(piece.lead, []).append((piece, source))
    for lead, own in by_matrix.items():
        matrix = np.empty(shape[len(lead) :], stored)
        for piece, source in own:
            part = piece.read(source, [slice(n) for n in piece.shape])
            matrix[..., slice(piece.start, piece.start + piece.shape[-1])] = part
            if not all_finite(part):
                broken[piece.name] = False
        with jax.default_device(_cpu()):
            quantized = _quantize(matrix, scheme)
        for part, one in zip(jax.tree.leaves(leaf), jax.tree.leaves(quantized), strict=True):
            part[lead] = one
    return leaf


_quantize = jax.jit(quantize, static_argnums=1)


def _cpu() -> Any:
    """The CPU of this host: the same bits whatever the accelerator, and no floats on it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(
            "weights are quantised on the CPU, and JAX was started without it; put it behind the "
            "accelerator in JAX_PLATFORMS, as in JAX_PLATFORMS=cuda,cpu"
        ) from error


def _place_parts(
    leaf: QuantizedWeight, mesh: Mesh | None, spec: PartitionSpec | None
) -> QuantizedWeight:
    """Put the arrays of a leaf on the mesh, each sharded as its kernel; an axis that a dimension
    does not divide is left out.
    """

    def place(part: np.ndarray) -> jax.Array:
        fitting = _fit(spec, part.shape, mesh) if mesh and spec is not None else None
        return _place(part.shape, part.__getitem__, mesh, fitting)

    return jax.tree.map(place, leaf)


def _check_tensors(
    directory: Path, tensors: Mapping[str, Tensor], leaves: Mapping[tree.Path, Any], model: Model
) -> None:
    expected = {
        piece.name: piece.stored_shape
        for path, leaf in leaves.items()
        for piece in pieces(path, leaf.shape, model.names)
    }
    tied = _tied_name(model) is not None
    problems = [
        f"unexpected {tensor.stored} {tensor.shape}"
        for name, tensor in tensors.items()
        if name not in expected and not (tied and name == _HEAD)
    ]
    problems += [
        f"{tensor.stored} has shape {tensor.shape}, config.json asks for {expected[name]}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name]
    ]
    missing = [f"missing {name} {shape}" for name, shape in expected.items() if name not in tensors]
    lists = [tree.summarize(found) for found in (problems, missing) if found]
    if not problems and expected.keys() - tensors.keys() == {_HEAD}:
        lists.append(
            "These are the weights of a decoder without its output head; give the whole model, or "
            "set tie_word_embeddings in config.json if the head is the embedding"
        )
    if lists:
        raise UserError(
            f"{directory} does not hold the weights that its config.json describes:\n  "
            + "\n  ".join(lists)
        )
    if tied and _HEAD in tensors and not are_equal(tensors[str(_tied_name(model))], tensors[_HEAD]):
        raise UserError(
            f"{directory}: {_HEAD} differs from the embedding, and the model given ties them; "
            "formats.describe(directory) gives one that does not"
        )


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends well and vanishes when it does
    not.

    Raises:
        UserError: `target` exists and is not an empty directory (nothing is ever removed), or
            cannot be made.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"{target} already exists and is not empty; choose another directory or remove it"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}-{secrets.token_hex(4)}"
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        yield temporary
        _as_others_would(temporary)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:  # the latter for a full disk
        raise UserError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _as_others_would(directory: Path) -> None:
    """Give all files the permissions of a new one (umask, ACL): safetensors makes them private."""
    probe = directory / ".new"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in directory.rglob("*"):
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) != mode:
            file.chmod(mode)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB" (decimal, as Hugging Face counts) or a plain number.

    Raises:
        UserError: not a positive size.
    """
    units = {
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "KIB": 2**10,
        "MIB": 2**20,
        "GIB": 2**30,
        "B": 1,
        "": 1,
    }
    digits = text.strip().rstrip("BbIiKkMmGgTt ")
    try:
        size = int(float(digits) * units[text.strip()[len(digits) :].strip().upper()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"size {text!r} is not understood; write it as 5GB or 200MB")
    return size


def write_model(
    target: str | Path,
    model: Model,
    params: Mapping,
    source: str | Path,
    max_shard_size: str = "5GB",
    chat_template: str | None = None,
    stops: Collection[int] = (),
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a Hugging Face directory: safetensors (sharded with an index above the limit),
    config.json, side files, and what `beside` writes into it.

    `source` is the directory that the model came from; its tokenizer, chat templates, generation
    config and licence are copied. `chat_template` takes the place of its templates, and `stops`
    join the ids that end a generation. One shard at a time is brought to the host; of several hosts
    the main one writes, and all of them must call.
    """
    source = expand(source)
    target = expand(target)
    limit = parse_size(max_shard_size)
    leaves, config = tree.flatten(params), dict(model.hf_config)
    for path, leaf in list(leaves.items()):
        if isinstance(leaf, Untied):
            leaves |= {path: leaf.embed, HEAD: jnp.swapaxes(leaf.head, 0, 1)}
            config["tie_word_embeddings"] = False
    places: dict[str, tuple[tree.Path, Piece]] = {}
    for path, leaf in leaves.items():
        places |= {piece.name: (path, piece) for piece in pieces(path, leaf.shape, model.names)}
    sizes = {
        name: math.prod(piece.shape) * leaves[path].dtype.itemsize
        for name, (path, piece) in places.items()
    }
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(places):
        if shards[-1] and filled + sizes[name] > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name]
    with new_directory(target) if hosts.is_main() else contextlib.nullcontext() as temporary:
        weight_map = {}
        for number, names in enumerate(shards, 1):
            file = (
                f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                if len(shards) > 1
                else "model.safetensors"
            )
            content = {}
            for name in names:
                path, piece = places[name]
                array = gather_to_host(leaves[path][piece.place()])
                if temporary is not None:
                    content[name] = np.ascontiguousarray(array.T if piece.transposed else array)
                weight_map[name] = file
            if temporary is None:
                continue
            save_file(content, temporary / file, metadata={"format": "pt"})
        if temporary is None:
            return
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write_json(temporary / "model.safetensors.index.json", index)
        dtypes = {str(leaf.dtype) for leaf in leaves.values()}
        if len(dtypes) == 1:
            config.pop("torch_dtype", None)
            config["dtype"] = dtypes.pop()
        write_json(temporary / "config.json", config)
        copy_side_files(source, temporary, chat_template)
        write_generation_config(source, temporary, stops)
        if beside is not None:
            beside(temporary)
