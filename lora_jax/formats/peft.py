"""PEFT adapter directories <-> adapter trees.

    tree   model/layers/self_attn/q_proj/lora_a                              (layers, in, rank)
    file   base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight    (rank, in)

`adapter_config.json` (`peft_config`, `peft_config_reader`) and `adapter_model.safetensors`
(`peft_tensors`) are PEFT's; `lora_jax.json` holds what PEFT has no field for. It and the tensors
carry a digest of the tensors (`peft_digest`). Adapters of an init that changes the base are written
with twice the rank over the original base. Adapters of parts of a fused projection are joined into
one, whose rank is the sum. `peft_virtual` has virtual tokens, and `peft_vera` VeRA.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax
import numpy as np

from lora_jax import models, tree
from lora_jax.adapters.low_rank import as_plain
from lora_jax.config import AdapterConfig, expand, read_json
from lora_jax.config.text import exists
from lora_jax.errors import UserError, raise_all
from lora_jax.formats import digests, peft_vera, peft_virtual
from lora_jax.formats.directories import new_directory
from lora_jax.formats.names import unwrap
from lora_jax.formats.peft_config import saved_problems, to_peft_config
from lora_jax.formats.peft_config_reader import from_peft_config
from lora_jax.formats.peft_digest import FIELD, METADATA, WEIGHTS, checked
from lora_jax.formats.peft_forms import (
    EXPERTS,
    is_parameter,
    with_one_scale,
    with_whole_matrices,
    within_limits,
)
from lora_jax.formats.peft_saved import with_saved_modules
from lora_jax.formats.peft_tensors import PREFIX, check, copies, layout, pack, unpack
from lora_jax.formats.serving import unservable
from lora_jax.formats.side_files import copy_side_files, read_eos, write_json
from lora_jax.formats.tensors import read_floats, write_tensors
from lora_jax.models.common import Model
from lora_jax.sharding import place_adapters
from lora_jax.targets import Trainable, as_trainable, find_trainable

_PROFILES = ("vllm",)


class AdapterDetails(TypedDict, total=False):
    """Contents of an adapter directory in addition to the adapter.

    task_type: PEFT's name of the model's kind; by default "CAUSAL_LM"
    chat_template: replaces the chat templates of `source`
    extra: joins lora_jax.json
    profile: "vllm" gives all modules one rank and one alpha, which every version of vLLM and
        SGLang reads; `source` names the family, on which it depends what they load
    card: becomes README.md
    """

    task_type: str
    chat_template: str | None
    extra: Mapping[str, Any] | None
    profile: str | None
    card: str | None


def write_adapter(
    target: str | Path,
    adapters: Mapping,
    params: Mapping,
    config: AdapterConfig | Trainable,
    *,
    base_model: str,
    source: str | Path | None = None,
    **details: Unpack[AdapterDetails],
) -> None:
    """Write a PEFT adapter directory; equal adapters give equal bytes.

    `params` may hold arrays or shapes. `source` is the base model's directory, whose tokenizer is
    copied. `details` are those of `AdapterDetails`.

    With adapted routers or experts the file has no dropout, as PEFT has none for them.

    Raises:
        UserError: what PEFT has no form for (`peft_problems`); with a profile also what its reader
            cannot load; an unknown profile.
        TypeError: details that do not exist.
    """
    if unknown := details.keys() - AdapterDetails.__annotations__.keys():
        raise TypeError(f"write_adapter() has no argument {', '.join(sorted(unknown))}")
    task_type, profile = details.get("task_type", "CAUSAL_LM"), details.get("profile")
    source = None if source is None else expand(source)
    target = expand(target)
    found = as_trainable(params, config)
    config = found.config
    if profile is not None and profile not in _PROFILES:
        raise UserError(f"profile={profile!r} is not one of: {', '.join(_PROFILES)}")
    unserved = unservable(found, _model_type(source)) if profile else []
    raise_all(peft_problems(found) + saved_problems(config, params) + unserved)
    leaves: Any = tree.flatten(jax.device_get(adapters))
    if config.trains_virtual_tokens:
        tensors = peft_virtual.pack(tree.unflatten(leaves))
        content = peft_virtual.to_peft_config(found, base_model, task_type)
    elif config.trains_vera:
        tensors = pack(leaves, found)
        content = peft_vera.to_peft_config(found, params, base_model, task_type)
    else:
        if config.changes_base:
            leaves, found = as_plain(leaves, found)
        widths = {path: leaf.shape[-1] for path, leaf in tree.flatten(params).items()}
        leaves, found = within_limits(*with_whole_matrices(leaves, found, widths))
        if profile:
            leaves, found = with_one_scale(leaves, found)
        tensors = pack(leaves, found)
        content = to_peft_config(found, params, base_model, task_type)
    with new_directory(target) as temporary:
        file, digest = temporary / WEIGHTS, digests.of_arrays(tensors)
        write_tensors(file, tensors, {"format": "pt", METADATA: digest})
        write_json(temporary / "adapter_config.json", content)
        about = {"base_model": base_model, **(details.get("extra") or {}), FIELD: digest}
        write_json(temporary / "lora_jax.json", about)
        if (card := details.get("card")) is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        if source is not None:
            copy_side_files(source, temporary, details.get("chat_template"))


def _model_type(source: Path | None) -> str | None:
    file = None if source is None else source / "config.json"
    return read_json(file).get("model_type") if file is not None and exists(file) else None


def peft_problems(found: Trainable, base: Model | None = None) -> list[str]:
    """List reasons why PEFT cannot represent these adapters, or would read them otherwise over the
    files of `base`, with remedies; empty if there are none.
    """
    config = found.config
    if config.trains_everything:
        return ["method=full trains the model itself, which is no adapter; use --format hf"]
    if config.trains_virtual_tokens:
        return peft_virtual.problems(config)
    problems = [f"use_dora=true and {text}" for text in _dora_problems(found)]
    problems += peft_vera.problems(found) if config.trains_vera else []
    if config.init == "loftq" and config.changes_base:
        problems.append(
            f"init=loftq and loftq_iter={config.loftq_iter}: the adapter belongs to a quantised "
            "base that is not the model's own; set loftq_iter to 1, or export with --format hf "
            "(export.peft=false, export.merged=true)"
        )
    embeddings = [t.path for t in found.targets if t.leaf == "embedding"]
    embeddings += [w.path[:-1] for w in found.whole if w.path[-1] == "embedding"]
    unknown = [tree.dotted(path) for path in embeddings if path[-1] != "embed_tokens"]
    if config.ensure_weight_tying and unknown:
        problems.append(
            "ensure_weight_tying=true: PEFT keeps an output head tied to an embedding that is "
            f"called embed_tokens only, and this is {unknown[0]}; export with --format hf, or set "
            "it to false"
        )
    saved = {
        name
        for whole in found.whole
        if tree.has_experts(whole.path)
        for name, chosen in zip(whole.names, whole.chosen, strict=True)
        if chosen
    }
    for name in sorted(saved):
        home = name.rpartition(".")[0]
        if not all(f"{home}.{stack}" in saved for stack in EXPERTS):
            problems.append(
                f"modules_to_save={config.modules_to_save!r}: in PEFT {name} is a parameter of "
                f"{home}, which is saved in full; name that, or export with --format hf"
            )
            break
    if base is None:
        return problems
    return problems + saved_problems(config, base.params) + _token_problems(found, base)


def _token_problems(found: Trainable, base: Model) -> list[str]:
    """Yield problems of trained tokens. PEFT ties those of the embedding to the head if config.json
    says so, whatever head the files have.
    """
    file = base.directory / "config.json"
    untied = tree.tied_embedding(base.params) is None
    if not found.rows or not untied or not models.ties_embeddings(read_json(file)):
        return []
    return [
        f"trainable_token_indices={found.config.trainable_token_indices!r}: {file} ties the output "
        "head to the embedding, but the files have a head of their own, which PEFT would replace; "
        "set tie_word_embeddings to false in that file, or export with --format hf "
        "(export.peft=false, export.merged=true)"
    ]


def _dora_problems(found: Trainable) -> Iterable[str]:
    config = found.config
    if not config.use_dora:
        return
    remedy = "export with --format hf, or leave one out"
    if config.ensure_weight_tying and any(t.leaf == "embedding" for t in found.targets):
        yield (
            "ensure_weight_tying=true: PEFT gives embedding and output head separate magnitudes, "
            f"which then differ; {remedy}"
        )
    named = sorted({tree.dotted(t.path) for t in found.targets if is_parameter(t)})
    if named:
        yield (
            f"target_modules={config.target_modules!r}: PEFT has no DoRA for routers and stacks of "
            f"experts, and these are adapted: {', '.join(named)}; {remedy}"
        )
    adapted = {n for t in found.targets for n, r in zip(t.names, t.ranks, strict=True) if r}
    for name in sorted(adapted):
        whole, _, part = name.rpartition(".")
        parts = tree.FUSED.get(whole.rpartition(".")[2], ())
        missing = [other for other in parts if f"{whole}.{other}" not in adapted]
        if part in parts and missing:
            yield (
                f"target_modules={config.target_modules!r}: PEFT's DoRA is over all of {whole}, of "
                f"which {', '.join(missing)} is not adapted; name it too, or export with "
                "--format hf"
            )
            break


def read_config(directory: str | Path, params: Mapping) -> AdapterConfig:
    """Read the `AdapterConfig` of a PEFT directory, by PEFT's rules.

    Raises:
        UserError: missing or damaged files, an adapter that is not LoRA, active fields that are not
            supported; what `find_trainable` refuses.
    """
    directory = expand(directory)
    file = directory / "adapter_config.json"
    if not exists(file):
        raise UserError(f"{directory} is no PEFT adapter directory: it has no adapter_config.json")
    content = read_json(file)
    kind = content.get("peft_type")
    if kind not in (kinds := ("LORA", *peft_virtual.KINDS, "VERA")):
        raise UserError(
            f"{file}: peft_type={kind!r} is not supported; these are: {', '.join(kinds)}"
        )
    readers = {"LORA": from_peft_config, "VERA": peft_vera.from_peft_config}
    read = readers.get(kind, peft_virtual.from_peft_config)
    try:
        return read(content, params)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def read_fingerprint(directory: str | Path) -> dict[str, str]:
    """Read what the adapter was trained on, by `lora_jax.formats.fingerprint`; empty for adapters
    of other tools.

    Raises:
        UserError: lora_jax.json is damaged.
    """
    directory = expand(directory)
    return {name: str(digest) for name, digest in _recorded(directory, "fingerprint").items()}


def read_template_kwargs(directory: str | Path) -> dict[str, Any]:
    """Read the `data.chat_template_kwargs` that the adapter was trained with; empty for adapters
    of other tools.

    Raises:
        UserError: lora_jax.json is damaged.
    """
    directory = expand(directory)
    return _recorded(directory, "chat_template_kwargs")


def read_system_prompt(directory: str | Path) -> str | None:
    """Read the `data.system_prompt` that the adapter was trained with; None if there was none, or
    none is recorded.

    Raises:
        UserError: lora_jax.json is damaged.
    """
    file = expand(directory) / "lora_jax.json"
    stored = read_json(file).get("system_prompt") if exists(file) else None
    if not isinstance(stored, str | None):
        raise UserError(f"{file} is damaged: system_prompt={stored!r} must be a text")
    return stored


def _recorded(directory: Path, name: str) -> dict[str, Any]:
    file = directory / "lora_jax.json"
    if not exists(file):
        return {}
    stored = read_json(file).get(name, {})
    if not isinstance(stored, dict):
        raise UserError(f"{file} is damaged: {name}={stored!r} must be an object")
    return stored


def read_stops(directory: str | Path) -> list[int]:
    """Read the IDs that ended the answers in the adapter's training; none for adapters of other
    tools.

    Raises:
        UserError: lora_jax.json is damaged.
    """
    directory = expand(directory)
    file = directory / "lora_jax.json"
    return read_eos(file) if exists(file) else []


def read_adapter(
    directory: str | Path, params: Mapping, base: Model | None = None
) -> tuple[dict, AdapterConfig]:
    """Read adapters (float32) and their config from a PEFT directory, checked against the model
    that they are for, and placed as its weights are (`sharding.place_adapters`). `params` may hold
    arrays or shapes. With shapes, `base` is the model whose files have the weights that saved
    embeddings and heads are compared with.

    Raises:
        UserError: as `read_config`; and tensors that are missing, unexpected, mis-shaped, not
            finite or contradictory, all of them listed; a vocabulary that was resized; tensors
            that are not those of the digest that the file carries.
    """
    directory = expand(directory)
    config, file = read_config(directory, params), directory / WEIGHTS
    found = _expected(directory / "adapter_config.json", params, config)
    tensors, metadata = read_floats(file)
    with checked(file, tensors, metadata):
        return _unpack(file, tensors, found, params, base)


def _unpack(
    file: Path,
    tensors: dict[str, np.ndarray],
    found: Trainable,
    params: Mapping,
    base: Model | None,
) -> tuple[dict, AdapterConfig]:
    config = found.config
    known = set() if config.trains_virtual_tokens else {tensor.key for tensor in layout(found)}
    tensors = _with_usual_names(file, tensors, known, params)
    tensors, whole = with_saved_modules(file, tensors, known, config, params, base)
    if whole != config:
        config = whole
        found = _expected(file.parent / "adapter_config.json", params, config)
    if config.trains_virtual_tokens:
        return place_adapters(peft_virtual.unpack(tensors, found, str(file)), params), config
    if config.trains_vera:
        tensors = peft_vera.with_projections(tensors, found)
    for key in copies(tensors, found):
        del tensors[key]
    check(tensors, found, f"{file} does not fit the model and its adapter_config.json")
    return place_adapters(tree.unflatten(unpack(tensors, found)), params), config


def _expected(settings: Path, params: Mapping, config: AdapterConfig) -> Trainable:
    """Return the trainable weights of an adapter; errors name the file of its settings."""
    try:
        return find_trainable(params, config)
    except UserError as error:
        raise UserError(f"{settings}: {error}") from error


def _with_usual_names(
    file: Path, tensors: dict[str, np.ndarray], known: Collection[str], params: Mapping
) -> dict[str, np.ndarray]:
    """Return the tensors under PEFT's names of modules, where all have one other prefix: that of a
    wrapper, or of the bare model.
    """
    found = {}
    for name, new in unwrap(tensors, params).items():
        usual = PREFIX + new
        if usual in found:
            raise UserError(f"{file} holds {usual} under two names, one of them {name}")
        found[usual] = tensors[name]
    return found if len(found.keys() & known) > len(tensors.keys() & known) else tensors
