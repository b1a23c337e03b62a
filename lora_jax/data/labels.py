"""Texts and pairs of texts with a label, for models that classify.

    {"text": "Parker & Sons Ltd", "label": "company"}
    {"sentence1": "..", "sentence2": "..", "label": 1}

    tokens        [CLS] Parker & Sons Ltd [SEP]  1      the last one is the number of the label
    loss_weights    0     0    0  0    0    0    1      and the only one to be predicted

So a labelled text packs, caches, shuffles and is weighted as any other example. The columns of the
text are those that data.text names, or the first of FORMS that a record has; the label is a string,
a whole number or a boolean in the column data.label.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from lora_jax.data.keys import check_keys
from lora_jax.data.rows import BadRow, LabelRow, kind, listed
from lora_jax.data.sources import raise_first
from lora_jax.data.templates import Counts, Example
from lora_jax.errors import UserError

# Columns of a text or a pair: those of the GLUE tasks among them.
FORMS = (
    ("text",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
)


def parse_label_row(
    record: Any,
    where: str,
    columns: Sequence[str] | None,
    label: str,
    ignore_columns: Collection[str] = (),
) -> LabelRow:
    """Return the row of a record; `columns` of its text or pair, None: as in FORMS.

    Where the columns are not named, others are refused unless they are harmless or ignored, as
    `lora_jax.data.keys` has it.

    Raises:
        BadRow: a column that is missing or is no text, a label that is none.
    """
    if not isinstance(record, dict):
        raise BadRow(f"a row must be an object, not {kind(record)}")
    record = {key: value for key, value in record.items() if key not in ignore_columns}
    form = columns or next((form for form in FORMS if {*form} <= {*record}), None)
    if form is None:
        raise BadRow(
            "a row to classify needs 'text', or a pair such as 'sentence1' and 'sentence2' (or "
            f"name its columns in data.text); its keys: {listed(list(record))}"
        )
    if missing := [name for name in (*form, label) if record.get(name) is None]:
        raise BadRow(f"{missing[0]!r} is missing or null; its keys: {listed(list(record))}")
    texts = tuple(record[name] for name in form)
    if wrong := [name for name, text in zip(form, texts, strict=True) if not isinstance(text, str)]:
        raise BadRow(f"{wrong[0]!r} is {kind(record[wrong[0]])}, not a string")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"a text is not valid Unicode: {error.reason}") from error
    value = record[label]
    if not isinstance(value, str | int):
        raise BadRow(f"{label!r} is {kind(value)}, not a string or a whole number")
    if columns is None:
        given = {key: value for key, value in record.items() if value is not None}
        check_keys(given, (*form, label, "label_text", "label_name"))
    return LabelRow(texts, str(value), where)


def label_names(rows: Iterable[LabelRow]) -> tuple[str, ...]:
    """The labels that occur, numbers in their order, others in that of the alphabet."""
    found = {row.label for row in rows}
    numbers = all(name.lstrip("-").isdigit() for name in found)
    return tuple(sorted(found, key=int) if numbers else sorted(found))


def encode_labelled(
    rows: Sequence[LabelRow],
    tokenizer: Any,
    labels: Sequence[str],
    *,
    max_length: int,
    too_long: str = "truncate",
    on_bad_row: str = "error",
) -> tuple[list[Example], Counts]:
    """Every row as an `Example` of at most `max_length` tokens, its label among them; `too_long`
    and `on_bad_row` are those of `templates.encode_all`. Of a pair that is too long, the longer
    text is cut.

    Raises:
        UserError: labels that are not in `labels`; rows too long under "error".
    """
    numbers = {name: number for number, name in enumerate(labels)}
    problems = [
        f"{row.where}: label {row.label!r} is not one of {', '.join(labels)}"
        for row in rows
        if row.label not in numbers
    ]
    usable = [row for row in rows if row.label in numbers]
    examples: list[Example] = []
    dropped = truncated = longest = 0
    for row, ids, second in _tokenized(usable, tokenizer):
        length = len(ids) + 1
        longest = max(longest, length)
        if length > max_length:
            if too_long == "error":
                problems.append(
                    f"{row.where}: {length} tokens, more than data.max_length={max_length}"
                )
            if too_long != "truncate":
                dropped += too_long == "drop"
                continue
            truncated += 1
            ((_, ids, second),) = _tokenized([row], tokenizer, max_length - 1)
        tokens = np.asarray([*ids, numbers[row.label]], np.int32)
        weights = np.zeros(len(tokens), np.float32)
        weights[-1] = 1
        examples.append(Example(tokens, weights, row.where, second))
    if on_bad_row != "drop" or len(problems) == len(rows):
        raise_first(problems)
    return examples, Counts(
        examples=len(examples),
        supervised_tokens=len(examples),
        total_tokens=sum(len(example.tokens) for example in examples),
        truncated=truncated,
        dropped=dropped,
        longest=longest,
        unaligned=0,
        bad=len(problems),
    )


def _tokenized(
    rows: Sequence[LabelRow], tokenizer: Any, limit: int | None = None
) -> Iterable[tuple[LabelRow, list[int], int]]:
    """The ids of each row with the tokenizer's special tokens, and where its second text begins:
    at the end, if it has one only.
    """
    for row in rows:
        try:
            out = tokenizer(
                *row.texts, truncation=limit is not None, max_length=limit, verbose=False
            )
        except Exception as error:  # the tokenizers library raises bare exceptions
            raise UserError(f"{row.where}: the tokenizer refuses it: {error}") from error
        ids = list(out["input_ids"])
        parts = out.sequence_ids(0) if len(row.texts) == 2 else []
        yield row, ids, parts.index(1) if 1 in parts else len(ids)
