"""The reference of an objective: the frozen model that log-probabilities are compared with.

It is the base of the run with a small tree of adapters of its own, or with none, so no second model
is in memory. Its log-probabilities are an input of the train step. Of data that are read at once
they are computed before the first step and cached; of a stream, before each step.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh
from safetensors import SafetensorError

from lora_jax import data, formats, hosts, sharding, tree
from lora_jax.cache import cache_directory, write_atomic, write_entry
from lora_jax.config import AdapterConfig, Config, expand, is_directory, shown, virtual_tokens
from lora_jax.errors import UserError
from lora_jax.formats import fingerprint
from lora_jax.models.common import Model
from lora_jax.report.progress import Display
from lora_jax.session import Session
from lora_jax.train.checksums import digest_leaves
from lora_jax.train.environment import digest_content, environment, starts_as_base
from lora_jax.train.step import make_log_probs

FILE = "reference.bin"  # of a run: the adapters of its reference
Given = tuple[Mapping, AdapterConfig]  # adapters with their settings
_CHECKSUM = 32  # bytes of a sha256


@dataclass(frozen=True)
class Reference:
    """The reference of a run.

    model: with the weights of the run
    adapters: on the mesh; None: the base alone
    settings: of these adapters
    """

    config: Config
    model: Model
    mesh: Mesh
    adapters: Any = None
    settings: AdapterConfig | None = None

    @cached_property
    def log_probs(self) -> Callable:
        """The compiled `make_log_probs`."""
        own = self.config.adapter
        places = virtual_tokens(own) if own.trains_prompt else 0
        return make_log_probs(self.model, self.config, self.settings, places)

    @cached_property
    def identity(self) -> Any:
        """Settings and digest of its adapters; None for the base alone."""
        return self.settings and [dataclasses.asdict(self.settings), digest_leaves(self.adapters)]

    def attach(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Return a batch on the mesh with its reference log-probabilities."""
        if "reference_log_probs" in batch:
            return batch
        found = self.log_probs(self.adapters, self.model.params, batch)
        return {**batch, "reference_log_probs": found}

    def save(self, file: Path) -> None:
        """Write the adapters to a file, for a run that is resumed."""
        if self.settings is None:
            return
        leaves = tree.flatten(self.adapters)
        arrays = {tree.dotted(path): sharding.gather_to_host(x) for path, x in leaves.items()}
        if hosts.is_main():
            about = {"settings": json.dumps(dataclasses.asdict(self.settings))}
            content = safetensors.numpy.save(arrays, about)
            checksum = hashlib.sha256(content).digest()
            write_atomic(file, checksum, content, partial=f".{FILE}")


def own_reference(config: Config, adapters: Mapping) -> Given | None:
    """Return the adapters of `objective.reference=start`, where these change the base."""
    wanted = config.train.needs_reference and config.objective.reference == "start"
    return (adapters, config.adapter) if wanted and not starts_as_base(config.adapter) else None


def saved_reference(config: Config, file: Path) -> Given | None:
    """Return the adapters of the reference of a resumed run; None where it is the base.

    Raises:
        UserError: as `load_saved`.
    """
    name = config.objective.reference
    is_base = name == "base" or (name == "start" and starts_as_base(config.adapter))
    return None if is_base or not config.train.needs_reference else load_saved(file)


def load_saved(file: Path) -> Given:
    """Return the adapters that `Reference.save` wrote, and their settings.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        content = file.read_bytes()
        checksum, content = content[:_CHECKSUM], content[_CHECKSUM:]
        if hashlib.sha256(content).digest() != checksum:
            raise ValueError("its checksum differs")
        arrays = safetensors.numpy.load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        settings = AdapterConfig(**json.loads(header["__metadata__"]["settings"]))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{file} holds the reference of the run and is missing or damaged ({error}): start a "
            "new run"
        ) from error
    return tree.unflatten({tuple(name.split(".")): x for name, x in arrays.items()}), settings


def read_reference(session: Session) -> Given | None:
    """Return the adapter of `objective.reference`, if that is a directory.

    Raises:
        UserError: no adapter directory; one that does not fit the model or the virtual tokens of
            the run, or was trained on another base.
    """
    config, name = session.config, session.config.objective.reference
    if not config.train.needs_reference or name in ("start", "base"):
        return None
    directory = expand(name, "objective.reference")
    if not is_directory(directory, f"objective.reference={name!r}"):
        raise UserError(
            f"objective.reference={shown(repr(name))} is neither start nor base, and no directory; "
            "give a PEFT adapter directory over the same model"
        )
    adapters, settings = formats.read_adapter(directory, session.model.params, session.model)
    own = config.adapter
    mine, theirs = (virtual_tokens(x) if x.trains_prompt else 0 for x in (own, settings))
    if theirs not in (0, mine):
        raise UserError(
            f"objective.reference={name!r} puts {theirs} virtual tokens before a text, and this "
            f"run has {mine or 'none'}; choose another reference"
        )
    stored = formats.read_fingerprint(directory)
    fingerprint.check(stored, session.fingerprint, str(directory), config.allow_change)
    return adapters, settings


def make_reference(config: Config, model: Model, mesh: Mesh, given: Given | None) -> Reference:
    """Return the reference with the adapters `given` with their settings; None: the base."""
    if given is None:
        return Reference(config, model, mesh)
    adapters, settings = given
    specs = sharding.adapter_specs(adapters, model.params, model.rules, mesh)
    # Copies: the train step donates the adapters that it begins with.
    with jax.set_mesh(mesh):
        placed = sharding.place(jax.tree.map(jnp.array, adapters), specs, mesh)
        placed = jax.tree.map(jnp.copy, placed)
    return Reference(config, model, mesh, placed, settings)


# Log-probabilities of all training data


def with_reference(
    loader: data.Loader | data.Mixture,
    reference: Reference,
    base: str,
    display: Display,
) -> data.Loader | data.Mixture:
    """Return a loader of the same batches with reference log-probabilities. `base` is the digest of
    the weights.
    """
    loaders = loader.loaders if isinstance(loader, data.Mixture) else {"": loader}
    found = {
        name: one.with_examples(_examples(one, loader.row_length, reference, base, display))
        for name, one in loaders.items()
    }
    return loader.with_loaders(found) if isinstance(loader, data.Mixture) else found[""]


def _examples(
    loader: data.Loader, length: int, reference: Reference, base: str, display: Display
) -> list[data.Example]:
    """Return the examples of a loader with their log-probabilities, from the cache if it has them.
    They are computed in the rows of the run, so that they equal the model's own at its first step.
    """
    config = reference.config
    file = None
    if config.data.cache:
        key = digest_content(_key(loader, length, reference, base))
        file = cache_directory() / "reference" / f"{key}.bin"
    ends = np.cumsum([0, *(len(one.tokens) for one in loader.examples)])
    values = _read(file, int(ends[-1])) if file is not None else None
    # All hosts compute, or none does.
    if hosts.agree(int(values is None)):
        values = _compute(loader, length, reference, ends, display)
        if file is not None and hosts.is_main():
            _write(file, values, display)
    else:
        display.console.print("reference: log-probabilities of an earlier run (data.cache)")
    assert values is not None
    return [
        dataclasses.replace(one, reference=values[start:end])
        for one, start, end in zip(loader.examples, ends, ends[1:], strict=False)
    ]


def _compute(
    loader: data.Loader, length: int, reference: Reference, ends: np.ndarray, display: Display
) -> np.ndarray:
    """Return the log-probabilities of all examples, one after the other."""
    values = np.zeros(int(ends[-1]), np.float32)
    size, rows = loader.batch_size, loader.packed
    batches = range(0, len(rows), size)
    with display.phase("reference log-probabilities", len(batches), "batches") as phase:
        for first in batches:
            chosen = rows[first : first + size]
            texts = [[loader.examples[i] for i in row] for row in chosen]
            batch = loader.stack(texts + [[]] * (size - len(chosen)), length)
            placed = reference.attach(sharding.place_batch(batch, reference.mesh))
            found = sharding.gather_to_host(placed["reference_log_probs"])
            for row, indices, own in zip(found, chosen, texts, strict=False):
                for i, slots in zip(indices, data.slots(own, loader.share_prompts), strict=True):
                    values[ends[i] : ends[i + 1]] = row[slots]
            phase.advance()
    return values


def _key(loader: data.Loader, length: int, reference: Reference, base: str) -> dict[str, Any]:
    """Return everything that the log-probabilities depend on, to the last bit."""
    config, train = reference.config, reference.config.train
    return {
        "base": base,
        "config.json": digest_content(reference.model.hf_config),
        "base_dtype": config.base_dtype,
        "changed": config.adapter.changes_base and [config.adapter.init, config.seed],
        "reference": reference.identity,
        "virtual": virtual_tokens(config.adapter) if config.adapter.trains_prompt else 0,
        "examples": _digest(loader.examples),
        "rows": digest_content([length, loader.share_prompts, loader.packed]),
        "batch": [train.batch_size, train.micro_batch_size],
        "train": [train.compute_dtype, train.attention, train.loss_chunk],
        **environment(reference.mesh),
    }


def _digest(examples: Sequence[data.Example]) -> str:
    total = hashlib.sha256()
    for one in examples:
        for part in (repr(one.second_start).encode(), one.tokens.data, one.loss_weights.data):
            total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def _read(file: Path, tokens: int) -> np.ndarray | None:
    """Return the values of an entry; None if it is missing or damaged."""
    try:
        content = file.read_bytes()
        if hashlib.sha256(content[_CHECKSUM:]).digest() != content[:_CHECKSUM]:
            return None
        values = np.frombuffer(content[_CHECKSUM:], np.float32)
    except (OSError, ValueError):
        return None
    return values if len(values) == tokens else None


def _write(file: Path, values: np.ndarray, display: Display) -> None:
    content = values.tobytes()
    try:
        write_entry(file, hashlib.sha256(content).digest(), content)
    except OSError as error:
        reason = error.strerror or error
        display.console.print(
            f"note: the log-probabilities cannot be stored in {file.parent}: {reason}"
        )
