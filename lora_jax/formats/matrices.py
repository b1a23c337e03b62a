"""One matrix of a model directory at a time, for what must not hold the model."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lora_jax import tree
from lora_jax.config import expand
from lora_jax.errors import UserError
from lora_jax.formats.names import Piece, pieces
from lora_jax.formats.safetensors import (
    _check_tensors,
    _is_in,
    _missing_heads,
    _weights,
)
from lora_jax.formats.tensors import all_finite, open_tensors
from lora_jax.models import Model


@contextlib.contextmanager
def open_matrices(
    directory: str | Path, model: Model
) -> Iterator[Callable[[tree.Path, tuple[int, ...]], np.ndarray]]:
    """`read(path, index)`: a matrix or vector (float32) of the files by its leaf in `model.params`
    and its place there, layer and expert.

    Raises:
        UserError: as `read_params`, when it is opened; when a head is read that the files lack, or
            a weight that is not finite.
    """
    directory = expand(directory)
    tensors = _weights(directory, model)
    leaves = tree.flatten(model.params)
    missing = _missing_heads(tensors, model)
    lacking = {path for path in leaves if _is_in(tree.dotted(path), missing)}
    of_files = {path: leaf for path, leaf in leaves.items() if path not in lacking}
    _check_tensors(directory, tensors, of_files, model)
    places: dict[tuple[tree.Path, tuple[int, ...]], list[Piece]] = {}
    for path, leaf in of_files.items():
        for piece in pieces(path, leaf.shape, model.names):
            places.setdefault((path, piece.lead), []).append(piece)
    with contextlib.ExitStack() as stack:
        files = sorted({tensor.file for tensor in tensors.values()})
        handles = {file: stack.enter_context(open_tensors(file)) for file in files}

        def read(path: tree.Path, index: tuple[int, ...]) -> np.ndarray:
            if path in lacking:
                raise UserError(
                    f"{directory} has no {tree.dotted(path)}, from which to measure what adapters "
                    "made of it; weights that add up to 1 need none"
                )
            parts = []
            for piece in sorted(places[path, index], key=lambda piece: piece.start):
                found = tensors[piece.name]
                source = handles[found.file].get_slice(found.stored)
                part = piece.read(source, [slice(n) for n in piece.shape])
                if not all_finite(part):
                    raise UserError(
                        f"{directory}: weights are infinite or not a number in {found.stored}"
                    )
                parts.append(np.asarray(part, np.float32))
            return np.concatenate(parts, axis=-1)

        yield read
