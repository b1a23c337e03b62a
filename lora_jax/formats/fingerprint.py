"""Digests of what an adapter was trained on: base weights, tokenizer, chat template.

    fingerprint = {"base": "sha256:9f2c..", "tokenizer": "41aa..", "template": "c07e.."}

Every checkpoint and the lora_jax.json of every adapter hold it. An adapter under another base runs
without an error and answers badly, so what does not fit is refused by name, unless the caller lists
that name in `allow_change`.
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
    """The fingerprint of a model directory with its tokenizer and the text of the chat template in
    use.

    Raises:
        UserError: as `base_digest`.
    """
    directory = expand(directory)
    return {"base": base_digest(directory), **take_texts(tokenizer, template)}


def take_texts(tokenizer: Any, template: str) -> dict[str, str]:
    """The parts of a fingerprint that need no weights."""
    return {"tokenizer": tokenizer_digest(tokenizer), "template": _digest(template)}


def start(directory: str | Path) -> Future[str]:
    """Begin `base_digest` in the background, in a thread that no process waits for when it ends."""
    future: Future[str] = Future()

    def work() -> None:
        try:
            future.set_result(base_digest(directory))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def base_digest(directory: str | Path) -> str:
    """Names, shapes, dtypes and bytes of every tensor, whatever files they are in.

    What says nothing about the model is left out: a copy of the embedding under the name of a tied
    head, and rotary frequencies, which some versions of transformers wrote. A head that differs
    from the embedding counts, whatever the config says.

    All of the files is read, once for each state of them (`digests`).

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
    """The name of an output head that is a copy of the embedding."""
    ends = tuple(f"{name}.weight" for name in TIED_EMBEDDINGS)
    heads = [name for name in tensors if name.endswith("lm_head.weight")]
    embeddings = [name for name in tensors if name.endswith(ends)]
    if len(heads) != 1 or len(embeddings) != 1:
        return None
    return heads[0] if are_equal(tensors[heads[0]], tensors[embeddings[0]]) else None


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
    """Compare a stored fingerprint with the one found; parts that only one of them has are not
    compared. Nor is the digest of a base that an earlier version took of samples: a note says so.

    Raises:
        UserError: parts that differ and are not in `allow_change`, all of them named.
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
    """The form of a digest. The first ones, of samples of every tensor, name none."""
    return digest.rpartition(":")[0]
