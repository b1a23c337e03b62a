"""Texts to tokens and loss weights.

Supervision is decided by position in the text, never by token id: EOS is learnt even if pad and EOS
are the same token. A token that begins in the prompt belongs to the prompt.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lora_jax.config import shown
from lora_jax.data.examples import Example
from lora_jax.data.render import tokenizer_name
from lora_jax.data.rows import AnyRow
from lora_jax.data.texts import Text
from lora_jax.errors import UserError

_BATCH = 1024  # texts per call of the tokenizer


def tokenize_texts(
    rows: Sequence[AnyRow], items: Sequence[Text | Example], tokenizer: Any
) -> Iterator[tuple[Example, bool]]:
    """Yield (example, aligned) for each text of a row; examples are passed on.

    The examples are not cut. aligned: the prompt alone gives the same first tokens

    Raises:
        UserError: a slow or damaged tokenizer, or one without EOS if an answer needs it.
    """
    bos = None
    for first in range(0, len(items), _BATCH):
        batch = items[first : first + _BATCH]
        texts = [item for item in batch if isinstance(item, Text)]
        full = iter(tokenize(tokenizer, [t.text for t in texts]))
        prompts = iter(tokenize(tokenizer, [t.text[: t.prompt_end] for t in texts]))
        for row, item in zip(rows[first : first + _BATCH], batch, strict=True):
            if isinstance(item, Example):
                yield item, True
                continue
            (ids, offsets), (prompt, _) = next(full), next(prompts)
            weights = _weights(offsets, item.spans)
            aligned = ids[: len(prompt)] == prompt
            if item.bos:  # before EOS is appended, which may be the same token
                bos = bos_of(tokenizer) if bos is None else bos
                ids, weights = with_bos(bos, ids, weights)
            if not (weights.any() and weights[-1] and ids[-1] in item.closing):
                if tokenizer.eos_token_id is None:
                    raise UserError(
                        f"{row.where}: no end-of-turn token ends the answer, and the tokenizer of "
                        f"{tokenizer_name(tokenizer)} has no EOS token to end it with"
                    )
                ids, weights = [*ids, tokenizer.eos_token_id], np.append(weights, np.float32(1))
            weights[:1] = 0  # nothing precedes it, so it cannot be predicted
            yield Example(np.asarray(ids, np.int32), weights, row.where), aligned


def _weights(offsets: Sequence[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    weights = np.zeros(len(starts), np.float32)
    for start, end in spans:
        # Some tokenizers trim spaces off the offsets, so that a token of spaces has an empty span
        # at its end. Hence both bounds on both sides.
        weights[(starts >= start) & (ends > start) & ((starts < end) | (ends <= end))] = 1
    return weights


def tokenize(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return (ids, character offsets) of each text, without adding special tokens.

    Raises:
        UserError: a slow or damaged tokenizer, or a text with an unpaired surrogate.
    """
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer of {tokenizer_name(tokenizer)} is a slow one without character "
            "offsets, which separate answers from prompts; give the model a tokenizer.json"
        )
    try:
        out = tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            padding=False,
            truncation=False,
            verbose=False,
        )
    except Exception as error:  # the tokenizers library raises bare exceptions
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            raise UserError("the chat template writes an unpaired surrogate") from error
        reason = shown(str(error))
        raise UserError(
            f"the tokenizer of {tokenizer_name(tokenizer)} is damaged: {reason}"
        ) from error
    return list(zip(out["input_ids"], out["offset_mapping"], strict=True))


def bos_of(tokenizer: Any) -> list[int]:
    """Return [BOS] if the tokenizer puts it before a text, else [].

    A tokenizer may put EOS after a text, and some use one token for both.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    full = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if plain:
        return [bos] if full[:1] == [bos] and full[1 : 1 + len(plain)] == plain else []
    return [bos] if tokenizer("")["input_ids"][:1] == [bos] else []


def with_bos(bos: list[int], ids: list[int], weights: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Return tokens and weights with `bos` in front, unless they begin with it."""
    if ids[: len(bos)] == bos:
        return list(ids), weights
    return [*bos, *ids], np.concatenate([np.zeros(len(bos), np.float32), weights])
