"""Names of modules and parameters as transformers and PEFT have them."""

from collections.abc import Collection, Iterable, Mapping

from lora_jax import tree
from lora_jax.targets import HEAD


def outermost(names: Collection[str]) -> list[str]:
    """Sort names, without those of modules inside another one."""
    return sorted(name for name in names if not is_inside(name, set(names) - {name}))


def is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def parameters(params: Mapping) -> dict[str, tuple[str, tree.Path]]:
    """Return module path and leaf of every parameter, by its name in transformers."""
    found = {}
    for path, leaf in tree.flatten(params).items():
        ending = ".weight" if path[-1] in tree.WEIGHTS else f".{path[-1]}"
        if tree.has_experts(path):
            ending = "_bias" if path[-1] == "bias" else ""
        for name in tree.slice_names(path[:-1], leaf.shape):
            found[name + ending] = (name, path)
    return found


def weight_names(params: Mapping) -> set[str]:
    """Return the paths of the modules that hold a weight, a tied head included."""
    names = {
        name
        for path, leaf in tree.flatten(params).items()
        for name in tree.slice_names(path[:-1], leaf.shape)
    }
    return names if tree.tied_embedding(params) is None else names | {HEAD[0]}


def module_names(params: Mapping) -> set[str]:
    """Return the paths of all modules with containers; PEFT has no modules of experts."""
    stacks = {name for name, path in parameters(params).values() if tree.has_experts(path)}
    homes = {name.rpartition(".")[0] for name in stacks}
    split = [name.split(".") for name in (weight_names(params) - stacks) | homes]
    return {".".join(parts[:end]) for parts in split for end in range(1, len(parts) + 1)}


def tied_embedding_name(params: Mapping) -> str | None:
    """Return the module path of a tied embedding, or None."""
    path = tree.tied_embedding(params)
    return None if path is None else tree.dotted(path[:-1])
