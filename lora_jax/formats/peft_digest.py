"""Digest of an adapter's tensors, in its file and in lora_jax.json next to it.

    adapter_model.safetensors   metadata {"format": "pt", "lora_jax.digest": "sha256:41aa.."}
    lora_jax.json               {"digest": "sha256:41aa..", ..}

A flipped bit, two layers that changed places and the tensors of another adapter all load without an
error: only a digest shows them.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lora_jax import hosts
from lora_jax.config import read_json, shown
from lora_jax.errors import UserError
from lora_jax.formats.digests import of_arrays, shorten

WEIGHTS = "adapter_model.safetensors"
METADATA = "lora_jax.digest"
FIELD = "digest"
_JSON = "lora_jax.json"
_AGAIN = "copy the directory again, or export the adapter again"


@contextlib.contextmanager
def checked(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> Iterator[None]:
    """Compare the tensors of a file with their digests, around a block that makes adapters of them:
    what makes them not fit may be the damage.

    Raises:
        UserError: as `find_change` says, with the error of the block, if there is one.
    """
    change = find_change(file, tensors, metadata)
    try:
        yield
    except UserError as error:
        if not change:
            raise
        raise UserError(f"{change}\n{error}") from error
    if change:
        raise UserError(change)


def find_change(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> str | None:
    """Compare the tensors that were read from `file`, whose metadata are given, with the digests
    in these and in lora_jax.json: what differs, and what to do. A note says what cannot be
    compared.

    Raises:
        UserError: lora_jax.json is damaged.
    """
    side = file.parent / _JSON
    described = file.name == WEIGHTS and side.exists()
    own, recorded = metadata.get(METADATA), _recorded(side) if described else None
    if own is None and recorded is None:
        lacking = f", and there is no {_JSON} to compare base, tokenizer and chat template with"
        hosts.note(
            f"{file} has no digest, as from another program: its weights are not checked"
            + ("" if described else lacking)
        )
        return None
    found = of_arrays(tensors)
    if own is None and recorded != found:
        return (
            f"{file} is not the file that {side} describes: another program saved it later (PEFT "
            "does, where a loaded adapter is trained further and saved over it), or it is "
            f'damaged. If you trained it further, remove "{FIELD}" from {_JSON}; otherwise {_AGAIN}'
        )
    if own is not None and own != found:
        return (
            f"{file} is damaged, or was changed after it was exported: its metadata have "
            f"the digest {shorten(own)}, its tensors {shorten(found)}; {_AGAIN}, or, "
            f"if the change is yours, save it without {METADATA} in its metadata"
        )
    if recorded is not None and recorded != found:
        return (
            f"{file} and {side} are of two exports: the tensors have the digest "
            f"{shorten(found)}, and the latter says {shorten(recorded)}; {_AGAIN}"
        )
    if not described:
        hosts.note(
            f"{file.parent} has no {_JSON}: base, tokenizer and chat template of the adapter "
            "cannot be compared"
        )
    return None


def _recorded(side: Path) -> str | None:
    digest = read_json(side).get(FIELD)
    if digest is not None and not isinstance(digest, str):
        raise UserError(f"{side} is damaged: {FIELD}={shown(repr(digest))} must be a string")
    return digest
