"""Checks of settings that conflict with one another or with the model."""

from collections.abc import Iterable, Mapping

from lora_jax.config import DATA_INITS
from lora_jax.errors import UserError
from lora_jax.quantize import Int8Weight, NF4Weight, quantizes
from lora_jax.targets.kinds import HEAD, Target, Trainable
from lora_jax.tree import (
    OUTPUT_HEADS,
    Path,
    dotted,
    flatten,
    tied_embedding,
)

_QUANTISED = "; a quantised base (base_dtype) cannot be changed"


def check_init(params: Mapping, found: Trainable) -> None:
    """Raise if an init would subtract its factors from a quantised weight.

    The remaining base may be quantised later, so `init` checks this and `bind` does not.
    """
    for target in found.targets:
        if found.config.needs_float_base and _is_quantized(params, target.weight):
            raise UserError(
                f"init={found.config.init} subtracts its factors from {dotted(target.path)}"
                f"{_QUANTISED}: run init on float weights first, and quantise the remaining base "
                "with quantize_tree"
            )


def combination_problems(params: Mapping, found: Trainable) -> Iterable[str]:
    """Yield settings that conflict; each text names both."""
    config, tied = found.config, tied_embedding(params)
    lora: dict[Path, Target] = {}
    for target in found.targets:
        lora.setdefault(target.weight, target)
    for part in found.targets:
        whole = lora[part.weight]  # comes before its parts, and is a part if there is none
        both = [n for n, r, s in zip(part.names, part.ranks, whole.ranks, strict=True) if r and s]
        if part.columns is not None and whole.columns is None and both:
            yield (
                f"target_modules={config.target_modules!r} names {dotted(whole.path)} and "
                f"{dotted(part.path)}, which is a part of it; name one of them"
            )
    saved = {whole.path: whole for whole in found.whole}
    for path, whole in saved.items():
        target = lora.get(path)
        both = target and [
            n for n, r, c in zip(target.names, target.ranks, whole.chosen, strict=True) if r and c
        ]
        if both:
            yield (
                f"target_modules={config.target_modules!r} and modules_to_save="
                f"{config.modules_to_save!r} both name {both[0]}; choose an adapter or full "
                "training for it"
            )
    for rows in found.rows:
        for field, paths in (("target_modules", lora), ("modules_to_save", saved)):
            if rows.path in paths or (rows.path == tied and HEAD in paths):
                name = dotted(rows.path[:-1] if rows.path in paths else HEAD[:-1])
                yield f"trainable_token_indices and {field} both train {name}; choose one"
    yield from _init_problems(params, found)
    # A head that is tied to its embedding is adapted as one.
    as_one = {HEAD} if tied is not None and config.ensure_weight_tying else set()
    embeddings = [path for path in lora if path[-1] == "embedding" or path in as_one]
    if config.freeze_a and embeddings:
        yield (
            f"freeze_a=true and target_modules={config.target_modules!r}: lora_a of "
            f"{dotted(embeddings[0][:-1])} starts at zero, and would stay zero if frozen"
        )
    yield from _tie_problems(tied, found, set(lora), set(saved))


def _tie_problems(
    tied: Path | None, found: Trainable, lora: set[Path], saved: set[Path]
) -> Iterable[str]:
    """Yield problems of a head that is tied to its embedding. `lora` are the paths of adapted
    weights, `saved` those of weights that train in full.
    """
    config = found.config
    tie = config.ensure_weight_tying
    head = HEAD in lora or HEAD in saved
    embedding = tied in lora or tied in saved
    if tied is None:
        if tie:
            yield "ensure_weight_tying=true: the model's embedding and head are not tied"
        return
    name = dotted(tied[:-1])
    field = "target_modules" if HEAD in lora else "modules_to_save"
    if head and tie is None:
        yield (
            f"{field} names lm_head, which is {name} in this model (tied): set "
            "ensure_weight_tying=true to train both as one, or false to train the head alone, "
            "which is exported untied"
        )
    if tie and not (head or embedding or found.rows):
        yield (
            f"ensure_weight_tying=true, and neither target_modules nor modules_to_save names "
            f"{name} or lm_head"
        )
    if config.changes_base and not tie and (tied in lora or HEAD in lora):
        yield (
            f"init={config.init} subtracts its factors from {name}, which is also the output "
            "head; if target_modules names only one of them, ensure_weight_tying must be true"
        )
    if tie and ((tied in lora and HEAD in saved) or (tied in saved and HEAD in lora)):
        yield (
            f"ensure_weight_tying=true needs {name} and lm_head in the same list; one is in "
            "target_modules and the other in modules_to_save"
        )


def _init_problems(params: Mapping, found: Trainable) -> Iterable[str]:
    """Yield the first weight of each kind that an init does not support."""
    init, leaves = found.config.init, flatten(params)
    if init not in (*DATA_INITS, "loftq"):
        return
    refused: dict[str, Target] = {}
    for target in found.targets:
        path, why = target.weight, None
        if path not in leaves or target.leaf == "embedding":
            why = "is an embedding"
        elif init == "eva" and set(path) & set(OUTPUT_HEADS):
            why = "is an output head"
        elif init == "eva" and target.experts is not None:
            why = "is a stack of experts"
        elif init == "loftq" and not quantizes(path, leaves):
            why = "is never quantised"
        elif init == "lora_ga" and 2 * target.rank > min(target.shape):
            why = f"has {min(target.shape)} directions, and needs 2 * rank = {2 * target.rank}"
        if why is not None:
            refused.setdefault(why, target)
    for why, target in refused.items():
        yield (
            f"init={init} does not support {dotted(target.path)}, which {why}; leave it out of "
            f"target_modules{' or lower its rank' if 'rank' in why else ''}"
        )


def dense_problems(params: Mapping, found: Trainable) -> Iterable[str]:
    """Yield settings that train weights of a quantised base."""
    config = found.config
    for whole in found.whole:
        if _is_quantized(params, whole.path):
            setting = (
                "method=full"
                if config.trains_everything
                else f"modules_to_save={config.modules_to_save!r}"
            )
            yield f"{setting} trains the weights of {dotted(whole.path[:-1])}{_QUANTISED}"
            return


def _is_quantized(params: Mapping, path: Path) -> bool:
    return isinstance(flatten(params).get(path), NF4Weight | Int8Weight)
