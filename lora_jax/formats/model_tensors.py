"""Tensors of a model's files by their names in the whole model, compared with its config.json."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax import tree
from lora_jax.config import expand
from lora_jax.errors import UserError
from lora_jax.formats.names import canonical, is_carried, pieces
from lora_jax.formats.packed import joined
from lora_jax.formats.tensors import (
    FLOAT8,
    FLOATS,
    Tensor,
    are_equal,
    has_weights,
    list_tensors,
    unreadable,
)
from lora_jax.models import Model
from lora_jax.targets import HEAD

HEAD_NAME = f"{HEAD[0]}.weight"


@dataclass(frozen=True)
class Contents:
    """The parameters of a model, divided by whether its files hold them."""

    tensors: dict[str, Tensor]  # by their names in the whole model
    stored: dict[tree.Path, Any]  # leaves of `model.params` that the files hold, as shapes
    new: dict[tree.Path, Any]  # leaves of heads that the files lack: they start at random


def find_contents(directory: Path, model: Model) -> Contents:
    """Find the tensors of every parameter of `model`; reads headers only.

    Raises:
        UserError: tensors that are missing, unexpected or of another shape, all of them listed.
    """
    tensors = _model_tensors(directory, model)
    leaves = tree.flatten(model.params)
    missing = _missing_heads(tensors, model)
    new = {path: leaf for path, leaf in leaves.items() if _is_in(tree.dotted(path), missing)}
    stored = {path: leaf for path, leaf in leaves.items() if path not in new}
    _check_tensors(directory, tensors, stored, model)
    return Contents(tensors, stored, new)


def missing_heads(directory: str | Path, model: Model) -> tuple[str, ...]:
    """Return the modules of `model.names.heads` that start at random: the files lack them, or have
    them for other labels.
    """
    directory = expand(directory)
    return _missing_heads(_model_tensors(directory, model), model)


def _missing_heads(names: Collection[str], model: Model) -> tuple[str, ...]:
    return tuple(
        head
        for head in model.names.heads
        if head in model.fresh or not any(_is_in(name, [head]) for name in names)
    )


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _model_tensors(directory: Path, model: Model) -> dict[str, Tensor]:
    """Return the tensors of a directory by their names in the whole model, without those of heads
    that start at random.
    """
    tensors = joined(list_tensors(directory), model)
    expected = {
        piece.name
        for path, leaf in tree.flatten(model.params).items()
        for piece in pieces(path, leaf.shape, model.names)
    }
    found: dict[str, Tensor] = {}
    for name, new in canonical(tensors, model.names, model.params, {*expected, HEAD_NAME}).items():
        if new in found:
            raise UserError(
                f"{directory}: {found[new].stored} and {name} are the same weight {new}"
            )
        found[new] = tensors[name]
    for one in found.values():
        if one.dtype not in FLOATS.values():
            raise unreadable(one.file, one.stored, one.dtype)
    embedding = _tied_name(model)
    if embedding is not None and embedding not in found and HEAD_NAME in found:
        found[embedding] = found.pop(HEAD_NAME)
    return {name: one for name, one in found.items() if not _is_in(name, model.fresh)}


def stored_names(directory: Path, model: Model) -> dict[str, str]:
    """Return the names in the files of a directory by those in the whole model."""
    return {name: tensor.stored for name, tensor in _model_tensors(directory, model).items()}


def carried_tensors(directory: Path, model: Model) -> dict[str, Tensor]:
    """Return the tensors of a directory that an export copies, by their names in the files."""
    if not model.names.carried:
        return {}
    tensors = joined(list_tensors(directory), model)
    carried = {name: tensors[name] for name in tensors if is_carried(name, model.names)}
    for one in carried.values():
        if one.dtype in FLOAT8.values():
            raise unreadable(one.file, one.stored, one.dtype)
    return carried


def _tied_name(model: Model) -> str | None:
    """Return the name of the embedding's tensor if it is also the output head, else None."""
    path = tree.tied_embedding(model.params)
    return None if path is None else f"{tree.dotted(path[:-1])}.weight"


def has_own_head(directory: str | Path, model: Model) -> bool:
    """Return True if the config ties the output head to the embedding, and the files hold a head
    that differs from it. transformers does not tie them then.
    """
    directory, embedding = expand(directory), _tied_name(model)
    if embedding is None or not has_weights(directory):
        return False
    tensors = _model_tensors(directory, model)
    both = embedding in tensors and HEAD_NAME in tensors
    return both and not are_equal(tensors[embedding], tensors[HEAD_NAME])


def _check_tensors(
    directory: Path, tensors: Mapping[str, Tensor], leaves: Mapping[tree.Path, Any], model: Model
) -> None:
    """Raise a UserError unless `tensors` are those that the `leaves` of the model are made of."""
    expected = {
        piece.name: piece.stored_shape
        for path, leaf in leaves.items()
        for piece in pieces(path, leaf.shape, model.names)
    }
    tied = _tied_name(model) is not None
    problems = [
        f"unexpected {tensor.stored} {tensor.shape}"
        for name, tensor in tensors.items()
        if name not in expected and not (tied and name == HEAD_NAME)
    ]
    problems += [
        f"{tensor.stored} has shape {tensor.shape}, config.json asks for {expected[name]}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name]
    ]
    missing = [f"missing {name} {shape}" for name, shape in expected.items() if name not in tensors]
    lists = [tree.summarize(found) for found in (problems, missing) if found]
    if not problems and expected.keys() - tensors.keys() == {HEAD_NAME}:
        lists.append(
            "These are the weights of a decoder without its output head; give the whole model, or "
            "set tie_word_embeddings to true in config.json if the head is the embedding"
        )
    if lists:
        raise UserError(
            f"{directory} does not hold the weights that its config.json describes:\n  "
            + "\n  ".join(lists)
        )
    if (
        tied
        and HEAD_NAME in tensors
        and not are_equal(tensors[str(_tied_name(model))], tensors[HEAD_NAME])
    ):
        raise UserError(
            f"{directory}: {HEAD_NAME} differs from the embedding, which the model ties to it; "
            "pass the model that formats.describe(directory) returns, which does not tie them"
        )
