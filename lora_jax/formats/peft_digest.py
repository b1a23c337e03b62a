"""Digest of an adapter's tensors, in its file and in lora_jax.json next to it.

    adapter_model.safetensors   metadata {"format": "pt", "lora_jax.digest": "sha256:41aa.."}
    lora_jax.json               {"digest": "sha256:41aa..", ..}

A flipped bit, two layers that changed places and the tensors of another adapter all load without an
error: only a digest shows them.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax import hosts
from lora_jax.config import UserError, read_json
from lora_jax.formats.digests import of_arrays, shorten

WEIGHTS = "adapter_model.safetensors"
METADATA = "lora_jax.digest"
FIELD = "digest"
_JSON = "lora_jax.json"
_AGAIN = "copy the directory again, or export the adapter again"


def check_digest(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Compare the tensors that were read from `file`, whose metadata are given, with the digests
    in these and in lora_jax.json. A note says what cannot be compared.

    Raises:
        UserError: a digest is that of other tensors; lora_jax.json is damaged.
    """
    side = file.parent / _JSON
    described = file.name == WEIGHTS and side.exists()
    own, recorded = metadata.get(METADATA), _recorded(side) if described else None
    if own is None and recorded is None:
        lacking = f", and there is no {_JSON} to compare base, tokenizer and chat template with"
        hosts.note(
            f"{file} carries no digest, as files of other programs: its weights are not checked"
            + ("" if described else lacking)
        )
        return
    found = of_arrays(tensors)
    if own is None and recorded != found:
        raise UserError(
            f"{file} is not the file that {side} was written for: another program saved it later, "
            "as PEFT does when a loaded adapter is trained on and saved in its place, or it is "
            f'damaged. If you trained it on, remove "{FIELD}" from {_JSON}; otherwise {_AGAIN}'
        )
    if own is not None and own != found:
        raise UserError(
            f"{file} is damaged, or was changed after it was exported: it carries the digest "
            f"{shorten(own)}, and its tensors have {shorten(found)}; {_AGAIN}"
        )
    if recorded is not None and recorded != found:
        raise UserError(
            f"{file} and {side} are of two exports: the digest of the tensors is "
            f"{shorten(found)} there and {shorten(recorded)} here; {_AGAIN}"
        )
    if not described:
        hosts.note(
            f"{file.parent} has no {_JSON}: base, tokenizer and chat template of the adapter "
            "cannot be compared"
        )


def _recorded(side: Path) -> str | None:
    digest = read_json(side).get(FIELD)
    if digest is not None and not isinstance(digest, str):
        raise UserError(f"{side} is damaged: {FIELD}={digest!r} must be a string")
    return digest
