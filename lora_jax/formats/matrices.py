"""Single matrices of a model directory, read on demand without loading the model."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lora_jax import tree
from lora_jax.config import expand
from lora_jax.errors import UserError
from lora_jax.formats.model_tensors import find_contents
from lora_jax.formats.names import Piece, pieces
from lora_jax.formats.tensors import all_finite, open_all, open_source
from lora_jax.models import Model


@contextlib.contextmanager
def open_matrices(
    directory: str | Path, model: Model
) -> Iterator[Callable[[tree.Path, tuple[int, ...]], np.ndarray]]:
    """Yield a function `read(path, index)` that returns one matrix or vector in float32: `path` is
    the leaf in `model.params`, `index` the layer and expert.

    Raises:
        UserError: on opening, as `read_params`; on reading, a head that the files lack, or weights
            that are not finite.
    """
    directory = expand(directory)
    contents = find_contents(directory, model)
    tensors = contents.tensors
    places: dict[tuple[tree.Path, tuple[int, ...]], list[Piece]] = {}
    for path, leaf in contents.stored.items():
        for piece in pieces(path, leaf.shape, model.names):
            places.setdefault((path, piece.lead), []).append(piece)
    with open_all(tensors.values()) as handles:

        def read(path: tree.Path, index: tuple[int, ...]) -> np.ndarray:
            if path in contents.new:
                raise UserError(
                    f"{directory} has no {tree.dotted(path)}, which is needed to measure what "
                    "the adapters changed; weights that add up to 1 do not need it"
                )
            parts = []
            own = places.get((path, index)) or places[path, index[:-1]]  # of all experts
            for piece in sorted(own, key=lambda piece: piece.start):
                found = tensors[piece.name]
                part = piece.read_one(open_source(found, handles), index)
                if not all_finite(part):
                    raise UserError(
                        f"{directory}: weights are infinite or not a number in {found.stored}"
                    )
                parts.append(np.asarray(part, np.float32))
            return np.concatenate(parts, axis=-1)

        yield read
