"""Rows of answers to compare, to examples.

    tokens   <prompt> <chosen answer> <prompt> <rejected answer>

An answer with a label is paired with the answer of the next row, behind its own prompt, from which
KTO estimates how far the model has moved. Both texts of an example are in one row of a batch, and
count together for `max_length`.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from lora_jax.data.examples import CHOSEN, OTHER, REJECTED, Counts, Example, cut, join
from lora_jax.data.render import Rendering
from lora_jax.data.rows import JudgedRow, PairRow, Row
from lora_jax.data.sources import raise_first
from lora_jax.data.templates import render_rows
from lora_jax.data.tokens import tokenize_texts
from lora_jax.errors import UserError

ComparedRow = PairRow | JudgedRow
Encoded = tuple[Example, bool]  # a text, and True if its prompt alone gives the same first tokens


def encode_pairs(
    rows: Sequence[ComparedRow],
    rendering: Rendering,
    *,
    max_length: int,
    too_long: str = "truncate",
    on_bad_row: str = "error",
) -> tuple[list[Example], Counts]:
    """Encode rows of one kind as `templates.encode_rows` does. `max_length` is for both texts of an
    example: the longer one is cut first.

    Raises:
        UserError: as `encode_all`; answers with the same tokens; a single row with a label.
    """
    texts, problems, unended = _encode_texts(rows, rendering)
    found: list[Example] = []
    usable = [row for row in rows if all(id(text) in texts for text in row.texts)]
    pairs = _judged(usable, texts) if isinstance(rows[0], JudgedRow) else _pairs(usable, texts)
    tally, longest = Counter[str](), 0
    for row, example in pairs:
        length = len(example.tokens)
        longest = max(longest, length)
        if example.roles == (CHOSEN, REJECTED) and _are_equal(example):
            problems.append(f"{row.where}: 'chosen' and 'rejected' have the same tokens")
        elif too_long == "error" and length > max_length:
            problems.append(
                f"{row.where}: the two texts have {length} tokens together, more than "
                f"data.max_length={max_length}"
            )
        elif (fitted := cut(example, max_length, too_long)) is None:
            tally["dropped"] += 1
        else:
            found.append(fitted)
            tally["truncated"] += length > max_length
            tally["unaligned"] += not all(texts[id(text)][1] for text in row.texts)
    bad = len(rows) - len(found) - tally["dropped"]
    if on_bad_row != "drop" or bad == len(rows):
        raise_first([*dict.fromkeys(problems)])
    return found, Counts(
        examples=len(found),
        supervised_tokens=sum(int(np.count_nonzero(one.loss_weights)) for one in found),
        total_tokens=sum(len(one.tokens) for one in found),
        truncated=tally["truncated"],
        dropped=tally["dropped"],
        longest=longest,
        unaligned=tally["unaligned"],
        bad=bad,
        unended_answers=unended,
    )


def _encode_texts(
    rows: Sequence[ComparedRow], rendering: Rendering
) -> tuple[dict[int, Encoded], list[str], int]:
    """Return the texts of all rows by the identity of their conversations, the problems of others,
    and the number of texts with an earlier answer that has no end.
    """
    flat: list[Row] = [text for row in rows for text in row.texts]
    found = render_rows(flat, rendering)
    problems, texts, unended = found.described(), {}, 0
    made = tokenize_texts(found.rows, found.items, rendering.tokenizer)
    for row, item, (example, aligned) in zip(found.rows, found.items, made, strict=True):
        if example.loss_weights.any():
            texts[id(row)] = example, aligned
            unended += bool(getattr(item, "unended", False))
        else:
            problems.append(f"{row.where}: no token of an answer is supervised")
    return texts, problems, unended


def _pairs(
    rows: Sequence[ComparedRow], texts: dict[int, Encoded]
) -> list[tuple[ComparedRow, Example]]:
    found = []
    for row in rows:
        first, second = (texts[id(text)][0] for text in row.texts)
        found.append((row, join(first, second, (CHOSEN, REJECTED))))
    return found


def _judged(
    rows: Sequence[ComparedRow], texts: dict[int, Encoded]
) -> list[tuple[ComparedRow, Example]]:
    """Pair every answer with that of the next row; the last one with that of the first."""
    if len(rows) == 1:
        raise UserError(
            f"{rows[0].where}: the only row; train.objective=kto compares with the answers of "
            "other rows, and needs two"
        )
    own = [texts[id(row.texts[0])][0] for row in rows]
    found = []
    for row, example, after in zip(rows, own, [*own[1:], *own[:1]], strict=True):
        role = CHOSEN if isinstance(row, JudgedRow) and row.desirable else REJECTED
        found.append((row, join(example, _with_answer(example, after), (role, OTHER))))
    return found


def _with_answer(example: Example, after: Example) -> Example:
    """Return the prompt of an example with the answer of another one."""
    end, start = (int(np.argmax(one.loss_weights > 0)) for one in (example, after))
    return Example(
        np.concatenate([example.tokens[:end], after.tokens[start:]]),
        np.concatenate([example.loss_weights[:end], after.loss_weights[start:]]),
        example.where,
    )


def _are_equal(example: Example) -> bool:
    first, second = example.texts
    return np.array_equal(first.tokens, second.tokens)
