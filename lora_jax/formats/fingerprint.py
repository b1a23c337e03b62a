"""Digests of what an adapter was trained on: base weights, tokenizer, chat template.

    fingerprint = {"base": "9f2c..", "tokenizer": "41aa..", "template": "c07e.."}

It stands in every checkpoint and in every adapter's lora_jax.json. An adapter under another base
runs without an error and answers badly, so what does not fit is refused by name, unless the caller
lists that name in `allow_change`.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.config import raise_all, read_json
from lora_jax.formats.tensors import Tensor, are_equal, list_tensors
from lora_jax.tree import TIED_EMBEDDINGS

PARTS = ("base", "tokenizer", "template")
_WHOLE = 1 << 16  # bytes up to which a tensor is read whole
_SAMPLES, _SAMPLE = 64, 256  # of a larger one: so many pieces of so many bytes, evenly spread


def take(directory: str | Path, tokenizer: Any, template: str) -> dict[str, str]:
    """The fingerprint of a model directory with its tokenizer and the text of the chat template in
    use.

    Raises:
        UserError: the directory has no readable safetensors.
    """
    directory = Path(directory).expanduser()
    return {
        "base": base_digest(directory),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": _digest(template),
    }


def base_digest(directory: str | Path) -> str:
    """Names, shapes, dtypes and sampled bytes of every tensor, whatever files they lie in.

    What says nothing about the model is left out: a copy of the embedding under the name of a tied
    head, and rotary frequencies, which some versions of transformers wrote. A head that differs
    from the embedding counts, whatever the config says.
    """
    directory = Path(directory).expanduser()
    tensors = list_tensors(directory)
    # Where config.json does not say, as in Gemma's and GPT-2's, the family may tie them.
    tied = read_json(directory / "config.json").get("tie_word_embeddings", True)
    copy = _copied_head(tensors) if tied else None
    offsets = {file: _offsets(file) for file in {tensor.file for tensor in tensors.values()}}
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.endswith("rotary_emb.inv_freq") or name == copy:
            continue
        digest.update(f"{name} {tensor.shape} {tensor.dtype}\n".encode())
        start, end = offsets[tensor.file][name]
        data = np.memmap(tensor.file, np.uint8, "r", start, end - start) if end > start else b""
        if len(data) <= _WHOLE:
            digest.update(bytes(data))
        else:
            for first in np.linspace(0, len(data) - _SAMPLE, _SAMPLES).astype(int):
                digest.update(bytes(data[first : first + _SAMPLE]))
    return digest.hexdigest()


def _copied_head(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of an output head that is a copy of the embedding."""
    ends = tuple(f"{name}.weight" for name in TIED_EMBEDDINGS)
    heads = [name for name in tensors if name.endswith("lm_head.weight")]
    embeddings = [name for name in tensors if name.endswith(ends)]
    if len(heads) != 1 or len(embeddings) != 1:
        return None
    return heads[0] if are_equal(tensors[heads[0]], tensors[embeddings[0]]) else None


def _offsets(file: Path) -> dict[str, tuple[int, int]]:
    """Offsets of the bytes of each tensor in a safetensors file, from its header."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    return {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """Everything that decides which ids a text becomes; padding and truncation do not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    return _digest([content, tokenizer.bos_token_id, tokenizer.eos_token_id])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check(
    stored: Mapping[str, str], found: Mapping[str, str], what: str, allow_change: Collection[str]
) -> None:
    """Compare a stored fingerprint with that of what is at hand; parts that only one of them has
    are not compared.

    Raises:
        UserError: parts that differ and are not in `allow_change`, all of them named.
    """
    told = {
        "base": "the base model's weights are not those",
        "tokenizer": "the tokenizer is not the one",
        "template": "the chat template is not the one",
        "data": "the training examples are not those",
        "held_out": "the held-out examples are not those",
    }
    raise_all(
        [
            f"{name}: {told[name]} that {what} was made with ({stored[name][:12]}, here "
            f"{found[name][:12]}); use the same, or list {name!r} in allow_change"
            for name in told
            if name in stored
            and name in found
            and stored[name] != found[name]
            and name not in allow_change
        ]
    )
