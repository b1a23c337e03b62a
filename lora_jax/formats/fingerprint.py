"""Fingerprint of the base of an adapter: digests of weights, tokenizer and chat template.

    fingerprint = {"base": "sha256:9f2c..", "tokenizer": "41aa..", "template": "c07e.."}

Checkpoints and the lora_jax.json of adapters store it. An adapter on another base runs without an
error and gives bad answers; so a part that differs is refused, unless the caller lists it in
`allow_change`.
"""

import hashlib
import json
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lora_jax import hosts, models
from lora_jax.config import expand, read_json
from lora_jax.errors import raise_all
from lora_jax.formats import digests
from lora_jax.formats.tensors import Tensor, are_equal, list_tensors
from lora_jax.tree import TIED_EMBEDDINGS

PARTS = ("base", "tokenizer", "template")


def take(directory: str | Path, tokenizer: Any, template: str) -> dict[str, str]:
    """Compute the fingerprint of a model directory with its tokenizer and the text of the chat
    template in use.

    Raises:
        UserError: as `base_digest`.
    """
    directory = expand(directory)
    return {"base": base_digest(directory), **take_texts(tokenizer, template)}


def take_texts(tokenizer: Any, template: str) -> dict[str, str]:
    """Compute the parts of a fingerprint that need no weights."""
    return {"tokenizer": tokenizer_digest(tokenizer), "template": _digest(template)}


def start(directory: str | Path) -> Future[str]:
    """Start `base_digest` in a daemon thread, which does not keep the process alive."""
    future: Future[str] = Future()

    def work() -> None:
        try:
            future.set_result(base_digest(directory))
        except BaseException as error:  # raised again by `future.result()`
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def base_digest(directory: str | Path) -> str:
    """Return a digest of the names, shapes, dtypes and bytes of all tensors, independent of their
    division into files.

    Tensors without information are left out: a copy of the embedding as a tied head, and rotary
    frequencies, which some versions of transformers wrote. A head that differs from the embedding
    is included, whatever the config says. All files are read, once per state (`digests`).

    Raises:
        UserError: no readable safetensors, or no readable config.json.
    """
    directory = expand(directory)
    tensors = list_tensors(directory)
    tied = models.ties_embeddings(read_json(directory / "config.json"))
    copy = _copied_head(tensors) if tied else None
    sums = digests.of_files(tensors)
    return digests.join(
        (name, tensor.shape, tensor.dtype.name, sums[name])
        for name, tensor in tensors.items()
        if not name.endswith("rotary_emb.inv_freq") and name != copy
    )


def _copied_head(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of an output head that is a copy of the embedding, or None."""
    ends = tuple(f"{name}.weight" for name in TIED_EMBEDDINGS)
    heads = [name for name in tensors if name.endswith("lm_head.weight")]
    embeddings = [name for name in tensors if name.endswith(ends)]
    if len(heads) != 1 or len(embeddings) != 1:
        return None
    return heads[0] if are_equal(tensors[heads[0]], tensors[embeddings[0]]) else None


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of all that affects the ids of a text; padding and truncation do not."""
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
    """Compare the parts that a stored fingerprint and the current one have in common.

    The base digest of an earlier version, made from samples, cannot be compared: a note says so.

    Args:
        stored: the fingerprint in a file.
        found: that of the model in use.
        what: the name of the file's owner, for messages.
        allow_change: parts that may differ.

    Raises:
        UserError: parts that differ and are not in `allow_change`, all of them listed.
    """
    differs = {
        "base": "the base model's weights are not those",
        "tokenizer": "the tokenizer is not the one",
        "template": "the chat template is not the one",
        "data": "the training examples are not those",
        "held_out": "the held-out examples are not those",
    }
    compared = [name for name in differs if name in stored and name in found]
    if "base" in compared and _scheme(stored["base"]) != _scheme(found["base"]):
        compared.remove("base")
        hosts.note(
            f"{what} has a digest of its base by another version of lora_jax, which cannot be "
            "compared: this may not be the base that it was made with"
        )
    raise_all(
        [
            f"{name}: {differs[name]} that {what} was made with ({digests.shorten(stored[name])}, "
            f"here {digests.shorten(found[name])}); use the same, or list {name!r} in allow_change"
            + (f" (--allow-change {name} on the command line)" if name in PARTS else "")
            for name in compared
            if stored[name] != found[name] and name not in allow_change
        ]
    )


def _scheme(digest: str) -> str:
    """Return the scheme of a digest; empty for the first ones, made from samples of tensors."""
    return digest.rpartition(":")[0]
