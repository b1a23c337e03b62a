"""Leaves of the trainable tree: the only list of their names.

A kind has the optimizer's label of a leaf, the axes along which it is sharded, and its name in
PEFT's files:

    name                   label         axes              file
    lora_a                 lora_a        in, rank          lora_A.weight
    lora_b                 lora_b        rank, out         lora_B.weight
    magnitude              magnitude     out               lora_magnitude_vector
    full_kernel, ..        full          those of kernel   weight

Axes called `in` and `out` are sharded like those of the base weight. Names of mesh axes are used as
they are. No other axis is sharded.
"""

from dataclasses import dataclass

from lora_jax.config import AdapterConfig

FROZEN = "frozen"
LABELS = ("lora_a", "lora_b", "magnitude", "full", "prompt")  # of the optimizer, but for FROZEN
_FULL = "full_"  # a weight that trains in full: full_kernel, full_bias, ..


@dataclass(frozen=True)
class Kind:
    """A kind of leaf."""

    label: str = FROZEN  # of the optimizer
    axes: tuple[str, ...] | None = None  # of one matrix; None: those of the base weight
    file: str | None = None  # name in PEFT's files, behind the module path
    embedding_file: str | None = None  # the same for an embedding, if it differs
    is_factor: bool = False  # of an update: counted with its target, and measured by norms


_FULL_KIND = Kind("full")
_KINDS = {
    "lora_a": Kind("lora_a", ("in", "rank"), "lora_A.weight", "lora_embedding_A", is_factor=True),
    "lora_b": Kind("lora_b", ("rank", "out"), "lora_B.weight", "lora_embedding_B", is_factor=True),
    "magnitude": Kind("magnitude", ("out",), "lora_magnitude_vector"),
    "init_a": Kind(axes=("in", "rank")),  # what an init subtracted from the base
    "init_b": Kind(axes=("rank", "out")),
    "lambda_d": Kind("magnitude", ("rank",), "vera_lambda_d", is_factor=True),
    "lambda_b": Kind("magnitude", ("out",), "vera_lambda_b", is_factor=True),
    "vera_a": Kind(axes=("in", "rank"), file="vera_A"),  # shared by all targets
    "vera_b": Kind(axes=("rank", "out"), file="vera_B"),
    "trainable_tokens": Kind("full", ("tokens", "out"), "token_adapter.trainable_tokens_delta"),
    "prompt_embeddings": Kind("prompt", ("tokens", "features")),
    "prefix_keys": Kind("prompt", ("layers", "tokens", "tensor")),
    "prefix_values": Kind("prompt", ("layers", "tokens", "tensor")),
    "prefix_gate": Kind("prompt", ("layers",)),
}


def kind_of(name: str) -> Kind | None:
    """Return the kind of a leaf by its name, the last key of its path; None for names that are not
    in trainable trees.
    """
    return _FULL_KIND if name.startswith(_FULL) else _KINDS.get(name)


def known_kind(name: str) -> Kind:
    """Return the kind of a leaf of a trainable tree."""
    kind = kind_of(name)
    assert kind is not None, name
    return kind


def label_of(name: str, freeze_a: bool = False) -> str:
    """Return the optimizer's label of any leaf, including those of the base."""
    kind = kind_of(name)
    return FROZEN if kind is None or (freeze_a and name == "lora_a") else kind.label


def trained_name(weight: str) -> str:
    """Return the name of the leaf with the trained values of a weight: kernel -> full_kernel."""
    return _FULL + weight


def weight_name(trained: str) -> str:
    """Invert `trained_name`."""
    return trained.removeprefix(_FULL)


def target_leaves(config: AdapterConfig) -> tuple[str, ...]:
    """Return the names of the leaves that every target of a method has."""
    if config.trains_vera:
        return ("lambda_d", "lambda_b")
    names = ["lora_a", "lora_b"]
    if config.changes_base:
        names += ["init_a", "init_b"]
    if config.use_dora:
        names.append("magnitude")
    return tuple(names)


def shared_leaves(config: AdapterConfig) -> tuple[str, ...]:
    """Return the names of the leaves that all targets of a method share, at the root of the tree.
    Their axes are as wide as the widest target.
    """
    return ("vera_a", "vera_b") if config.trains_vera else ()
