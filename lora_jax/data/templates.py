"""Rows to examples.

    example = encode(row, tokenizer, max_length=512)

    text          <|im_start|>user\\n 2+2? <|im_end|>\\n <|im_start|>assistant\\n 4 <|im_end|>
    loss_weights  0                                                            1 1

A conversation is rendered as one text and tokenised once. No special tokens are added: BOS occurs
as often as the template writes it. Every assistant turn is supervised, except those with
`train: false`: from the end of the generation prompt to the end of the turn, with its end-of-turn
token and without the whitespace that the template writes after it (`lora_jax.data.spans`). EOS is
added after an answer that has no end token. Turns after the last supervised one are left out.

A plain text is supervised from beginning to end, after BOS if the tokenizer adds one, and with EOS.
Rows of tokens are kept, except that their first weight is set to 0.

Keywords in `rendering` are the fields of `Rendering`: `system_prompt`, `chat_template`,
`chat_template_kwargs` and `template_date`. With `chat_template="none"`, prompt and completion are
joined unchanged, after BOS if the tokenizer adds one, and with EOS.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import numpy as np

from lora_jax.data.chat_templates import Template, find_template
from lora_jax.data.dates import with_date
from lora_jax.data.examples import Counts, Example, cut
from lora_jax.data.keys import check_read, describe_problems
from lora_jax.data.render import (
    Rendering,
    RenderingOptions,
    check_kwargs,
    content,
    conversation,
    render_prompt,
    resolve_template,
    with_kwargs,
)
from lora_jax.data.rows import (
    AnyRow,
    BadRow,
    JudgedRow,
    LabelRow,
    PairRow,
    Row,
    TextRow,
    TokenRow,
)
from lora_jax.data.sources import raise_first
from lora_jax.data.texts import Text, to_text, unsupervised
from lora_jax.data.tokens import bos_of, tokenize, tokenize_texts, with_bos
from lora_jax.errors import UserError


def encode(
    row: AnyRow,
    tokenizer: Any,
    *,
    max_length: int,
    too_long: str = "truncate",
    **rendering: Unpack[RenderingOptions],
) -> Example | None:
    """Encode one row as `encode_all` does; return None if that would drop it.

    Raises:
        UserError: see `encode_all`.

    Example:
        >>> from lora_jax import data
        >>> row = data.parse_row({"prompt": "one", "completion": "eins"}, "row")
        >>> example = data.encode(row, tokenizer, max_length=64)
        >>> tokenizer.decode(example.tokens[example.loss_weights > 0])  # what the loss covers
        'eins<|im_end|>'
    """
    settings = Rendering(tokenizer, **rendering)
    examples, _ = encode_rows([row], settings, max_length=max_length, too_long=too_long)
    return examples[0] if examples else None


def encode_all(
    rows: Sequence[AnyRow],
    tokenizer: Any,
    *,
    max_length: int,
    too_long: str = "truncate",
    on_bad_row: str = "error",
    **rendering: Unpack[RenderingOptions],
) -> tuple[list[Example], Counts]:
    """Encode every row as an `Example` of at most `max_length` tokens, and count what was done.

    too_long: for longer rows. "truncate" cuts them, and drops those without a supervised token
        after the cut; "drop" drops them; "error" refuses them
    on_bad_row: for rows without a supervised token, and for those that the template refuses.
        "error" refuses them; "drop" leaves them out

    Raises:
        UserError: no chat template, a bad one, or one that uses randomness; conversations that it
            refuses or rewrites; rows too long under "error"; rows without a supervised token; no
            example left; a tokenizer without offsets, or without EOS if that is needed.
    """
    examples, counts = encode_rows(
        rows,
        Rendering(tokenizer, **rendering),
        max_length=max_length,
        too_long=too_long,
        on_bad_row=on_bad_row,
    )
    if not examples:
        raise nothing_left(len(rows), counts, max_length, too_long)
    return examples, counts


def encode_rows(
    rows: Sequence[AnyRow],
    rendering: Rendering,
    *,
    max_length: int,
    too_long: str = "truncate",
    on_bad_row: str = "error",
) -> tuple[list[Example], Counts]:
    """Do the same as `encode_all`, but accept that no example is left."""
    found = render_rows(rows, rendering)
    if on_bad_row != "drop":
        raise_first(found.described())
    examples, longest, tally = _tokenize_rows(found, rendering.tokenizer, max_length, too_long)
    bad = len(found.bad) + len(found.problems)
    if on_bad_row != "drop" or bad == len(rows):
        raise_first(found.described())
    return examples, Counts(
        examples=len(examples),
        supervised_tokens=sum(int(np.count_nonzero(e.loss_weights)) for e in examples),
        total_tokens=sum(len(e.tokens) for e in examples),
        truncated=tally["truncated"],
        dropped=tally["dropped"],
        longest=longest,
        unaligned=tally["unaligned"],
        bad=bad,
        packed=sum(isinstance(row, TokenRow) and row.sequence == 0 for row in rows),
        left_out=tally["left_out"],
        empty_answers=tally["empty_answers"],
        unended_answers=tally["unended_answers"],
    )


def nothing_left(rows: int, counts: Counts, max_length: int, too_long: str) -> UserError:
    """Return the error for rows of which none became an example."""
    return UserError(
        f"no example is left of {rows} rows: the longest has {counts.longest} tokens, "
        f"data.max_length={max_length}, data.too_long={too_long!r}"
    )


def prompt_tokens(row: Row, tokenizer: Any, **rendering: Unpack[RenderingOptions]) -> np.ndarray:
    """Return the tokens before the last assistant turn, up to where its answer begins.

    Returns (time,) int32.

    Raises:
        UserError: see `encode_all`; the row begins with its answer.
    """
    return encode_prompt(row, Rendering(tokenizer, **rendering))


def encode_prompt(row: Row, rendering: Rendering) -> np.ndarray:
    """Do the same as `prompt_tokens`."""
    tokenizer = rendering.tokenizer
    check_kwargs(rendering)
    template = resolve_template(tokenizer, rendering.chat_template, row.tools)
    row = with_kwargs(row, rendering.chat_template_kwargs)
    messages = conversation(row, rendering.system_prompt)
    messages = messages[: len(messages) - len(row.messages) + row.answer_index]
    if template is None:
        text, bos = "".join(map(content, messages)), bos_of(tokenizer)
    else:
        template = with_date(template, rendering.template_date)
        text, bos = render_prompt(tokenizer, template, row, messages), []
    ids = tokenize(tokenizer, [text])[0][0]
    return np.asarray(with_bos(bos, ids, np.zeros(len(ids), np.float32))[0], np.int32)


# Steps of `encode_rows`


@dataclass(frozen=True)
class Rendered:
    """Rows that could be rendered, and the problems of the others."""

    rows: list[AnyRow] = field(default_factory=list)
    items: list[Text | Example] = field(default_factory=list)  # one for each of `rows`
    bad: list[tuple[str, str | BadRow]] = field(default_factory=list)  # (where, problem)
    problems: list[str] = field(default_factory=list)  # of other kinds

    def described(self) -> list[str]:
        return [*describe_problems(self.bad), *self.problems]


def render_rows(rows: Sequence[AnyRow], rendering: Rendering) -> Rendered:
    templates: dict[tuple, Template | None] = {}
    for row in rows:
        if isinstance(row, Row) and (key := _template_key(row)) not in templates:
            check_kwargs(rendering)
            templates[key] = find_template(row, rendering)
    found = Rendered()
    for row in rows:
        try:
            if isinstance(row, LabelRow):
                raise UserError(f"{row.where}: a label is for classifiers")
            if isinstance(row, PairRow | JudgedRow):
                raise UserError(f"{row.where}: answers to compare are for data.encode_pairs")
            if isinstance(row, TokenRow):
                item = _from_tokens(row)
            elif isinstance(row, Row):
                template = templates[_template_key(row)]
                check_read(row, template and template.source)
                full = with_kwargs(row, rendering.chat_template_kwargs)
                item = to_text(full, rendering, template)
            else:
                item = to_text(row, rendering, None)
        except BadRow as error:
            found.bad.append((row.where, error))
        except UserError as error:
            found.problems.append(str(error))
        else:
            found.items.append(item)
            found.rows.append(row)
    return found


def _tokenize_rows(
    found: Rendered, tokenizer: Any, max_length: int, too_long: str
) -> tuple[list[Example], int, Counter[str]]:
    """Return the examples, the length of the longest row, and counts for `Counts`.

    Problems of rows are added to `found`.
    """
    examples: list[Example] = []
    tally, longest = Counter[str](), 0
    made = tokenize_texts(found.rows, found.items, tokenizer)
    for row, item, (example, aligned) in zip(found.rows, found.items, made, strict=True):
        length = len(example.tokens)
        longest = max(longest, length)
        if not example.loss_weights.any():
            if isinstance(row, TokenRow) and row.sequence is not None:
                tally["left_out"] += 1
            else:
                found.problems.append(_unsupervised(row))
        elif too_long == "error" and length > max_length:
            found.problems.append(
                f"{example.where}: {length} tokens, more than data.max_length={max_length}"
            )
        elif (fitted := cut(example, max_length, too_long)) is None:
            tally["dropped"] += 1
        else:
            examples.append(fitted)
            tally["truncated"] += length > max_length
            tally["unaligned"] += not aligned
            tally["empty_answers"] += isinstance(item, Text) and item.empty
            tally["unended_answers"] += isinstance(item, Text) and item.unended
    return examples, longest, tally


def _template_key(row: Row) -> tuple[bool, str]:
    """Return a key of everything in a row that decides which template renders it."""
    return bool(row.tools), repr(row.chat_template_kwargs)


def _from_tokens(row: TokenRow) -> Example:
    weights = np.asarray(row.loss_weights, np.float32)
    weights[:1] = 0  # nothing precedes it, so it cannot be predicted
    return Example(np.asarray(row.tokens, np.int32), weights, row.where)


def _unsupervised(row: AnyRow) -> str:
    if isinstance(row, Row):
        return unsupervised(row.where)
    reason = "no weight after the first is above 0"
    if isinstance(row, TextRow):
        reason = "the text is a single token, with nothing before it to predict it from"
    return f"{row.where}: no token is supervised: {reason}"
