"""Rows to tokens and loss weights.

    example = encode(row, tokenizer, max_length=512)

    text          <|im_start|>user\\n 2+2? <|im_end|>\\n <|im_start|>assistant\\n 4 <|im_end|>
    loss_weights  0                                                            1 1

A conversation is rendered whole and tokenised once, without further special tokens: BOS is there
as often as the template writes it. Supervised is, of every assistant turn but `train: false` ones,
the text from where the generation prompt ends to the end of the turn, with its end-of-turn token
and without the template's whitespace after it; `spans` tells how that is found. It is decided by
position in the text, never by token id: EOS is learnt where pad and EOS are the same token. A token
that begins in the prompt belongs to the prompt. EOS is put after an answer that nothing ends. What
follows the last supervised turn is left out of the example.

A plain text is supervised from end to end, after BOS if the tokenizer would add one, and with EOS.
Tokens are taken as they are; no more than their first weight is changed, to 0.

`chat_template` is throughout: None for the tokenizer's own, the path of a Jinja file, or "none" for
prompt and completion joined as they stand, after BOS if the tokenizer would add one, and with EOS.
`chat_template_kwargs` are arguments for it; those of a row come first. `template_date` is the day
(YYYY-MM-DD) that templates with `strftime_now` are given; None: today.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.config import shown
from lora_jax.data.dates import check_repeatable, with_date
from lora_jax.data.keys import check_read, describe_problems
from lora_jax.data.render import (
    Template,
    check_kwargs,
    content,
    conversation,
    end_tokens,
    name,
    read_template,
    render_prompt,
    resolve_template,
    sample,
    special_tokens,
    with_kwargs,
)
from lora_jax.data.rows import AnyRow, BadRow, LabelRow, Row, TextRow, TokenRow
from lora_jax.data.sources import raise_first
from lora_jax.data.spans import Text, to_text, unsupervised
from lora_jax.errors import UserError

_BATCH = 1024  # texts per call of the tokenizer


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised conversation; `loss_weights[i]` belongs to `tokens[i]` as a target."""

    tokens: np.ndarray  # (time,) int32
    loss_weights: np.ndarray  # (time,) float32, above 0 where the token is to be predicted
    where: str  # the row it came from
    # Where the second text of a pair begins, of examples whose last token is a label; else None.
    pair_start: int | None = None

    @property
    def length(self) -> int:
        """Tokens of its text; a label is none of them."""
        return len(self.tokens) - (self.pair_start is not None)


@dataclass(frozen=True)
class Counts:
    """Counts of the rows of a data set that were kept, cut and left out."""

    examples: int  # rows kept
    supervised_tokens: int  # of the kept rows
    total_tokens: int  # of the kept rows
    truncated: int  # kept rows that were cut at max_length
    dropped: int  # rows left out: too long, or without a supervised token after the cut
    longest: int  # tokens of the longest row before any cut
    unaligned: int  # rows whose prompt, tokenised alone as for generation, gives other tokens
    bad: int = 0  # rows left out under on_bad_row="drop"
    packed: int = 0  # packed rows of tokens, each of whose sequences is a row of its own
    left_out: int = 0  # sequences of packed rows without a supervised token
    empty_answers: int = 0  # kept rows with an empty answer, of which the end alone is supervised
    unended_answers: int = 0  # kept rows with an answer before the last that no special token ends

    def with_bad(self, more: int) -> "Counts":
        """The same with `more` bad rows, such as those that were none to begin with."""
        return dataclasses.replace(self, bad=self.bad + more)


def encode(
    row: AnyRow,
    tokenizer: Any,
    *,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    template_date: str | None = None,
    max_length: int,
    too_long: str = "truncate",
) -> Example | None:
    """One row as `encode_all` encodes it, or None where that would drop it.

    Raises:
        UserError: as `encode_all`.

    Example:
        >>> from lora_jax import data
        >>> row = data.parse_row({"prompt": "one", "completion": "eins"}, "row")
        >>> example = data.encode(row, tokenizer, max_length=64)
        >>> tokenizer.decode(example.tokens[example.loss_weights > 0])  # what the loss covers
        'eins<|im_end|>'
    """
    examples, _ = encode_rows(
        [row],
        tokenizer,
        system_prompt=system_prompt,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
        template_date=template_date,
        max_length=max_length,
        too_long=too_long,
    )
    return examples[0] if examples else None


def encode_all(
    rows: Sequence[AnyRow],
    tokenizer: Any,
    *,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    template_date: str | None = None,
    max_length: int,
    too_long: str = "truncate",
    on_bad_row: str = "error",
) -> tuple[list[Example], Counts]:
    """Every row as an `Example` of at most `max_length` tokens, and the counts of what happened.

    `system_prompt` goes before rows that have no system turn. `too_long`: "truncate" cuts and drops
    what has no supervised token left, "drop" drops, "error" refuses. `on_bad_row`: "error" refuses
    rows that have no supervised token or that the template refuses, "drop" leaves them out.

    Raises:
        UserError: no chat template, a bad one, or one that uses chance; conversations that it
            refuses or rewrites; rows too long under "error"; rows without a supervised token; no
            example left; a tokenizer without offsets or, where it is needed, without EOS.
    """
    examples, counts = encode_rows(
        rows,
        tokenizer,
        system_prompt=system_prompt,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
        template_date=template_date,
        max_length=max_length,
        too_long=too_long,
        on_bad_row=on_bad_row,
    )
    if not examples:
        raise nothing_left(len(rows), counts, max_length, too_long)
    return examples, counts


def nothing_left(rows: int, counts: Counts, max_length: int, too_long: str) -> UserError:
    """Return the error for rows of which none became an example."""
    return UserError(
        f"no example is left of {rows} rows: the longest has {counts.longest} tokens, "
        f"data.max_length={max_length}, data.too_long={too_long!r}"
    )


def prompt_tokens(
    row: Row,
    tokenizer: Any,
    *,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    template_date: str | None = None,
) -> np.ndarray:
    """(time,) int32: everything before the last assistant turn, up to where its answer begins.

    Raises:
        UserError: as `encode_all`; the row begins with its answer.
    """
    check_kwargs(tokenizer, chat_template, chat_template_kwargs)
    template = resolve_template(tokenizer, chat_template, row.tools)
    row = with_kwargs(row, chat_template_kwargs)
    messages = conversation(row, system_prompt)
    messages = messages[: len(messages) - len(row.messages) + row.answer_index]
    if template is None:
        text, head = "".join(map(content, messages)), _bos(tokenizer)
    else:
        template = with_date(template, template_date)
        text, head = render_prompt(tokenizer, template, row, messages), []
    ids = _tokenize(tokenizer, [text])[0][0]
    return np.asarray(_join(head, ids, np.zeros(len(ids), np.float32))[0], np.int32)


def stop_tokens(
    tokenizer: Any,
    chat_template: str | None = None,
    extra: Iterable[int] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> frozenset[int]:
    """The ids that end an answer: EOS, the tokens the template writes after an answer or a call
    (where it writes none, the mark of the role that follows), and `extra`.

    A tokenizer without a template has plain texts and tokens alone, which EOS ends.

    Raises:
        UserError: a bad chat template.
    """
    found = {tokenizer.eos_token_id}
    if chat_template is not None or tokenizer.chat_template:
        template = resolve_template(tokenizer, chat_template)
        if template is not None:
            special = special_tokens(tokenizer)
            found.add(sample(tokenizer, template, chat_template_kwargs)[3])
            ends = end_tokens(tokenizer, template, chat_template_kwargs)[1]
            found |= {special[token] for token in ends}
    return frozenset(extra) | {i for i in found if i is not None}


def prompt_key(example: Example) -> bytes:
    """Return the tokens before the first supervised one: equal for examples that ask the same."""
    first = int(np.argmax(example.loss_weights > 0))
    return example.tokens[:first].tobytes()


def has_prompt(example: Example) -> bool:
    """Return True if an example asks something, as a plain text does not.

    A first token is never supervised, so it alone is no prompt.
    """
    return not example.loss_weights[:2].any()


def encode_rows(
    rows: Sequence[AnyRow],
    tokenizer: Any,
    *,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    template_date: str | None = None,
    max_length: int,
    too_long: str = "truncate",
    on_bad_row: str = "error",
) -> tuple[list[Example], Counts]:
    """Do the same as `encode_all`, except that no example need be left."""
    templates: dict[tuple, Template | None] = {}
    for row in rows:
        if isinstance(row, Row) and (key := _template_key(row)) not in templates:
            check_kwargs(tokenizer, chat_template, chat_template_kwargs)
            templates[key] = find_template(
                row, tokenizer, chat_template, chat_template_kwargs, template_date
            )
    ready, usable, problems = [], [], []
    unread: list[tuple[str, str | BadRow]] = []
    for row in rows:
        try:
            if isinstance(row, LabelRow):
                raise UserError(f"{row.where}: a label is for models that classify")
            if isinstance(row, TokenRow):
                ready.append(_as_given(row))
            elif isinstance(row, Row):
                template = templates[_template_key(row)]
                check_read(row, template and template.source)
                full = with_kwargs(row, chat_template_kwargs)
                ready.append(to_text(full, tokenizer, template, system_prompt))
            else:
                ready.append(to_text(row, tokenizer, None, system_prompt))
            usable.append(row)
        except BadRow as error:
            unread.append((row.where, error))
        except UserError as error:
            problems.append(str(error))
    if on_bad_row != "drop":
        raise_first([*describe_problems(unread), *problems])

    examples: list[Example] = []
    dropped = truncated = longest = unaligned = left_out = empty_answers = unended_answers = 0
    made = zip(usable, ready, _examples(usable, ready, tokenizer), strict=True)
    for row, item, (example, aligned) in made:
        length = len(example.tokens)
        longest = max(longest, length)
        if (
            not example.loss_weights.any()
            and isinstance(row, TokenRow)
            and row.sequence is not None
        ):
            left_out += 1
        elif not example.loss_weights.any():
            problems.append(_unsupervised(row))
        elif too_long == "error" and length > max_length:
            problems.append(
                f"{example.where}: {length} tokens, more than data.max_length={max_length}"
            )
        elif (fitted := _fit(example, max_length, too_long)) is None:
            dropped += 1
        else:
            examples.append(fitted)
            truncated += length > max_length
            unaligned += not aligned
            empty_answers += isinstance(item, Text) and item.empty
            unended_answers += isinstance(item, Text) and item.unended
    bad = len(unread) + len(problems)
    if on_bad_row != "drop" or bad == len(rows):
        raise_first([*describe_problems(unread), *problems])
    return examples, Counts(
        examples=len(examples),
        supervised_tokens=sum(int(np.count_nonzero(e.loss_weights)) for e in examples),
        total_tokens=sum(len(e.tokens) for e in examples),
        truncated=truncated,
        dropped=dropped,
        longest=longest,
        unaligned=unaligned,
        bad=bad,
        packed=sum(isinstance(row, TokenRow) and row.sequence == 0 for row in rows),
        left_out=left_out,
        empty_answers=empty_answers,
        unended_answers=unended_answers,
    )


def find_template(
    row: Row,
    tokenizer: Any,
    chat_template: str | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    template_date: str | None,
) -> Template | None:
    """Return the template that renders a row; None for plain text.

    Raises:
        UserError: a bad chat template, or one that uses chance.
    """
    source = resolve_template(tokenizer, chat_template, row.tools)
    if source is None:
        return None
    check_repeatable(source, name(tokenizer))
    arguments = with_kwargs(row, chat_template_kwargs).chat_template_kwargs
    return read_template(tokenizer, with_date(source, template_date), arguments)


def _template_key(row: Row) -> tuple[bool, str]:
    """Return what decides the template of a row, which may be another one for rows with tools."""
    return bool(row.tools), repr(row.chat_template_kwargs)


def _unsupervised(row: AnyRow) -> str:
    if isinstance(row, Row):
        return unsupervised(row.where)
    reason = "no weight after the first is above 0"
    if isinstance(row, TextRow):
        reason = "the text is a single token, with nothing before it to predict it from"
    return f"{row.where}: no token is supervised: {reason}"


def _as_given(row: TokenRow) -> Example:
    weights = np.asarray(row.loss_weights, np.float32)
    weights[:1] = 0  # no token before it predicts it
    return Example(np.asarray(row.tokens, np.int32), weights, row.where)


def _examples(
    rows: Sequence[AnyRow], ready: Sequence[Text | Example], tokenizer: Any
) -> Iterator[tuple[Example, bool]]:
    """The uncut example of each row, and whether its prompt alone gives the same first tokens."""
    head = None
    for first in range(0, len(ready), _BATCH):
        batch = ready[first : first + _BATCH]
        texts = [item for item in batch if isinstance(item, Text)]
        whole = iter(_tokenize(tokenizer, [t.text for t in texts]))
        prompts = iter(_tokenize(tokenizer, [t.text[: t.prompt_end] for t in texts]))
        for row, item in zip(rows[first : first + _BATCH], batch, strict=True):
            if isinstance(item, Example):
                yield item, True
                continue
            (ids, offsets), (prompt, _) = next(whole), next(prompts)
            weights = _weights(offsets, item.spans)
            aligned = ids[: len(prompt)] == prompt
            if item.bos:  # before EOS is put after it, which may be the same token
                head = _bos(tokenizer) if head is None else head
                ids, weights = _join(head, ids, weights)
            if not (weights.any() and weights[-1] and ids[-1] in item.closing):
                if tokenizer.eos_token_id is None:
                    raise UserError(
                        f"{row.where}: no end-of-turn token ends the answer, and the tokenizer of "
                        f"{name(tokenizer)} has no EOS token to end it with"
                    )
                ids, weights = [*ids, tokenizer.eos_token_id], np.append(weights, np.float32(1))
            weights[:1] = 0  # no token before it predicts it
            yield Example(np.asarray(ids, np.int32), weights, row.where), aligned


def _weights(offsets: Sequence[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    weights = np.zeros(len(starts), np.float32)
    for start, end in spans:
        # Some tokenizers trim spaces off the offsets, so that a token of spaces is empty at its
        # end: hence both bounds on both sides.
        weights[(starts >= start) & (ends > start) & ((starts < end) | (ends <= end))] = 1
    return weights


def _fit(example: Example, max_length: int, too_long: str) -> Example | None:
    if len(example.tokens) <= max_length:
        return example
    weights = example.loss_weights[:max_length].copy()
    if too_long == "drop" or not weights.any():
        return None
    return Example(example.tokens[:max_length].copy(), weights, example.where)


def _tokenize(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and character offsets of each text, without special tokens beyond those in the text."""
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer of {name(tokenizer)} is a slow one without character offsets, which "
            "tell answers from prompts; give the model a tokenizer.json"
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
    except Exception as error:  # `tokenizers` has no kind of its own
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            raise UserError("the chat template writes an unpaired surrogate") from error
        reason = shown(str(error))
        raise UserError(f"the tokenizer of {name(tokenizer)} is damaged: {reason}") from error
    return list(zip(out["input_ids"], out["offset_mapping"], strict=True))


def _bos(tokenizer: Any) -> list[int]:
    """BOS if the tokenizer would put it before a text, else nothing.

    A tokenizer may put EOS after a text, and some use one token for both.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    whole = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if plain:
        return [bos] if whole[:1] == [bos] and whole[1 : 1 + len(plain)] == plain else []
    return [bos] if tokenizer("")["input_ids"][:1] == [bos] else []


def _join(head: list[int], ids: list[int], weights: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Tokens and their weights after BOS, unless they begin with it."""
    if ids[: len(head)] == head:
        return list(ids), weights
    return [*head, *ids], np.concatenate([np.zeros(len(head), np.float32), weights])
